"""The benchmarks: contenders do the same work, and are timed only after their results agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import cli, compare, environment, jobs
from benchmarks.contenders import agreement
from benchmarks.contenders.agreement import DisagreementError
from benchmarks.contenders.backends import NumPyBackend, PlainBackend
from benchmarks.contenders.torch_backends import TorchBackend, Way
from benchmarks.jobs import Job, Text, batches, text_for
from benchmarks.measure import ceilings, decode, forward, memory, operations, step
from benchmarks.measure.streams import Case, cases, mask_shapes, measure
from benchmarks.peak_memory import in_own_process
from benchmarks.results import Limits, Ratio, Report, Row, as_document, write_json
from benchmarks.settings import Settings
from benchmarks.timing import Contender, Spread, cores, interleaved, ratio
from numpy_gpt import GPT, GPTConfig
from torch_gpt.model import from_params, loss_and_grads

SMALL = GPTConfig(vocab_size=60, context_length=8, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.1)
JOB = Job("tiny", SMALL, B=2, T=8)
QUICKLY = Settings(quick=True, runs=2)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def batch():
    return next(batches(JOB, text_for(60)))


def agreeing(backend, x, y):
    params = GPT(SMALL, 123).params
    return agreement.check(backend, SMALL, x, y, agreement.truth(SMALL, params, x, y))


# The work


@pytest.mark.parametrize("style", ["book", "tuned"])
def test_torch_models_match_the_reference(style, batch):
    """Every gradient by name in float64; the tuned model's fused projection is split back into three."""
    params = GPT(SMALL, 123).params
    _, want = loss_and_grads(from_params(SMALL, params, dtype=torch.float64), *batch)
    loss, got = TorchBackend(Way(style, precision="float64"), SMALL, params).loss_and_grads(*batch)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        np.testing.assert_allclose(got[name], grad, rtol=0, atol=1e-13, err_msg=name)
    assert loss == pytest.approx(agreement.truth(SMALL, params, *batch).loss, abs=1e-13)


@pytest.mark.parametrize("style", ["book", "tuned"])
@pytest.mark.parametrize("dropout", [False, True])
def test_backends_learn_alike(style, dropout):
    """Ten steps on one batch: all losses fall; without dropout they agree across backends.

    With dropout the two NumPy backends still agree, since they draw the same masks.
    """
    x, y = next(batches(JOB, text_for(60)))
    backends = [NumPyBackend(SMALL), PlainBackend(SMALL), TorchBackend(Way(style), SMALL, GPT(SMALL, 123).params)]
    for backend in backends:
        backend.touch_every_row()
    losses = {b.name: [float(b.step(x, y, dropout)) for _ in range(10)] for b in backends}
    agreement.check_training(losses if not dropout else {b.name: losses[b.name] for b in backends[:2]})
    assert all(loss[-1] < loss[0] for loss in losses.values())


def test_touch_every_row_updates_all_backends_alike():
    numpy, torchs = NumPyBackend(SMALL), TorchBackend(Way("tuned"), SMALL, GPT(SMALL, 123).params)
    textbook = PlainBackend(SMALL)
    before = numpy.model.params["tok_emb.weight"].copy()
    for backend in (numpy, textbook, torchs):
        backend.touch_every_row()
    after = numpy.model.params["tok_emb.weight"]
    decayed = before * (1 - 4e-4 * 0.1)
    assert np.all(np.abs(after - decayed) > 1e-4), "a row without gradient only decays"
    np.testing.assert_allclose(textbook.params["tok_emb.weight"], after, atol=1e-6)
    np.testing.assert_allclose(torchs.model.tok_emb.weight.detach().numpy(), after, atol=1e-6)


def test_batches_are_distinct_and_targets_shifted():
    stream = batches(JOB, Text(np.arange(50), "counting"))
    drawn = [next(stream) for _ in range(4)]
    for x, y in drawn:
        assert x.shape == (2, 8)
        np.testing.assert_array_equal(y, x + 1)
    assert len({x.tobytes() for x, _ in drawn}) == 4


