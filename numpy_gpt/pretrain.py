"""The job of the pretrain commands, for any backend: settings -> learner -> training loop -> a run's folder."""

import hashlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from numpy_gpt.config import GPT2_SIZES, GPTConfig
from numpy_gpt.console import Report, one_line
from numpy_gpt.data import CORPORA, Loader
from numpy_gpt.errors import InputError
from numpy_gpt.model import parameter_shapes
from numpy_gpt.random import Generator
from numpy_gpt.run import TINY, Batches, MakeLearner, Run, Settings, for_tiny, free_folder
from numpy_gpt.tokenizer import ENCODINGS, GPT2_FILES, decode, encode, get_encoding
from numpy_gpt.train import Learner, Position, train, undrawn_loss
from numpy_gpt.weights.checkpoint import Header, load_params, read_header
from numpy_gpt.weights.stored import Weights

TEMPERATURE = 0.8
"""Of the last sample: a drawn text shows better what was learned than a greedy one, which soon runs in circles."""


def defaults_for(model: str) -> Settings:
    """The settings a run of this model has where no flag says otherwise."""
    return for_tiny if model == "tiny" else Settings(model=model)


def encoding_of(header: Header) -> str:
    """The encoding that a checkpoint was trained with, as get_encoding takes it: its name, or the folder it lies in.

    As the checkpoint says (a folder as seen from its own), else by the size of its vocabulary.
    """
    by_size = {257: "bytes", 50257: "gpt2"}
    name = header.about.get("encoding") or by_size.get(header.config.vocab_size)
    if name is None:
        raise InputError(
            f"{header.file} does not name its encoding, and none here has {header.config.vocab_size} tokens"
        )
    if name in ENCODINGS:
        return name
    folder = (header.file.parent / name).resolve()
    if not folder.is_dir():
        raise InputError(f"{header.file} has its vocabulary in {folder}, which is not there: put it back, or name one")
    words = [(folder / file).read_bytes() for file in sorted(GPT2_FILES) if (folder / file).is_file()]
    known = header.about.get("vocabulary")
    if known and len(words) == len(GPT2_FILES) and known != vocabulary_sha256(words):
        raise InputError(f"the vocabulary in {folder} is not the one that {header.file} came with: put that back")
    return str(folder)


def vocabulary_sha256(files: Sequence[bytes]) -> str:
    """Of encoder.json and vocab.bpe, in this order."""
    return hashlib.sha256(b"\0".join(files)).hexdigest()


