"""The GPU's path without a GPU: on meta tensors, which hold no data, on the CPU, and with a pretended card."""

import json
import math
import weakref
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import cli, machine, results, settings
from benchmarks.cards import PEAKS, peaks
from benchmarks.contenders import agreement
from benchmarks.contenders.torch_backends import TorchBackend, Way, gpu_ways
from benchmarks.jobs import Job, batches, text_for
from benchmarks.measure import ceilings, decode, forward, gpu, memory, step
from benchmarks.results import Report, Row, draw
from benchmarks.settings import Settings
from benchmarks.timing import Spread
from numpy_gpt import GPT, GPTConfig
from numpy_gpt.cli.info import forward_flops
from numpy_gpt.errors import DivergedError, InputError
from parity_tests.judge import learners
from torch_gpt.train import TorchLearner, check_compiler, check_dtype

CONFIG = GPTConfig(vocab_size=60, context_length=8, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.1)
JOB = Job("tiny", CONFIG, B=2, T=8)
PARAMS = GPT(CONFIG, 123).params
HERE = [
    *(Way("book", "cpu:0", "float32"), Way("tuned", "cpu:0", "float32")),
    *(Way("book", "cpu:0", "TF32"), Way("tuned", "cpu:0", "bf16")),
]
"""Ways on a device that torch knows as the CPU, under names of their own."""

A100 = "NVIDIA A100-SXM4-40GB"


@pytest.fixture
def batch():
    return next(batches(JOB, text_for(60)))


@pytest.fixture
def card(monkeypatch, tmp_path):
    """Pretends a card to torch.cuda; what is asked about its memory is noted."""
    asked = []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '550.54.15\\n550.54.15\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setattr("shutil.which", {"nvidia-smi": str(tool)}.get)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    here = SimpleNamespace(name=A100, capability=(8, 0), asked=asked, tool=tool)
    for name, answer in {
        "is_available": lambda: True,
        "get_device_name": lambda: here.name,
        "get_device_properties": lambda index: SimpleNamespace(total_memory=42_000_000_000),
        "get_device_capability": lambda: here.capability,
        "reset_peak_memory_stats": lambda: asked.append("reset"),
        "max_memory_allocated": lambda: asked.append("peak") or 3_000_000_000,
        "empty_cache": lambda: asked.append("empty"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return here


# Ways and backends


def test_gpu_ways():
    assert [str(way) for way in gpu_ways("mps")][:2] == ["PyTorch, book's, mps float32", "PyTorch, tuned, mps float32"]
    assert {way.precision for way in gpu_ways("mps")} == {"float32", "bf16"}
    names = [str(way) for way in gpu_ways("cuda")]
    models = ("book's", "tuned", "tuned, compiled")
    assert names == [f"PyTorch, {model}, cuda {p}" for p in ("float32", "TF32", "bf16") for model in models]


@pytest.mark.parametrize("precision", ["float32", "TF32"])
@pytest.mark.parametrize("style", ["book", "tuned"])
def test_backend_on_meta(style, precision, batch):
    backend = TorchBackend(Way(style, "meta", precision), CONFIG, PARAMS)
    assert {p.device.type for p in backend.model.parameters()} == {"meta"}
    backend.touch_every_row()
    loss = backend.step(*map(backend.tensor, batch), dropout=True)
    backend.synchronise()
    assert (loss.device.type, loss.shape) == ("meta", ())
    assert backend.forward(batch[0]).shape == (2, 8, 60)


@pytest.mark.parametrize("style", ["book", "tuned"])
def test_fused_adamw_is_the_tuned_models(style):
    group = TorchBackend(Way(style), CONFIG, PARAMS)._optimizer.param_groups[0]
    assert group["fused"] == (style == "tuned")


@pytest.mark.parametrize("precision", ["TF32", "bf16"])
def test_precision_by_parameter(precision, batch):
    """bf16 also rounds on the CPU: within its own bound, far outside float32's. The global setting is restored."""
    before = torch.get_float32_matmul_precision()
    backend = TorchBackend(Way("tuned", "cpu", precision), CONFIG, PARAMS)
    errors = agreement.check(backend, CONFIG, *batch, agreement.truth(CONFIG, PARAMS, *batch))
    assert torch.get_float32_matmul_precision() == before
    assert (errors.gradient > 1e-4) == (precision == "bf16")
    backend.step(*batch, dropout=True)


@pytest.mark.parametrize(("precision", "want"), [("float32", "highest"), ("TF32", "high"), ("bf16", "highest")])
def test_both_passes_run_in_the_ways_precision(precision, want, batch):
    """Backward's products read the process's setting when they run, not the one of their forward pass."""
    backend, seen = TorchBackend(Way("tuned", "cpu", precision), CONFIG, PARAMS), []
    head = backend.model.out_head

    def note(*arguments):
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))

    head.register_forward_hook(note)
    head.register_full_backward_pre_hook(note)
    backend.step(*batch, dropout=False)
    assert seen == [(want, precision == "bf16"), (want, False)]


