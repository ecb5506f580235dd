"""The job of the pretrain commands, for any backend: settings -> learner -> training loop -> a run's folder."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from numpy_gpt.config import GPT2_SIZES, GPTConfig
from numpy_gpt.console import Report, one_line
from numpy_gpt.data import CORPORA
from numpy_gpt.errors import InputError
from numpy_gpt.run import TINY, Batches, MakeLearner, Run, Settings, for_tiny, free_folder
from numpy_gpt.tokenizer import decode, encode, get_encoding
from numpy_gpt.train import Learner, Position, train
from numpy_gpt.typing import Params
from numpy_gpt.weights.checkpoint import Header, load_params, read_header

TEMPERATURE = 0.8
"""Of the last sample: a drawn text shows better what was learned than a greedy one, which soon runs in circles."""


def defaults_for(model: str) -> Settings:
    """The settings a run of this model has where no flag says otherwise."""
    return for_tiny if model == "tiny" else Settings(model=model)


def encoding_of(header: Header) -> str:
    """The name of the encoding that a checkpoint was trained with: as it says, else by the size of its vocabulary."""
    by_size = {257: "bytes", 50257: "gpt2"}
    name = header.about.get("encoding") or by_size.get(header.config.vocab_size)
    if name is None:
        raise InputError(
            f"{header.file} does not name its encoding, and none here has {header.config.vocab_size} tokens"
        )
    return name


def pretrain(
    flags: dict[str, Any],
    make_learner: MakeLearner,
    backend: str,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    init: Path | None = None,
    save_freq: int | None = None,
) -> bool:
    """Run the job to its end (True), or to a first Ctrl-C (False); either way the run's folder is complete.

    flags: the settings that were asked for by name; the rest follow the model, the checkpoint in init, or the run in
    resume. backend: a line about what does the arithmetic. Raises InputError before anything is written.
    """
    if resume is not None and (init is not None or out is not None):
        raise InputError("--resume goes on in the run's own folder and weights: leave out --init and --out")
    flags = flags | {"text": _whole_path(flags["text"])} if "text" in flags else flags
    params: Params | None = None
    run: Run | None = None
    if resume is not None:
        run = Run.open(resume)
        settings = replace(run.settings, **flags)
        batches = Batches(settings)
        config, params = load_params(resume)
    elif init is not None:
        header = read_header(init)
        settings = _settings_for(header, flags)
        config = replace(header.config, drop_rate=settings.drop_rate)
        if (words := get_encoding(settings.encoding).n_vocab) != config.vocab_size:
            raise InputError(
                f"{init} has a vocabulary of {config.vocab_size}, the encoding {settings.encoding} one of {words}: "
                "choose its own --encoding"
            )
        batches = Batches(settings)
        params = load_params(init, np.float32)[1]
    else:
        settings = replace(defaults_for(flags.get("model", "tiny")), **flags)
        batches = Batches(settings)
        config = settings.config(batches.encoding.n_vocab)
    prompt = encode(batches.encoding, settings.prompt)[None]
    if not prompt.size:
        raise InputError("the --prompt is empty: give at least one character to go on from")

    total_steps = batches.total_steps(settings)
    if run is None:
        position, state = Position(), None
        run = Run.create(out or free_folder(settings), settings, batches.text)
    else:
        position, state = run.resume(settings, batches.text)
    report = Report()
    _describe(report, backend, settings, config, batches, run, total_steps)
    learner = make_learner(config, settings, total_steps, params)
    if state is not None:
        learner.restore(state)
        report.line(f"resumed   after step {position.step - 1}, {max(0, total_steps - position.step)} to go")

    def sample(temperature: float = 0.0) -> str:
        return one_line(decode(batches.encoding, learner.sample(prompt, settings.sample_tokens, temperature)[0]))

    report.line()
    if position.step == 0:
        report.line(f"untrained: {sample()}")
    interrupted = _train(report, learner, run, batches, config, settings, position, total_steps, save_freq, sample)
    run.save(config, learner, position)
    plot = run.plot(batches.batches_per_epoch)
    if position.step:
        report.line(f"drawn at temperature {TEMPERATURE}: {sample(TEMPERATURE)}")
    report.line()
    if interrupted:
        report.line(f"Stopped after step {position.step - 1}; all of it is saved. Go on with: --resume {run.folder}")
    report.line(f"Saved {run.folder}: checkpoint, losses.csv, {plot.name}")
    return not interrupted


def _train(
    report: Report,
    learner: Learner,
    run: Run,
    batches: Batches,
    config: GPTConfig,
    settings: Settings,
    position: Position,
    total_steps: int,
    save_freq: int | None,
    sample: Any,
) -> bool:
    """The loop with its reports and saves; True if a signal ended it early."""
    loaders = batches.loaders(learner)
    # In small products the BLAS threads wait for one another longer than they work, and on a busy machine much longer
    threads = threadpool_limits(1 if config.emb_dim < 256 else None, user_api="blas")
    with threads, _signals() as received, report.training(total_steps, position.step, position.tokens_seen):
        for step in train(learner, *loaders, total_steps, settings.eval_freq, settings.eval_iter, position):
            if step.evaluation is not None:
                run.append(step, report.seconds)
            report.step(step)
            if step.epoch_ended or position.step == total_steps:
                report.line(f"after epoch {step.epochs:.3g}: {sample()}")
            if received:
                return True
            if save_freq and position.step % save_freq == 0 and position.step < total_steps:
                run.save(config, learner, position)
    return False


def _settings_for(header: Header, flags: dict[str, Any]) -> Settings:
    """The settings of a run from a checkpoint's weights; InputError if a flag asks for another model than it is."""
    config = header.config
    sizes = {"tiny": TINY} | GPT2_SIZES
    model = next((name for name, size in sizes.items() if all(getattr(config, k) == v for k, v in size.items())), "")
    fixed = {
        "model": model or f"{config.n_layers}x{config.emb_dim}",
        "context_length": config.context_length,
        "tie_weights": config.tie_weights,
        "qkv_bias": config.qkv_bias,
    }
    for name, value in fixed.items():
        if flags.get(name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{header.file} is a checkpoint of another configuration: its {flag} is {value}, not {flags[name]}; "
                "leave the flag out, or choose another --init"
            )
    base = defaults_for(flags.get("model", model or "tiny"))
    return replace(base, **{"encoding": encoding_of(header)} | flags | fixed)


def _whole_path(text: str) -> str:
    return text if text in CORPORA else str(Path(text).resolve())  # so that a run can be resumed from elsewhere


def _describe(
    report: Report, backend: str, s: Settings, config: GPTConfig, batches: Batches, run: Run, total_steps: int
) -> None:
    from numpy_gpt.model import parameter_shapes

    parameters = sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())
    report.line(backend)
    report.line(
        f"model     {s.model}: {parameters:,} parameters, {config.n_layers} layers × {config.emb_dim}, "
        f"{config.n_heads} heads, context {config.context_length}, dropout {config.drop_rate:g}"
    )
    report.line(f"text      {s.text}: {len(batches.text):,} characters, {batches.tokens:,} tokens ({s.encoding})")
    report.line(
        f"batches   {s.batch_size} × {s.context_length} tokens; {batches.train_tokens:,} tokens an epoch, "
        f"{batches.val_tokens:,} for validation; {total_steps:,} steps"
    )
    report.line(f"run       {run.folder}")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects a first SIGINT or SIGTERM, so that a step is never cut; a second one acts as it always does."""
    received: list[int] = []
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for each in before:
        signal.signal(each, receive)
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