def test_text_fits_the_vocabulary(monkeypatch, tmp_path):
    for size in (65, 300):
        assert 0 <= text_for(size).ids.min() <= text_for(size).ids.max() < size
    monkeypatch.setenv("NUMPY_GPT_DATA", str(tmp_path))
    assert text_for(65).name.startswith("python-manual"), "nothing is downloaded for a benchmark"


def test_job_sizes():
    book = jobs.BOOK.config
    assert sum(p.size for p in GPT(SMALL, 1).params.values()) < 20_000
    assert (book.vocab_size, book.context_length, book.emb_dim, book.n_layers) == (50257, 256, 768, 12)
    assert not book.tie_weights
    assert jobs.SMALL.config.vocab_size == 65
    assert jobs.LONG.T == jobs.LONG.config.context_length == 1024


# Agreement


def test_agreement_holds(batch):
    for backend in (
        NumPyBackend(SMALL),
        PlainBackend(SMALL),
        *(TorchBackend(Way(s), SMALL, GPT(SMALL, 123).params) for s in ("book", "tuned")),
    ):
        errors = agreeing(backend, *batch)
        assert 0 < errors.gradient < 1e-5


@pytest.mark.parametrize("name", ["trf_blocks.1.att.W_key.weight", "trf_blocks.0.ff.layers.2.bias", "tok_emb.weight"])
@pytest.mark.parametrize("broken", [np.zeros_like, np.negative, lambda g: g * 1.02, lambda g: g * np.nan])
def test_wrong_gradient_is_refused(name, broken, batch):
    class Wrong(NumPyBackend):
        name = "NumPy, broken"

        def loss_and_grads(self, tokens, targets):
            loss, grads = super().loss_and_grads(tokens, targets)
            return loss, grads | {tensor: broken(grads[tensor])}

    tensor = name
    with pytest.raises(DisagreementError, match=f"NumPy, broken: d {tensor} is off"):
        agreeing(Wrong(SMALL), *batch)


def test_wrong_loss_is_refused(batch):
    class Wrong(NumPyBackend):
        def loss_and_grads(self, tokens, targets):
            loss, grads = super().loss_and_grads(tokens, targets)
            return loss * 1.001, grads

    with pytest.raises(DisagreementError, match="NumPy: loss is off"):
        agreeing(Wrong(SMALL), *batch)


def test_missing_gradient_is_refused(batch):
    class Wrong(NumPyBackend):
        def loss_and_grads(self, tokens, targets):
            loss, grads = super().loss_and_grads(tokens, targets)
            return loss, {name: grad for name, grad in grads.items() if "pos" not in name}

    with pytest.raises(DisagreementError, match="pos_emb"):
        agreeing(Wrong(SMALL), *batch)


def test_diverging_training_loss_is_refused():
    agreement.check_training({"A": [4.0, 3.0], "B": [4.0, 3.001]})
    with pytest.raises(DisagreementError, match="B: the loss of step 1"):
        agreement.check_training({"A": [4.0, 3.0], "B": [4.0, 4.0]})


def test_wrong_logits_are_refused(batch):
    class Wrong(NumPyBackend):
        def forward(self, tokens):
            return super().forward(tokens)[..., ::-1]

    params = GPT(SMALL, 123).params
    with pytest.raises(DisagreementError, match="logits"):
        agreement.check_logits([Wrong(SMALL)], SMALL, params, batch[0])


