"""The commands generate and evaluate with both backends: the same text for the same seed, the same loss."""

import numpy as np
import pytest

from numpy_gpt import GPT, Generator, GPTConfig, generate, load, save
from numpy_gpt.cli.main import main as numpy_main
from numpy_gpt.console import printable
from parity_tests.judge.gpt2_files import gpt2_tensors, huggingface_folder
from parity_tests.judge.runs import check_refused, invoke, pretrain
from parity_tests.judge.tokenizers import kinds
from torch_gpt.cli import main as torch_main
from torch_gpt.model import from_params

COMMANDS = {"numpy": numpy_main, "torch": torch_main}
BOTH = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
SEPARATOR = "---------------\n"
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, text):
    """Checkpoints by name: a short run's, random weights in both dtypes, and a padded vocabulary."""
    place = tmp_path_factory.mktemp("models")
    pretrain(numpy_main, text, place / "trained", "--max-steps", 20, "--lr", 0.01)
    config = GPTConfig(257, 16, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.3)
    about = {"encoding": "bytes"}
    save(GPT(config, seed=4), place / "float32", about=about)
    save(GPT(config, seed=5, dtype=np.float64), place / "float64", about=about)
    save(GPT(GPTConfig(300, 16, emb_dim=8, n_heads=2, n_layers=1), seed=6), place / "padded", about=about)
    return place


def output(command, *args):
    device = CPU if command is torch_main else []
    result = invoke(command, *args, *device)
    assert result.exit_code == 0, result.output
    return result.stdout