def test_a_backends_tensors_are_not_copied(batch):
    backend = TorchBackend(Way("tuned"), CONFIG, PARAMS)
    x = backend.tensor(batch[0])
    assert backend.tensor(x) is x


# Cards

CHIPS = {  # NVIDIA's white papers: SMs; float32 lanes per SM, boost GHz; bf16 operations per SM and clock, their GHz
    A100: (108, 64, 1.41, 2048, 1.41),
    "NVIDIA H100 80GB HBM3": (132, 128, 1.98, 4096, 1.83),
    "NVIDIA H200": (132, 128, 1.98, 4096, 1.83),
    "NVIDIA H100 PCIe": (114, 128, 1.755, 4096, 1.62),
    "NVIDIA L4": (58, 128, 2.04, 1024, 2.04),
    "NVIDIA GeForce RTX 3090": (82, 128, 1.695, 512, 1.695),
    "NVIDIA GeForce RTX 4090": (128, 128, 2.52, 512, 2.52),
    "Tesla T4": (40, 64, 1.59, 0, 0),
    "Tesla V100-SXM2-16GB": (80, 64, 1.53, 0, 0),
    "Tesla V100-PCIE-16GB": (80, 64, 1.38, 0, 0),
}


@pytest.mark.parametrize(("name", "chip"), CHIPS.items())
def test_peaks_are_the_chips_dense_rates(name, chip):
    """A lane multiplies and adds once a clock; TF32 has half the rate of bf16. With sparsity all would be double."""
    sms, lanes, clock, operations, tensor_clock = chip
    rates = {"float32": sms * lanes * 2 * clock / 1e3}
    if operations:
        bf16 = sms * operations * tensor_clock / 1e3
        rates |= {"TF32": bf16 / 2, "bf16": bf16}
    assert peaks(name) == pytest.approx(rates, rel=0.015)