def test_decoders_agree_token_for_token():
    prompt = text_for(60).ids[None, :4]
    torchs = TorchBackend(Way("book"), SMALL, GPT(SMALL, 123).params)
    found = {"NumPy": NumPyBackend(SMALL).generate(prompt, 12), "book's": torchs.generate(prompt, 12)}  # 16 > context
    found["plain NumPy"] = PlainBackend(SMALL).generate(prompt, 12)
    decode.check_tokens(found)
    assert found["NumPy"].shape == (1, 16)
    found["book's"][0, 9] += 1
    with pytest.raises(DisagreementError, match="book's: other tokens than NumPy's from position 9 on"):
        decode.check_tokens(found)


def test_operations_agree():
    assert max(operations.agreement(operation) for operation in operations.operations(JOB)) < 1e-5


# Ceilings


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("T", [8, 64, 100, 128])
def test_products_have_a_steps_flops(T, backward):
    config = GPTConfig(vocab_size=60, context_length=128, emb_dim=16, n_heads=2, n_layers=2)
    products = ceilings.MatrixProducts(config, 3, T, backward)
    assert products.flops == ceilings.step_flops(config, 3, T, backward)
    products.run()
    got = [out.copy() for _, _, out in products.products]
    products.in_torch()()
    for (_, _, out), want in zip(products.products, got, strict=True):
        np.testing.assert_allclose(out, want, atol=1e-3)


def test_step_flops_of_the_book():
    """380 GFLOP in the linear layers, plus attention's lower triangle."""
    flops = ceilings.step_flops(jobs.BOOK.config, 2, 256)
    full = 3 * 4 * 12 * 768 * 2 * 256 * 256
    assert flops == pytest.approx(379.5e9 + full * (1 + 64 / 256) / 2, rel=1e-3)


def test_weight_stream_reads_every_weight():
    stream = ceilings.WeightStream(SMALL)
    head_and_layers = sum(p.size for name, p in GPT(SMALL, 1).params.items() if p.ndim == 2 and "emb" not in name)
    assert stream.bytes == 4 * head_and_layers
    assert sum(w.size for share in stream._shares for w in share) == head_and_layers
    stream.products(2)
    stream.sums(2)


# The clock


def test_contenders_take_turns():
    seen = []
    contenders = {name: Contender(lambda i, name=name: seen.append((i, name))) for name in "ABC"}
    times = interleaved(contenders, rounds=2, warm_ups=1)
    assert "".join(name for _, name in seen) == "ABC" + "BCA" + "CAB"
    assert [i for i, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {name: len(each) for name, each in times.items()} == {"A": 2, "B": 2, "C": 2}


def test_ratios_pair_by_pair():
    value, pairs = ratio({"a": [1.0, 2.0, 6.0], "b": [2.0, 2.0, 3.0]}, "a", "b")
    assert value == 1.0
    assert (pairs.median, pairs.min, pairs.max, pairs.q1, pairs.q3) == (1.0, 0.5, 2.0, 0.75, 1.5)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 3.0, 3.0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux can put a process on some cores")
def test_cores_are_restored():
    before = os.sched_getaffinity(0)
    with cores(1):
        assert len(os.sched_getaffinity(0)) == torch.get_num_threads() == 1
    assert os.sched_getaffinity(0) == before


# Results


def test_verdicts():
    lower, higher = Limits(1.10, 0.95), Limits(0.9, better="higher")
    assert [Ratio(x, limits=lower).verdict for x in (0.9, 1.0, 1.2)] == ["goal", "asked", "missed"]
    assert [Ratio(x, limits=higher).verdict for x in (0.95, 0.8)] == ["asked", "missed"]
    assert Ratio(3.0).verdict == ""


def a_run(tmp_path, command="step", machine=None, **values):
    """Write a results file with one ratio per case; its quartiles lie 5 % to either side."""
    rows = [
        Row(case, "NumPy", None, {}, {"NumPy / torch": Ratio(x, Spread(x, 0.95 * x, 1.05 * x, x / 2, 2 * x), limits)})
        for case, (x, limits) in values.items()
    ]
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    write_json(path, as_document(command, {"line": "a machine"} | (machine or {}), rows))
    return path


@pytest.mark.parametrize(
    ("step_ratio", "decode_ratio", "code", "said"),
    [
        (1.0, 0.9, 0, "all 2 held"),
        (1.14, 0.9, 0, "all 2 held"),  # within the tolerance
        (0.5, 2.0, 0, "all 2 held"),  # both better
        (1.3, 0.9, 1, "WORSE   step: NumPy / torch: 1.300, was 1.000"),
        (1.0, 0.6, 1, "WORSE   decode: NumPy / torch: 0.600, was 0.900"),
        (1.0, None, 1, "WORSE   decode: NumPy / torch: missing, was 0.900"),
    ],
)
def test_compare(step_ratio, decode_ratio, code, said, tmp_path):
    higher = Limits(better="higher")
    old = a_run(tmp_path, step=(1.0, Limits()), decode=(0.9, higher))
    measured = {"step": (step_ratio, Limits())} | ({"decode": (decode_ratio, higher)} if decode_ratio else {})
    done = CliRunner().invoke(cli.main, ["compare", str(a_run(tmp_path, **measured)), "--baseline", str(old)])
    assert (done.exit_code, said in done.output) == (code, True), done.output


def compared(new, old, *options):
    return CliRunner().invoke(cli.main, ["compare", str(new), "--baseline", str(old), *options])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("all --quick --runs 2", "another model: nothing to compare: the new run is of 'all --quick --runs 2', the"),
        ("load --runs 9", "other measurements: nothing to compare: the new run is of 'load --runs 9', the baseline of"),
    ],
)
def test_compare_refuses_unrelated_runs(command, said, tmp_path):
    new = a_run(tmp_path, command, other=(1.0, Limits()))
    done = compared(new, a_run(tmp_path, "all --runs 4", step=(1.0, Limits()), decode=(0.9, Limits())))
    assert (done.exit_code, said in done.stderr, "WORSE" in done.output) == (2, True, False), done.output