SAMPLINGS = {
    "greedy": [],
    "drawn": ["--temperature", 1],
    "top-k": ["--temperature", 1.3, "--top-k", 5],
    "top-p": ["--temperature", 0.8, "--top-p", 0.7],
    "both": ["--temperature", 1.5, "--top-k", 40, "--top-p", 0.9],
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("model", ["trained", "float32", "float64", "padded"])
def test_both_backends_print_the_same_text(models, model, sampling):
    texts = set()
    for seed in (1, 2, -3, 2**64 - 1):
        args = ["generate", models / model, "the model", "--max-new-tokens", 40, "--seed", seed, *SAMPLINGS[sampling]]
        ours, torchs = (output(command, *args) for command in COMMANDS.values())
        assert ours == torchs
        assert ours.startswith("the model")
        texts.add(ours)
    assert len(texts) == (1 if sampling == "greedy" else 4)


def test_torch_takes_a_dtype_and_an_attention(models):
    args = ["generate", models / "float32", "the", "--temperature", 1]
    want = output(numpy_main, *args)
    for more in (["--attention", "plain"], ["--dtype", "float64"]):
        assert output(torch_main, *args, *more) == want
    assert len(output(torch_main, *args, "--dtype", "bfloat16")) > 50
    check_refused(invoke(torch_main, *args, "--device", "toaster"), "unknown device 'toaster'")


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_torch_computes_as_asked(models, text, monkeypatch, name):
    asked = []
    monkeypatch.setattr(
        "torch_gpt.cli.from_params", lambda *args, **how: asked.append(how) or from_params(*args, **how)
    )
    args = [name, models / "float32", *(["a"] if name == "generate" else ["--text", text])]
    for attention in ("sdpa", "plain"):
        output(torch_main, *args, "--attention", attention, "--dtype", "float64")
    assert [how["attention"] for how in asked] == ["sdpa", "plain"]
    assert {(how["device"].type, str(how["dtype"])) for how in asked} == {("cpu", "torch.float64")}


def figures(command, *args):
    """The loss and the perplexity that evaluate prints, and the lines above them."""
    *head, loss, perplexity = output(command, "evaluate", *args).splitlines()
    return float(loss.split()[1]), float(perplexity.split()[1]), head


@pytest.mark.parametrize("model", ["trained", "float32", "float64"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_both_backends_print_the_same_loss(models, text, model, batch_size):
    """All printed digits, but for the rounding of the last."""
    args = [models / model, "--text", text, "--batch-size", batch_size]
    ours, torchs = (figures(command, *args) for command in COMMANDS.values())
    assert ours[2] == torchs[2]
    assert abs(ours[0] - torchs[0]) < 1.5e-4
    assert abs(ours[1] - torchs[1]) < 2e-4 * ours[1]


def test_evaluate_without_text_takes_the_runs_own_in_both_backends(models):
    ours, torchs = (output(command, "evaluate", models / "trained") for command in COMMANDS.values())
    assert "the last 10% of" in ours
    assert ours == torchs


@pytest.mark.parametrize(("dtype", "budget"), [("float32", 1e-6), ("float64", 1e-14), ("bfloat16", 0.03)])
def test_losses_differ_by_rounding_only(models, text, monkeypatch, dtype, budget):
    """The unrounded losses; bfloat16 differs, by about its eps, but is not the same."""
    from numpy_gpt.runs import evaluation

    found, real = [], evaluation.mean_loss

    def mean_loss(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr("numpy_gpt.cli.evaluate.mean_loss", mean_loss)
    for model in ("trained", "float32"):
        save(load(models / model, np.float64), models / "wide", about={"encoding": "bytes"})
        place = models / ("wide" if dtype == "float64" else model)
        output(numpy_main, "evaluate", place, "--text", text)
        output(torch_main, "evaluate", place, "--text", text, "--dtype", dtype)
        ours, torchs = found[-2:]
        assert abs(ours / torchs - 1) < budget
        assert dtype != "bfloat16" or abs(ours / torchs - 1) > 1e-6


@BOTH
@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_beyond_torchs_range_is_refused(models, command, seed):
    args = ["generate", models / "float32", "a", "--temperature", 1, "--seed", seed]
    check_refused(invoke(command, *args), f"a seed must be from -2^63 to 2^64 - 1, not {seed}")


@BOTH
@pytest.mark.parametrize("args", [["generate", "said[PAD]"], ["evaluate", "--text", "{tmp}/text"]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, command, args):
    """An encoding may have more added tokens than the model."""
    kind = kinds()["added special, embeddings as they were"]
    kind.write(huggingface_folder(tmp_path / "theirs", gpt2_tensors(vocab_size=287), vocab_size=287))
    assert invoke(numpy_main, "import", tmp_path / "theirs", "--out", tmp_path / "ours").exit_code == 0
    (tmp_path / "text").write_text("said[PAD]")
    name, *rest = (arg.format(tmp=tmp_path) for arg in args)
    check_refused(invoke(command, name, tmp_path / "ours", *rest), "id 287 is outside the vocabulary of 287")


@BOTH
def test_stop_texts_end_the_continuation(models, command):
    """Each text of one to four characters of the continuation, across tokens (bytes) and from its first on."""
    args = ["generate", models / "trained", "the", "--max-new-tokens", 30]
    whole = output(command, *args).removesuffix("\n").removeprefix("the")
    assert len(whole) == 30
    for i, length in [(0, 1), (0, 3), (1, 4), (12, 2), (29, 1)]:
        stop = whole[i : i + length]
        assert output(command, *args, "--stop", stop) == "the" + whole.partition(stop)[0] + "\n"
    assert output(command, *args, "--stop", "the", "--stop", "zzz") == "the" + whole.partition("the")[0] + "\n"
    both = [whole[20:22], whole[9:12]]
    want = whole[: min(whole.index(stop) for stop in both)]
    assert output(command, *args, "--stop", both[0], "--stop", both[1]) == f"the{want}\n"
    check_refused(invoke(command, *args, "--stop", ""), "--stop is empty")


def test_a_stop_text_may_come_in_a_locale_without_its_characters(models, monkeypatch):
    asked = []
    monkeypatch.setattr("numpy_gpt.cli.generate.before_stop", lambda pieces, stops: asked.append(stops) or pieces)
    output(numpy_main, "generate", models / "float32", "a", "--stop", "\udcc3\udca9")
    assert asked == [("é",)]


def test_a_stop_text_does_not_begin_in_the_prompt(models):
    args = ["generate", models / "trained", "the", "--max-new-tokens", 30]
    whole = output(numpy_main, *args).removesuffix("\n").removeprefix("the")
    stop = "e" + whole[0]
    assert output(numpy_main, *args, "--stop", stop) == "the" + whole.partition(stop)[0] + "\n"
    assert output(numpy_main, *args, "--stop", whole[0]) == "the\n"


def continuations(folder, prompt, rng, *lengths):
    """Texts of these numbers of new tokens after the prompt, drawn at temperature 1, one after another."""
    model = load(folder)
    rows = (generate(model, [list(prompt.encode())], n, 1.0, eos_id=256, rng=rng)[0] for n in lengths)
    return [printable(bytes(row.tolist()).decode(errors="replace")) + "\n" for row in rows]


@BOTH
def test_samples_come_from_one_stream(models, command):
    """The first is what one alone gives; each next one draws from where the last stopped."""
    args = ["generate", models / "trained", "the", "--temperature", 1, "--max-new-tokens", 12, "--seed", 5]
    want = continuations(models / "trained", "the", Generator(5), 12, 12, 12)
    assert len(set(want)) == 3
    assert output(command, *args, "--num-samples", 3) == SEPARATOR.join(want)
    assert output(command, *args, "--num-samples", 1) == output(command, *args) == want[0]


@BOTH
def test_nothing_is_drawn_after_a_stop_text(models, command):
    for seed in range(50):
        first, second = continuations(models / "trained", "the", Generator(seed), 5, 12)
        stop = first[-3:-1]  # the text of the last two tokens
        if len(first) == 9 and "·" not in stop and stop not in first[3:-2] and stop not in second[3:]:
            break
    else:
        pytest.fail("no seed draws a text that suits the test")
    args = ["generate", models / "trained", "the", "--temperature", 1, "--max-new-tokens", 12, "--seed", seed]
    shown = output(command, *args, "--num-samples", 2, "--stop", stop)
    assert shown == first[:-3] + "\n" + SEPARATOR + second


@BOTH
def test_equal_samples_are_refused(models, command):
    args = ["generate", models / "float32", "Hi", "--num-samples", 2]
    check_refused(invoke(command, *args), "at temperature 0 all samples are the same: give a --temperature above 0")
    check_refused(invoke(command, *args[:-1], 0), "is not in the range")


@BOTH
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--start=the", "the argument PROMPT"),
        ("--num_samples=2", "'--num-samples'"),
        ("--max_new_tokens=5", "'--max-new-tokens'"),
        ("--top_k=5", "'--top-k'"),
        ("--out_dir=out", "the argument CHECKPOINT"),
        ("--init_from=resume", "the argument CHECKPOINT"),
    ],
)
def test_nanogpts_flags_are_answered_with_ours(models, command, theirs, ours):
    result = invoke(command, "generate", models / "float32", "the", theirs)
    check_refused(result, f"No such option '{theirs.partition('=')[0]}'. Did you mean {ours}?")


@BOTH
def test_flags_of_another_command_are_not_suggested(models, command):
    assert "Did you mean" not in invoke(command, "generate", models / "float32", "the", "--n_embd=4").output
    assert "PROMPT" not in invoke(command, "pretrain", "--start=the").output