@pytest.mark.parametrize(
    "name",
    [
        *("NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA L40", "NVIDIA L40S", "NVIDIA A10", "Quadro T400"),
        *("NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"),
        *("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "Tesla V100S-PCIE-32GB", "Apple GPU (MPS)", "", None),
    ],
)
def test_other_cards_have_no_peak(name):
    assert peaks(name) is None


def test_every_card_of_the_table_is_tested():
    assert [rates for rates in PEAKS.values() if rates not in [peaks(name) for name in CHIPS]] == []
    assert peaks("A100-PCIE-40GB") == peaks("NVIDIA A100 80GB PCIe") == peaks(A100)


# The machine, and the ways on it


def test_machine_names_card_driver_and_versions(card):
    line = machine.machine()
    assert f"torch {torch.__version__}" in line
    assert line.endswith(f"; {A100}, 42 GB, driver 550.54.15, CUDA 12.6")
    details = machine.details()
    assert details["line"] == line
    assert (details["gpu"], details["gpu_driver"], details["cuda"], details["gpu_GB"]) == (
        A100,
        "550.54.15",
        "12.6",
        42,
    )
    assert details["gpu_peaks"] == {"float32": 19.5, "TF32": 156, "bf16": 312}


@pytest.mark.parametrize("broken", ["no tool", "fails"])
def test_unknown_driver(card, broken, monkeypatch):
    if broken == "fails":
        card.tool.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    else:
        monkeypatch.setattr("shutil.which", lambda name: None)
    assert machine.machine().endswith("driver unknown, CUDA 12.6")


def ways_here(monkeypatch, device="cuda", compiler=lambda device: None):
    said = []
    monkeypatch.setattr(settings, "choose_device", lambda: torch.device(device))
    monkeypatch.setattr(settings, "check_compiler", compiler)
    return settings.gpus_here(said.append), said


def test_ways_on_a_new_card(card, monkeypatch):
    assert ways_here(monkeypatch) == ((gpu_ways("cuda"), {}), [])


def test_ways_on_a_card_without_tf32_and_bf16(card, monkeypatch):
    card.capability = (7, 5)
    (here, absent), said = ways_here(monkeypatch)
    assert here == [way for way in gpu_ways("cuda") if way.precision == "float32"]
    assert set(absent.values()) == {"this GPU has no TF32", "this GPU has no bf16"}
    assert len(here) + len(absent) == 9
    assert said == []


def test_ways_without_a_compiler(card, monkeypatch):
    def fails(device):
        raise InputError("no C compiler")

    (here, absent), said = ways_here(monkeypatch, compiler=fails)
    assert here == [way for way in gpu_ways("cuda") if not way.compiled]
    assert absent == {way: "torch.compile fails on this GPU" for way in gpu_ways("cuda") if way.compiled}
    assert said == ["without the compiled model on the GPU: no C compiler"]


def test_ways_without_cuda(monkeypatch):
    absent = dict.fromkeys(gpu_ways("cuda"), "not measured here")
    assert ways_here(monkeypatch, "cpu") == (([], absent), [])
    assert ways_here(monkeypatch, "mps") == ((gpu_ways("mps"), absent), [])


# Measurements


def work(job=JOB, check=lambda backend: {"grad error": 1e-7}, steps=None):
    def one(backend, batch):
        if steps is not None:
            steps.append(batch)
        return backend.step(*batch, dropout=False)

    stream = batches(job, text_for(60))
    return gpu.Work(job, PARAMS, [next(stream) for _ in range(3)], check, one, flops=1_000_000)


def test_a_round_is_several_steps_on_batches_in_place(card):
    steps = []
    task = work(steps=steps, check=lambda backend: card.asked.append("check") or {"grad error": 1e-7})
    found = gpu.measure(task, Settings(runs=4, gpus=[Way("tuned", "cpu:0", "bf16")]), Report())
    measured = found["PyTorch, tuned, cpu:0 bf16"]
    assert len(measured.results) == len(steps) == gpu.STEPS * (2 + 4)
    assert len({id(batch) for batch in steps}) == 3, "the same tensors in each turn"
    assert all(isinstance(ids, torch.Tensor) for ids in steps[0])
    assert card.asked == ["check", "reset", "peak", "empty"]
    median = Spread.of(measured.seconds).median
    assert len(measured.seconds) == 4
    rate = JOB.B * JOB.T / median
    want = {"tokens/s": rate, "grad error": 1e-7, "MFU": rate * 1e6 / 312e12, "GPU GB": 3.0}
    assert measured.figures == pytest.approx(want)


def test_seconds_are_per_step_and_end_with_the_gpus(monkeypatch):
    """On a clock that stands still except in a step (2 s) and in the wait for the GPU (10 s)."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: clock.now)
    monkeypatch.setattr("benchmarks.timing.settle", lambda: None)

    def passes(seconds):
        def wait(*arguments, **options):
            clock.now += seconds

        return wait

    monkeypatch.setattr(TorchBackend, "step", passes(2))
    monkeypatch.setattr(TorchBackend, "synchronise", passes(10))
    (measured,) = gpu.measure(work(), Settings(runs=2, gpus=[Way("book", "cpu:0")]), Report()).values()
    assert measured.seconds == [2 + 10 / gpu.STEPS] * 2


def test_unknown_card_has_no_mfu(card):
    card.name = "NVIDIA B9000"
    (measured,) = gpu.measure(work(), Settings(runs=1, gpus=[Way("book", "cpu:0")]), Report()).values()
    assert measured.figures.keys() == {"tokens/s", "grad error", "GPU GB"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_is_that_rows_note(error, card, monkeypatch):
    real, backends = TorchBackend.step, []

    def fails(self, *arguments, **options):
        backends.append(weakref.ref(self))
        if self.precision == "TF32":
            raise type(error)(*error.args)  # another, since one that is kept keeps the backend too
        return real(self, *arguments, **options)

    monkeypatch.setattr(TorchBackend, "step", fails)
    found = gpu.measure(work(), Settings(runs=1, gpus=HERE[1:]), Report())
    assert [each.note for each in found.values()] == ["", "out of GPU memory", ""]
    assert found["PyTorch, book's, cpu:0 TF32"].row("case", "name").seconds is None
    assert card.asked.count("empty") == 3
    assert [ref() for ref in backends if ref() is not None] == [], "memory is returned before the next way"


def test_other_errors_are_not_taken_for_a_full_gpu(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(TorchBackend, "step", fails)
    with pytest.raises(RuntimeError, match="illegal"):
        gpu.measure(work(), Settings(runs=1, gpus=HERE[:1]), Report())


@pytest.mark.parametrize("form", step.FORMS)
def test_dropout_is_on_in_its_form_only(form, batch):
    asked = []
    backend = SimpleNamespace(step=lambda x, y, dropout: asked.append((x, y, dropout)))
    step._work(JOB, form, PARAMS, batch, None, [batch]).step(backend, batch)
    assert [dropout for *_, dropout in asked] == [form == "dropout 0.1"]


@pytest.fixture
def posing(monkeypatch):
    """Runs the commands on the tiny model, with the CPU in the GPU's place."""
    for module in (step, forward, decode, memory):
        for name in ("QUICK_BOOK", "QUICK_LONG", "QUICK_SMALL", "QUICK_GPU"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replace(JOB, B=4) if name == "QUICK_GPU" else JOB)
    monkeypatch.setattr(ceilings.LongArray, "__init__", lambda self, size: setattr(self, "bytes", 1))
    monkeypatch.setattr(ceilings.LongArray, "read", lambda self: None)
    absent = {Way("tuned", "cuda", "bf16", compiled=True): "torch.compile fails on this GPU"}
    monkeypatch.setattr(cli, "gpus_here", lambda tell: (HERE, absent))


def run(command, out):
    return CliRunner().invoke(cli.main, [command, "--quick", "--runs", "1", "--out", str(out)])


@pytest.mark.parametrize("command", ["step", "forward"])
def test_commands_on_a_gpu(command, posing, card, tmp_path):
    """A training step counts three times the forward pass's operations."""
    done = run(command, tmp_path)
    assert done.exit_code == 0, done.output
    assert "no MFU" not in done.stdout
    document = json.loads((tmp_path / f"{command}-quick.json").read_text())
    cases = {}
    for row in document["rows"]:
        cases.setdefault(row["name"], {})[row["backend"]] = row
    first = next(iter(cases.values()))
    error = "grad error" if command == "step" else "logit error"
    for way in HERE:
        row = first[str(way)]
        assert row["seconds"]["median"] > 0
        bounds = {"float32": (0, 1e-5), "TF32": (0, 1e-2), "bf16": (1e-4, 0.1)}[way.precision]
        assert bounds[0] < row["figures"][error] < bounds[1]
        assert "of products" not in row["figures"], "a share of the CPU's rate"
        seconds = row["seconds"]["median"]
        flops = {"step": 3, "forward": 1}[command] * JOB.B * JOB.T * forward_flops(CONFIG, JOB.T)
        assert row["figures"]["MFU"] == pytest.approx(flops / seconds / (1e12 * peaks(A100)[way.precision]))
        assert row["figures"]["GPU GB"] == 3
        ratio = first["NumPy"]["ratios"][f"NumPy / {way}"]["ratio"]
        assert ratio == pytest.approx(first["NumPy"]["seconds"]["median"] / seconds)
    assert first["PyTorch, tuned, compiled, cuda bf16"]["note"] == "torch.compile fails on this GPU"
    assert "torch.compile fails on this GPU: PyTorch, tuned, compiled, cuda bf16" in done.stdout
    if command == "step":
        by_form = [{str(way) for way in HERE} & set(rows) for rows in cases.values()]
        assert [len(names) for names in by_form] == [4, 4, 0, 4]
        larger = cases["step, tiny, B=4, T=8, dropout 0"]
        assert larger.keys() == {*map(str, HERE), "PyTorch, tuned, compiled, cuda bf16"}
    file = str(tmp_path / f"{command}-quick.json")
    done = CliRunner().invoke(cli.main, ["compare", file, "--baseline", file])
    assert (done.exit_code, "held" in done.output) == (0, True), done.output


def test_unknown_card_is_reported(posing, card, tmp_path):
    card.name = "NVIDIA B9000"
    done = run("forward", tmp_path)
    assert "no MFU: the peak of NVIDIA B9000 is not in benchmarks/cards.py" in done.stdout
    assert '"MFU"' not in (tmp_path / "forward-quick.json").read_text()


def test_training_on_the_gpu_must_agree_with_numpys(posing, monkeypatch, tmp_path):
    real = TorchBackend.step

    def idle(self, *arguments, **options):
        loss = real(self, *arguments, **options)
        return loss * 1.02 if "cpu:0 float32" in self.name and "tuned" in self.name else loss

    monkeypatch.setattr(TorchBackend, "step", idle)
    done = run("step", tmp_path)
    assert (done.exit_code, "PyTorch, tuned, cpu:0 float32: the loss of step 0" in done.stderr) == (1, True), (
        done.output
    )


def test_wrong_gradient_on_the_gpu_is_refused(posing, monkeypatch, tmp_path):
    real = TorchBackend.loss_and_grads

    def wrong(self, *arguments):
        loss, grads = real(self, *arguments)
        return loss, grads | ({"out_head.weight": -grads["out_head.weight"]} if "cpu:0 bf16" in self.name else {})

    monkeypatch.setattr(TorchBackend, "loss_and_grads", wrong)
    done = run("step", tmp_path)
    assert (done.exit_code, "cpu:0 bf16: d out_head.weight is off" in done.stderr) == (1, True), done.output


# The table and the plot


def gpu_rows():
    spread, case = Spread(0.0252, 0.025, 0.026, 0.0244, 0.0265), "step, 124M, B=2, T=256, dropout 0"
    figures = {"tokens/s": 20_317.0, "grad error": 3.1e-7, "loss error": 1e-8}
    rows = [Row(case, "NumPy", Spread(2.97, 2.9, 3.0, 2.8, 3.2), figures | {"of products": 0.8})]
    rows += [Row(case, str(way), spread, figures | {"MFU": 0.413, "GPU GB": 11.1}) for way in gpu_ways("cuda")]
    return [*rows, Row(case, "PyTorch, book's, mps float32", note="out of GPU memory")]


def test_table_shows_every_figure_at_the_width_of_a_file():
    report = Report()
    with report.console.capture() as captured:
        report.add(gpu_rows())
    lines = captured.get().splitlines()
    compiled = next(line for line in lines if "compiled, cuda float32" in line)
    assert compiled.split()[-8:] == ["25.2", "ms", "24.4–26.5", "20,317", "41.3%", "3.1e-07", "1.0e-08", "11.10"]
    assert "…" not in captured.get()
    assert "out of GPU memory: PyTorch, book's, mps float32" in captured.get()


def test_plot_has_the_errors_and_fits_its_labels(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    kept, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: kept.append(self) or save(self, *args, **options)
    )
    draw(tmp_path / "plot.png", gpu_rows(), "a machine")
    kept[0].canvas.draw()  # at the figure's own resolution, which the extents below are in
    (axes,) = kept[0].axes
    assert axes.get_xscale() == "log", "2.97 s beside 25.2 ms"
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["2.97 s, error 3.1e-07"] + 9 * ["25.2 ms, error 3.1e-07, MFU 41.3%"]
    right = axes.get_window_extent().x1
    assert all(text.get_window_extent().x1 < right + 5 for text in axes.texts)
    boxes = [tick.get_window_extent() for tick in axes.get_yticklabels()]
    assert min(box.x0 for box in boxes) >= 0
    assert all(a.y0 >= b.y1 for a, b in pairwise(boxes)), "one under the other"


def test_plot_of_like_medians_is_linear(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: kept.append(self))
    draw(tmp_path / "plot.png", gpu_rows()[1:], "a machine")
    assert kept[0].axes[0].get_xscale() == "linear"
    assert results.colour("PyTorch, tuned, cuda bf16") != results.colour("PyTorch, tuned")


# torch_gpt

LEARNER = learners.CONFIG
IDS = np.arange(12).reshape(2, 6)


def learner(device, dtype="float32", **options):
    return TorchLearner(LEARNER, learners.SETTINGS, 60, device=torch.device(device), dtype=dtype, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("attention", ["plain", "sdpa"])
def test_training_step_on_meta(dtype, attention, monkeypatch):
    """Forward, backward, clipping, AdamW and evaluation, all on the device; numbers are only read from it."""
    asked = []

    def autocast(*arguments, enabled):  # torch has none for meta tensors
        asked.append((*arguments, enabled))
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)
    on_meta = learner("meta", dtype, attention=attention)
    assert on_meta.train_step(IDS, IDS + 1, 0) == (1.0, pytest.approx(learners.SETTINGS.lr / 3))
    assert on_meta.loss(IDS, IDS + 1) == 1.0
    assert asked == 2 * [("meta", torch.bfloat16, dtype == "bfloat16")]
    want = torch.float64 if dtype == "float64" else torch.float32
    for p in on_meta.model.parameters():
        kept = [p, p.grad, on_meta.optimizer.state[p]["exp_avg"], on_meta.optimizer.state[p]["exp_avg_sq"]]
        assert {(x.device.type, x.dtype) for x in kept} == {("meta", want)}


def test_autocast_on_the_cpu_rounds_products_but_not_parameters():
    losses = {}
    for dtype in ("float64", "float32", "bfloat16"):
        one = learner("cpu", dtype)
        losses[dtype] = one.train_step(IDS, IDS + 1, 0)[0]
    assert {p.dtype for p in one.model.parameters()} == {torch.float32}
    errors = {dtype: abs(losses[dtype] / losses["float64"] - 1) for dtype in ("float32", "bfloat16")}
    assert errors["float32"] < 1e-6 < 1e-5 < errors["bfloat16"] < 2**-7


def test_dtypes_of_a_card(card, monkeypatch):
    check_dtype("float64", torch.device("cuda"))
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: True)
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        if supported:
            check_dtype("bfloat16", torch.device("cuda"))
            continue
        with pytest.raises(InputError, match="cuda has no bfloat16"):
            check_dtype("bfloat16", torch.device("cuda"))