def test_compare_uses_common_measurements(tmp_path):
    old = a_run(tmp_path, "all --runs 4", step=(1.0, Limits()), decode=(0.9, Limits()))
    done = compared(a_run(tmp_path, "step --runs 9", step=(1.0, Limits())), old)
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "all 1 held"), done.output
    assert "-       decode: NumPy / torch: not measured, was 0.900" in done.stdout.splitlines()
    done = compared(a_run(tmp_path, "step --runs 9", step=(1.3, Limits())), old)
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (1, "1 of 1 ratios are worse or missing"), done.output


def test_compare_notes_another_machine(tmp_path):
    one, other = (a_run(tmp_path, machine={"processor": "P", "cores": n}, step=(1.0, Limits())) for n in (2, 8))
    assert "different machines, which may explain a changed ratio: cores 2 and 8" in compared(other, one).stdout
    assert "different machines" not in compared(one, one).output


def test_compare_refuses_nan_tolerance_and_baseline(tmp_path):
    """No ratio compares as worse than NaN, so NaN must be refused."""
    good, bad = (a_run(tmp_path, step=(x, Limits())) for x in (1.0, float("nan")))
    done = compared(good, good, "--tolerance", "nan")
    assert (done.exit_code, "nan is not a finite number" in done.stderr) == (2, True), done.output
    done = compared(good, bad)
    assert (done.exit_code, "the baseline's step: NumPy / torch is nan" in done.stderr) == (2, True), done.output


def test_noise_is_not_a_regression():
    before, now = (
        {"ratio": r, "better": "lower", "pairs": {"q1": 0.9, "q3": q3}} for r, q3 in ((1.0, 1.1), (1.3, 1.5))
    )
    assert not compare._worse(before, now, 0.15)
    assert compare._worse(before, now | {"pairs": {"q1": 1.2, "q3": 1.5}}, 0.15)