@dataclass(frozen=True)
class Job:
    """A run that can begin or go on: its settings, text and model; weights unless they are to be drawn."""

    settings: Settings
    batches: Batches
    config: GPTConfig
    params: Weights | None
    resumed: Run | None

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: its epochs, unless max_steps ends it before."""
        steps = self.settings.epochs * self.batches.batches_per_epoch
        return steps if self.settings.max_steps is None else min(steps, self.settings.max_steps)


def prepare(flags: dict[str, Any], resume: Path | None, init: Path | None) -> Job:
    """The job that flags ask for, with the defaults of the model, of the checkpoint init, or of the run resume.

    Writes nothing. Raises InputError for what cannot be used or does not fit together.
    """
    flags = dict(flags)  # paths become whole ones, so that a run can be resumed from elsewhere
    if flags.get("text", CORPORA[0]) not in CORPORA:
        flags["text"] = str(Path(flags["text"]).resolve())
        try:
            flags["text"].encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the path {flags['text']} is no valid Unicode: give the text another name") from error
    if flags.get("encoding", ENCODINGS[0]) not in ENCODINGS and Path(flags["encoding"]).is_dir():
        flags["encoding"] = str(Path(flags["encoding"]).resolve())
    if resume is not None:
        run = Run.open(resume)
        if not (resume / "checkpoint").is_dir():
            raise InputError(f"{resume} ended before its first save: begin it again with another --out")
        settings = replace(run.settings, **flags)
        config, params = load_params(resume)
        job = Job(settings, Batches(settings), config, params, run)
    elif init is not None:
        header = read_header(init)
        settings = _settings_for(header, flags)
        config = replace(header.config, drop_rate=settings.drop_rate)
        if (words := get_encoding(settings.encoding).n_vocab) != config.vocab_size:
            raise InputError(
                f"{init} has a vocabulary of {config.vocab_size}, the encoding {settings.encoding} one of {words}: "
                "choose its own --encoding"
            )
        job = Job(settings, Batches(settings), config, load_params(init, np.float32)[1], None)
    else:
        settings = replace(defaults_for(flags.get("model", "tiny")), **flags)
        config = settings.config(get_encoding(settings.encoding).n_vocab)
        job = Job(settings, Batches(settings), config, None, None)
    Generator(settings.seed)  # raises for a number that is no seed
    if not settings.prompt:
        raise InputError("the --prompt is empty: give at least one character to go on from")
    return job


def pretrain(
    flags: dict[str, Any],
    make_learner: MakeLearner,
    backend: str,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    init: Path | None = None,
    save_freq: int | None = None,
    keep: int = 1,
) -> bool:
    """Run the job to its end (True), or to a first Ctrl-C (False); either way the run's folder is complete.

    flags: the settings that were asked for by name. backend: a line about what does the arithmetic.
    Raises InputError before anything is written.
    """
    if resume is not None and (init is not None or out is not None):
        raise InputError("--resume goes on in the run's own folder and weights: leave out --init and --out")
    job = prepare(flags, resume, init)
    settings, batches = job.settings, job.batches
    with _signals() as received, ExitStack() as held:
        report = Report()
        if job.resumed is None:
            run, position = Run.create(out or free_folder(settings), settings, batches.sha256), Position()
            held.enter_context(run.locked())
            _describe(report, backend, job, run)
            learner = make_learner(job.config, settings, job.total_steps, job.params)
        else:
            run = job.resumed
            held.enter_context(run.locked())
            position, state = run.resume(settings, batches.sha256)
            learner = make_learner(job.config, settings, job.total_steps, job.params)
            learner.restore(state)
            run.go_on(settings, batches.sha256, position, keep)
            _describe(report, backend, job, run)
            report.line(f"resumed   after {position.step} steps, {max(0, job.total_steps - position.step)} to go")
        report.line()
        loaders = batches.loaders(learner)

        def sample(temperature: float = 0.0) -> str:
            prompt = encode(batches.encoding, settings.prompt)[None]
            return one_line(decode(batches.encoding, learner.sample(prompt, settings.sample_tokens, temperature)[0]))

        def save() -> None:
            run.save(job.config, learner, position, undrawn_loss(learner, loaders[1], settings.eval_iter), keep)

        if position.step == 0:
            report.line(f"untrained: {sample()}" if job.params is None else f"as it comes: {sample()}")
        # In small products the BLAS threads wait for one another longer than they work, on a busy machine much longer
        with threadpool_limits(1 if job.config.emb_dim < 256 else None, user_api="blas"):
            _train(report, learner, loaders, run, job, position, save_freq, received, sample, save)
            save()
        plot = run.plot(batches.batches_per_epoch)
        if position.step:
            report.line(f"drawn at temperature {TEMPERATURE}: {sample(TEMPERATURE)}")
        report.line()
        if position.step < job.total_steps:
            saves = (f" --save-freq {save_freq}" if save_freq else "") + (f" --keep {keep}" if keep > 1 else "")
            report.line(
                f"Stopped after {position.step} steps; all of it is saved. Go on with: --resume {run.folder}{saves}"
            )
        report.line(f"Saved {run.folder}: checkpoint, best, losses.csv, {plot.name}")
    return position.step >= job.total_steps


def _train(
    report: Report,
    learner: Learner,
    loaders: tuple[Loader, Loader],
    run: Run,
    job: Job,
    position: Position,
    save_freq: int | None,
    received: list[int],
    sample: Callable[[], str],
    save: Callable[[], None],
) -> None:
    """The loop with its reports and saves, until it is done or a signal has been received."""
    s, total = job.settings, job.total_steps
    if save_freq and position.step == 0:
        save()  # so that there is one to go on from at any instant
    with report.training(total, position.step, position.tokens_seen):
        for step in train(learner, *loaders, total, s.eval_freq, s.eval_iter, position):
            if step.evaluation is not None:
                run.append(step, report.seconds)
            report.step(step)
            if step.epoch_ended or position.step == total:
                report.line(f"after epoch {step.epochs:.3g}: {sample()}")
            if received:
                return
            if save_freq and position.step % save_freq == 0 and position.step < total:
                save()


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
    encoding = flags.get("encoding") or encoding_of(header)
    return replace(base, **flags | fixed | {"encoding": encoding})


def _describe(report: Report, backend: str, job: Job, run: Run) -> None:
    s, config, batches = job.settings, job.config, job.batches
    parameters = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    report.line(backend)
    report.line(
        f"model     {s.model}: {parameters:,} parameters, {config.n_layers} layers × {config.emb_dim}, "
        f"{config.n_heads} heads, context {config.context_length}, dropout {config.drop_rate:g}"
    )
    report.line(f"text      {s.text}: {len(batches.text):,} characters, {batches.tokens:,} tokens ({s.encoding})")
    report.line(
        f"batches   {s.batch_size} × {s.context_length} tokens; {batches.train_tokens:,} tokens an epoch, "
        f"{batches.val_tokens:,} for validation; {job.total_steps:,} steps"
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