@pytest.fixture
def card_generator(monkeypatch):
    """A CUDA generator in torch.cuda's place: 16 bytes of state per device."""
    states = {"cuda:1": torch.arange(16, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[str(device)].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({str(device): state.clone()}))
    return states


def on_card(one):
    """The learner, on the CPU, but with the generator of the second card."""
    one._device = torch.device("cuda:1")
    return one


def test_cards_generator_is_saved_and_restored(card_generator):
    saved = on_card(learner("cpu")).state()
    np.testing.assert_array_equal(saved["rng.cuda"], np.arange(16))
    assert "rng.cuda" not in learner("cpu").state()
    card_generator["cuda:1"] += 100
    on_card(learner("cpu")).restore(saved)
    assert card_generator["cuda:1"].tolist() == list(range(16))
    card_generator["cuda:1"] += 100
    on_card(learner("cpu")).restore({name: value for name, value in saved.items() if name != "rng.cuda"})
    assert card_generator["cuda:1"].tolist() == list(range(100, 116)), "a CPU's checkpoint leaves it as it is"


@pytest.mark.parametrize("state", [np.zeros(15, np.uint8), np.zeros(16, np.int64), np.zeros((16, 1), np.uint8)])
def test_unusable_state_of_a_cards_generator_is_refused(state):
    saved = learner("cpu").state()
    with pytest.raises(InputError, match="no usable GPU random state"):
        learner("cpu").restore(saved | {"rng.cuda": state})


def test_diverged_step_returns_the_cards_draws(card_generator, monkeypatch):
    one = on_card(learner("cpu"))

    def draws(x, y):
        card_generator["cuda:1"] += 1
        return next(iter(one.model.parameters())).sum() * math.nan

    monkeypatch.setattr(one, "_forward", draws)
    with pytest.raises(DivergedError):
        one.train_step(IDS, IDS + 1, 0)
    assert card_generator["cuda:1"].tolist() == list(range(16))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch deprecates
def test_compiled_models_agree_and_stay_compiled(batch):
    """Each keeps its own code: with room for two variants (evaluation, training), none is run eagerly instead."""
    try:
        check_compiler(torch.device("cpu"))
    except InputError as error:
        pytest.skip(str(error))
    want = agreement.truth(CONFIG, PARAMS, *batch)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for precision in ("float32", "bf16"):
            backend = TorchBackend(Way("tuned", "cpu", precision, compiled=True), CONFIG, PARAMS)
            assert (agreement.check(backend, CONFIG, *batch, want).gradient > 1e-4) == (precision == "bf16")
            agreement.check_logits([backend], CONFIG, PARAMS, batch[0])
            backend.step(*batch, dropout=True)