def test_nan_ratio_is_worse(tmp_path):
    old, new = (a_run(tmp_path, step=(x, Limits())) for x in (1.0, float("nan")))
    done = CliRunner().invoke(cli.main, ["compare", str(new), "--baseline", str(old)])
    assert (done.exit_code, "WORSE" in done.output) == (1, True), done.output


def test_baseline_without_ratios_is_refused(tmp_path):
    done = CliRunner().invoke(cli.main, ["compare", str(a_run(tmp_path)), "--baseline", str(a_run(tmp_path))])
    assert (done.exit_code, "no ratio to compare" in done.output) == (2, True), done.output


@pytest.mark.parametrize("spoil", ["machine", "pairs", "ratio"])
def test_compare_refuses_incomplete_file(spoil, tmp_path):
    good = a_run(tmp_path, step=(1.0, Limits()))
    document = json.loads(good.read_text())
    ratio = document["rows"][0]["ratios"]["NumPy / torch"]
    {"machine": lambda: document.pop("machine"), "pairs": lambda: ratio.pop("pairs")}.get(
        spoil, lambda: ratio.update(ratio="fast")
    )()
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(document))
    done = CliRunner().invoke(cli.main, ["compare", str(bad), "--baseline", str(good)])
    assert (done.exit_code, str(bad) in done.output) == (2, True), done.output
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [
        *(None, "", "{}", "[]", "3", '"text"', '{"rows": 3}', '{"rows": [{}], "machine": {"line": ""}}', "\x00"),
        *('{"machine": {"line": "a mach', '{"machine": "AMD EPYC", "pairs": 9}', "[" * 100_000),
    ],
)
def test_compare_refuses_foreign_file(content, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    done = CliRunner().invoke(cli.main, ["compare", str(path), "--baseline", str(a_run(tmp_path, step=(1, Limits())))])
    assert done.exit_code == 2
    assert str(path) in done.output
    assert len(done.output.strip().splitlines()) == 1


# The commands


@pytest.fixture
def tiny(monkeypatch):
    """Run every command on the tiny model."""
    for module in (step, forward, decode, operations, memory):
        for name in ("QUICK_BOOK", "QUICK_LONG", "QUICK_SMALL"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, JOB)
    monkeypatch.setattr(ceilings.LongArray, "__init__", lambda self, size: None)
    monkeypatch.setattr(ceilings.LongArray, "read", lambda self: None)
    monkeypatch.setattr(ceilings.LongArray, "bytes", 1, raising=False)


@pytest.mark.parametrize("command", ["step", "forward", "decode", "ops"])
def test_commands(command, tiny, tmp_path):
    done = CliRunner().invoke(cli.main, [command, "--quick", "--runs", "2", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["command"] == f"{command} --quick --runs 2"
    assert last == json.loads((tmp_path / f"{command}-quick.json").read_text())
    assert (tmp_path / f"{command}-quick.png").stat().st_size > 10_000
    assert all(r["verdict"] == "" for row in last["rows"] for r in row["ratios"].values()), "only full jobs are judged"
    if command != "ops":
        notes = {row["backend"]: row["note"] for row in last["rows"]}
        assert notes["PyTorch, book's, cuda bf16"] == "not measured here"
        assert "not measured here: PyTorch" in done.stdout
        assert {"NumPy", "PyTorch, book's"} <= notes.keys()
    if command in ("step", "forward"):
        cases = {row["name"] for row in last["rows"]}
        for case in {name for name in cases if command == "forward" or name.endswith(step.PLAIN)}:
            rows = {row["backend"]: row for row in last["rows"] if row["name"] == case}
            assert rows["plain NumPy"]["figures"]["tokens/s"] > 0
            assert rows["NumPy"]["ratios"]["NumPy / plain NumPy"]["ratio"] > 0
    if command == "step":
        assert {row["name"].partition("T=8, ")[2] for row in last["rows"]} == set(step.FORMS)
        for row in last["rows"]:
            assert ("grad error" in row["figures"]) == ("tokens/s" in row["figures"])
    file = str(tmp_path / f"{command}-quick.json")
    done = CliRunner().invoke(cli.main, ["compare", file, "--baseline", file])
    assert done.exit_code == 0, done.output


def test_disagreement_ends_the_command(tiny, monkeypatch, tmp_path):
    def wrong(self, tokens, targets):
        loss, grads = GPT.loss_and_grads(self.model, tokens, targets)
        return float(loss), grads | {"final_norm.scale": -grads["final_norm.scale"]}

    monkeypatch.setattr(NumPyBackend, "loss_and_grads", wrong)
    done = CliRunner().invoke(cli.main, ["step", "--quick", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "NumPy: d final_norm.scale is off" in done.stderr
    assert not list(tmp_path.iterdir())


def test_unusable_out_folder_is_refused(tiny, tmp_path):
    (tmp_path / "file").touch()
    done = CliRunner().invoke(cli.main, ["step", "--quick", "--out", str(tmp_path / "file" / "folder")])
    assert done.exit_code == 2
    assert "choose another with --out" in done.stderr


def test_scaling_rows():
    from benchmarks.measure import scaling

    report = Report()
    scaling.measure(JOB, [(1, 4), (1, 8)], [(2, 4)], (1, 4), report)
    assert sum(bool(row.ratios) for row in report.rows) == 3 + scaling.usable_cores()


def test_memory_grows_with_the_work():
    small, large = (in_own_process("attention", "2", str(T), "16") for T in (256, 2048))
    assert large["peak"] - large["before"] > small["peak"] - small["before"] > 0
    assert [memory.verdict(growth, 16) for growth in (15.0, 19.0, 200.0)] == ["linear", "linear", "more than linear"]


def test_step_memory_is_measured_in_a_subprocess():
    """Memory is measured in a subprocess; this process, with torch and the suite loaded, is larger."""
    config = json.dumps(SMALL.to_dict())
    numpy = in_own_process("step", "NumPy", config, "2", "8")
    torchs = in_own_process("step", "tuned cpu", config, "2", "8")
    assert 0 < numpy["before"] <= numpy["peak"] < torchs["before"] <= torchs["peak"]


# The environment


def test_slowing_blas_variables_are_removed():
    kept = {"PATH": "/bin", "OPENBLAS_NUM_THREADS": "2"}
    slowed = kept | {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_L2_SIZE": "1"}
    assert environment.cleaned(kept) == kept
    assert environment.cleaned(slowed) == kept | {
        environment.REMOVED: "OPENBLAS_CORETYPE=Haswell OPENBLAS_L2_SIZE=1",
    }


def test_restart_keeps_arguments_and_exit_code(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "compare", str(tmp_path / "none.json")]
    slowed = os.environ | {"OPENBLAS_CORETYPE": "Prescott"}
    done = subprocess.run(command, cwd=ROOT, env=slowed, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no file" in done.stderr


# The random streams


def test_stream_cases_are_measured():
    for case in cases(SMALL, B=2):
        assert len(measure(case, pairs=2)) == 2
    assert len(list(cases(SMALL, B=2))) == 3


def test_mask_sizes_of_a_step():
    """In the book's run a step's masks are 18 times one block's attention probabilities in size."""
    sizes = [np.prod(shape) for shape in mask_shapes(GPTConfig(), B=2)]
    assert len(sizes) == 37
    assert round(sum(sizes) / (2 * 12 * 256 * 256)) == 18


def test_different_bits_are_refused():
    wrong = Case("wrong", lambda rng: [rng.uniform((4,), 0, 1)], lambda: [torch.rand(4) + 1])
    with pytest.raises(AssertionError, match="other bits"):
        measure(wrong, pairs=1)
    short = Case("short", lambda rng: [], lambda: [torch.rand(4)])
    with pytest.raises(AssertionError, match="0 arrays"):
        measure(short, pairs=1)
