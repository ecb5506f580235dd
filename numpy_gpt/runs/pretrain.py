"""The job of the pretrain commands, for any backend: settings -> learner -> training loop -> a run's folder."""

import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from numpy_gpt.config import GPTConfig
from numpy_gpt.console import Report, one_line
from numpy_gpt.encodings.vocabulary import CHARACTERS
from numpy_gpt.errors import DivergedError, InputError, LostProcessError, NonFiniteError
from numpy_gpt.io.outermost import say
from numpy_gpt.io.paths import absolute, is_folder, kind_of
from numpy_gpt.parameters import parameter_count
from numpy_gpt.random.generator import Generator
from numpy_gpt.runs.batches import Batches
from numpy_gpt.runs.folder import Run, Validation
from numpy_gpt.runs.saves import BEST, CHECKPOINT
from numpy_gpt.runs.settings import SIZE_NAMES, SIZES, Settings, for_tiny
from numpy_gpt.runs.texts import absolute_texts, find_texts, in_words
from numpy_gpt.runs.token_folders import absolute_folder, find_tokens
from numpy_gpt.tokenizer import (
    CHARS,
    ENCODINGS,
    GPT2_FILES,
    decode,
    encode,
    folder_files,
    get_encoding,
    least_vocab_size,
    vocabulary_sha256,
)
from numpy_gpt.tokens.folder import Track, tokens_encoding
from numpy_gpt.train import Learner, Position, Step, train, undrawn_loss
from numpy_gpt.typing import Weights
from numpy_gpt.weights.checkpoint import MODEL_FILE, Header, load_params, read_header

TEMPERATURE = 0.8
"""Of the last sample: sampled text shows what was learned better than greedy text, which soon repeats itself."""


def defaults_for(model: str) -> Settings:
    """The settings a run of this model has where no flag says otherwise."""
    return for_tiny if model == "tiny" else Settings(model=model)


def encoding_of(header: Header) -> str:
    """Return a checkpoint's encoding as get_encoding takes it: a name, or the folder of a vocabulary.

    The checkpoint names it (a folder relative to its own); without a name, the vocabulary size decides.
    """
    by_size = {257: "bytes", 50257: "gpt2"}
    name = header.about.get("encoding") or by_size.get(header.config.vocab_size)
    if name is None:
        raise InputError(
            f"{header.file} does not name its encoding, and none is known with {header.config.vocab_size} tokens"
        )
    if name in ENCODINGS:
        return name
    folder = header.file.parent / name
    if kind_of(folder) == "folder":
        folder = folder.resolve()
    else:
        raise InputError(f"{header.file}: vocabulary not found in {folder}: restore it, or pass --encoding DIR")
    words = folder_files(folder)
    known = header.about.get("vocabulary")
    if known and (CHARACTERS in words or words.keys() >= GPT2_FILES.keys()) and known != vocabulary_sha256(words):
        raise InputError(f"the vocabulary in {folder} is not the one that {header.file} came with: restore that one")
    return str(folder)


LARGEST_UPDATE = 1e37
"""Limit on the learning rate, and on its product with the weight decay: below it no single step takes float32 weights
to infinity, which only the next loss would show."""


class MakeLearner(Protocol):
    """How a backend makes its learner: new weights from settings.seed, or the given params."""

    def __call__(self, config: GPTConfig, settings: Settings, total_steps: int, params: Weights | None) -> Learner: ...


@dataclass(frozen=True)
class Job:
    """A run ready to begin or resume: settings, text and model, and weights unless new ones are to be drawn."""

    settings: Settings
    batches: Batches
    config: GPTConfig
    params: Weights | None
    resumed: Run | None
    cap: str | None
    """Why the run ends before the steps or epochs requested; None if it does not."""

    @property
    def total_steps(self) -> int:
        """Steps of the complete run: all its epochs, or max_steps if that is fewer."""
        return _total_steps(self.settings, self.batches)


def _total_steps(settings: Settings, batches: Batches) -> int:
    steps = settings.epochs * batches.batches_per_epoch
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def prepare(
    flags: dict[str, Any], resume: Path | None, init: Path | None, processes: int = 1, track: Track = iter
) -> Job:
    """The job that the flags describe, with defaults from the model, the checkpoint `init` or the run `resume`.

    processes: number of those that share each batch. track: shows the progress of checking tokens.

    Writes nothing. Raises InputError for unusable or contradictory input.
    """
    flags = dict(flags)  # its paths become absolute, so that a run can be resumed from any folder
    if "text" in flags:
        flags["text"] = absolute_texts(flags["text"])
    if "tokens" in flags:
        flags["tokens"] = absolute_folder(flags["tokens"])
    if flags.get("encoding", CHARS) not in (*ENCODINGS, CHARS) and is_folder(flags["encoding"]):
        flags["encoding"] = str(absolute(flags["encoding"]))
    run, params = None, None
    if resume is not None:
        run = Run.open(resume)
        config, params = load_params(run.to_resume)
        settings = replace(run.settings, **flags)
        if settings.encoding not in ENCODINGS and "encoding" not in flags and not is_folder(settings.encoding):
            raise InputError(
                f"{settings.encoding}, the vocabulary of {run.folder}, was not found: restore it, or pass its folder "
                "with --encoding DIR"
            )
        header = read_header(run.to_resume)
        if settings.tokens is not None:
            if "tokens" not in flags:
                tokens = find_tokens(settings.tokens, header, "pass its path with --tokens DIR")
                settings = replace(settings, tokens=tokens)
        elif "text" not in flags:
            settings = replace(settings, text=find_texts(settings.text, header, "pass its path with --text FILE"))
    elif init is not None:
        header = read_header(init)
        settings = _settings_for(header, flags)
        config = replace(header.config, drop_rate=settings.drop_rate)
        if (words := least_vocab_size(get_encoding(settings.encoding))) > config.vocab_size:
            raise InputError(
                f"{init} has a vocabulary of {config.vocab_size}, the encoding {settings.encoding} one of {words}: "
                "choose its own --encoding"
            )
        params = load_params(init, np.float32)[1]
    else:
        settings = replace(defaults_for(flags.get("model", "tiny")), **flags)
        if settings.tokens is not None:
            settings = replace(settings, encoding=tokens_encoding(Path(settings.tokens), flags.get("encoding")))
        config = None
    if settings.tokens is not None and "text" in flags:
        raise InputError(f"the run can learn either a text or the tokens in {settings.tokens}: leave out --text")
    Generator(settings.seed)  # raises for an invalid seed
    if settings.lr * max(1.0, settings.weight_decay) > LARGEST_UPDATE:
        raise InputError(
            f"--lr {settings.lr:g} with --weight-decay {settings.weight_decay:g} would take the weights beyond the "
            "largest float32 in one step: choose smaller ones"
        )
    if settings.batch_size % (settings.accumulate * processes):
        parts = f"{processes} processes × " * (processes > 1) + f"--accumulate {settings.accumulate}"
        raise InputError(
            f"--batch-size {settings.batch_size} is not divisible by {parts}: choose a multiple of "
            f"{settings.accumulate * processes}"
        )
    if not settings.prompt:
        raise InputError("the --prompt is empty: give at least one character to continue from")
    batches = Batches(settings, track)
    settings = _with_prompt(settings, batches, "prompt" in flags)
    if config is None:
        config = settings.config(batches.encoding.n_vocab)
    if batches.largest_id >= config.vocab_size:
        raise InputError(
            f"the training tokens have id {batches.largest_id:,}, but the model knows {config.vocab_size:,}: use the "
            "encoding that it was trained with"
        )
    settings, cap = _length(settings, flags, batches)
    return Job(settings, batches, config, params, run, cap)


def _with_prompt(settings: Settings, batches: Batches, given: bool) -> Settings:
    """The settings with a prompt that the encoding can represent: a default one may have characters it lacks."""
    try:
        encode(batches.encoding, settings.prompt)
    except InputError as error:
        if given:
            raise InputError(f"the --prompt cannot be used: {error}") from error
        return replace(settings, prompt=decode(batches.encoding, [0]))
    return settings


def _length(settings: Settings, flags: dict[str, Any], batches: Batches) -> tuple[Settings, str | None]:
    """Make epochs and max_steps agree: the one requested wins; of both, the earlier end, with a note saying which."""
    epochs, steps = "epochs" in flags, settings.max_steps is not None and "max_steps" in flags
    if epochs and not steps:
        return replace(settings, max_steps=None), None
    if steps and not epochs:
        assert settings.max_steps is not None
        return replace(settings, epochs=max(settings.epochs, -(-settings.max_steps // batches.batches_per_epoch))), None
    if not epochs or settings.max_steps is None:
        return settings, None
    in_epochs = settings.epochs * batches.batches_per_epoch
    if in_epochs < settings.max_steps:
        return settings, f"--epochs {settings.epochs} ends it before --max-steps {settings.max_steps:,}"
    if settings.max_steps < in_epochs:
        return (
            settings,
            f"--max-steps {settings.max_steps:,} ends it before --epochs {settings.epochs}, {in_epochs:,} steps",
        )
    return settings, None


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
    processes: int = 1,
) -> int:
    """Run the job to its end (returns 0) or to the first signal (its number); the run's folder is complete either way.

    flags: the settings given explicitly. backend: a line for the report that says what computes. processes: number of
    those that share each batch.
    Raises InputError before anything is written; DivergedError if training diverges, after saving the last
    finite state; LostProcessError, naming the last save, if another process of the run dies.
    """
    if resume is not None and (init is not None or out is not None):
        raise InputError("--resume uses the run's own folder and weights: leave out --init and --out")
    if out is not None:
        Run.check_new(out)
    report = Report()
    job = prepare(flags, resume, init, processes, partial(report.track, description="checking the tokens"))
    with _signals() as received, ExitStack() as held:
        if job.resumed is not None:
            held.enter_context(job.resumed.locked())
            session = _resumed(job, job.resumed, make_learner, report, backend, save_freq, keep)
        else:
            _describe(report, backend, job)
            learner = make_learner(job.config, job.settings, job.total_steps, job.params)
            run = held.enter_context(Run.create(out, job.settings, job.batches))
            session = _Session(report, job, run, learner, Position(), save_freq, keep)
        report.line(f"run       {session.run.folder}")
        with np.errstate(over="ignore", invalid="ignore"):  # each step checks its loss and gradients instead
            session.train(received)
    return received[0] if session.position.step < job.total_steps and received else 0


class _Session:
    """A run in training: its learner and position, its reports and its saves."""

    def __init__(
        self,
        report: Report,
        job: Job,
        run: Run,
        learner: Learner,
        position: Position,
        save_freq: int | None,
        keep: int,
    ):
        self.report, self.job, self.run, self.learner, self.position = report, job, run, learner, position
        self._save_freq, self._keep = save_freq, keep
        self._loaders = job.batches.loaders(learner)
        self._saved: int | None = None  # the step of this process's last save
        self._told: set[str] = set()

    def train(self, received: list[int]) -> None:
        """Train to the end or to a signal, save and report. On an error, saves first what can be saved."""
        try:
            self._train(received)
        except LostProcessError as error:
            raise LostProcessError(f"{error}; {self._last_save()}") from error

    def _train(self, received: list[int]) -> None:
        job, position, report = self.job, self.position, self.report
        report.line()
        if position.step == 0:
            report.line(f"{'untrained' if job.params is None else 'before training'}: {self._sample()}")
        # In small products BLAS threads wait for one another longer than they compute, far longer on a busy machine
        with threadpool_limits(1 if job.config.emb_dim < 256 else None, user_api="blas"):
            try:
                self._steps(received)
                self._save()
            except DivergedError as error:
                self._drawn()
                raise DivergedError(f"{error}; {self._after_divergence()}") from error
            except KeyboardInterrupt:
                report.line(f"Stopped at once; {self._last_save()}")
                raise
        drawn = self._drawn()
        if position.step:
            report.line(f"drawn at temperature {TEMPERATURE}: {self._sample(TEMPERATURE)}")
        report.line()
        if position.step < job.total_steps:
            steps = f"{position.step} step{'s' if position.step > 1 else ''}"
            report.line(f"Stopped after {steps}; everything is saved. Resume with: {self._resume_flags()}")
        if (batches := len(self._loaders[1])) > job.settings.eval_iter:
            report.line(
                f"The losses are over {job.settings.eval_iter} batches, of {batches} for validation; "
                f"over all of them: numpy-gpt evaluate {shlex.quote(str(self.run.folder))}"
            )
        best = [BEST] if os.path.exists(self.run.folder / BEST / MODEL_FILE) else []
        report.line(f"Saved {self.run.folder}: {', '.join([CHECKPOINT, *best, 'losses.csv', *drawn])}")

    def _steps(self, received: list[int]) -> None:
        """Run the training loop with its reports and saves until it ends or a signal arrives."""
        s, position, total = self.job.settings, self.position, self.job.total_steps
        if self._save_freq and position.step == 0:
            self._save()  # so that there is always a save to resume from
        with self.report.training(total, position.step, position.tokens_seen):
            steps = train(self.learner, *self._loaders, total, s.eval_freq, s.eval_iter, position)
            while (step := self._next(steps)) is not None:
                try:
                    self._report(step)
                except LostProcessError:
                    raise
                except Exception:
                    self._save()
                    raise
                if received:
                    return
                if self._save_freq and position.step % self._save_freq == 0 and position.step < total:
                    self._save()

    def _next(self, steps: Iterator[Step]) -> Step | None:
        """The next step, or None at the end. On divergence, saves the state before it, which the learner still has.

        The same if a batch cannot be read, but not if an evaluation fails, which has drawn random numbers.
        """
        before = self.position.step
        try:
            return next(steps, None)
        except InputError as error:
            if self.position.step == before:
                self._save()
            if isinstance(error, DivergedError):
                raise
            raise InputError(f"{error}; {self._last_save()}") from error

    def _report(self, step: Step) -> None:
        if step.evaluation is not None:
            self.run.losses.append(step, self.report.seconds)
        self.report.step(step)
        if step.epoch_ended or self.position.step == self.job.total_steps:
            self.report.line(f"after epoch {step.epochs:.3g}: {self._sample()}")

    def _save(self) -> None:
        """Save if there was a step since the last save. Raises DivergedError if the weights are not finite.

        An InputError, for instance of a full disk, says what the run can be resumed from.
        """
        if self._saved == self.position.step:
            return
        number = min(self.run.best_batches(self.job.settings.eval_iter), len(self._loaders[1]))
        validation = Validation(undrawn_loss(self.learner, self._loaders[1], number), number)
        try:
            notes = self.run.save(
                self.job.config, self.learner, self.position, self.job.batches, validation, self._keep
            )
        except NonFiniteError as error:
            raise DivergedError(f"training has diverged: after {self.position.step} steps {error}") from error
        except InputError as error:
            raise InputError(f"{error}; {self._last_save()}") from error
        self._saved = self.position.step
        self.tell(notes)

    def tell(self, notes: list[str]) -> None:
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                self.report.line(f"note: {note}")

    def _sample(self, temperature: float = 0.0) -> str:
        settings, encoding = self.job.settings, self.job.batches.encoding
        prompt = encode(encoding, settings.prompt)[None]
        ids = self.learner.sample(prompt, settings.sample_tokens, temperature, n_vocab=encoding.n_vocab)[0]
        return one_line(decode(encoding, ids))

    def _drawn(self) -> list[str]:
        """Draw the plot and list its name; an empty list if drawing fails, which must not end the run."""
        try:
            return [self.run.losses.plot(self.job.batches.batches_per_epoch).name]
        except Exception as error:
            self.tell([f"losses.png could not be drawn ({error})"])
            return []

    def _after_divergence(self) -> str:
        best = f", or from {self.run.folder / BEST} with --init" if os.path.exists(self.run.folder / BEST) else ""
        return (
            f"{self._last_save()} (which would diverge at the same step): begin another run with a lower --lr, more "
            f"--warmup-steps or a lower --clip, from the start{best}"
        )

    def _last_save(self) -> str:
        try:
            step = read_header(self.run.to_resume).about["step"]
        except (InputError, KeyError):
            return f"{self.run.folder} has no save yet"
        return f"the state after {step} steps is saved: {self._resume_flags()}"

    def _resume_flags(self) -> str:
        saves = f" --save-freq {self._save_freq}" if self._save_freq else ""
        return f"--resume {self.run.folder}{saves}" + (f" --keep {self._keep}" if self._keep > 1 else "")


def _resumed(
    job: Job, run: Run, make_learner: MakeLearner, report: Report, backend: str, save_freq: int | None, keep: int
) -> _Session:
    """Resume a run. Writes nothing until everything has been checked."""
    position, state = run.saved_state(job.settings, job.batches.sha256)
    position.check_fits(job.batches.windows, job.batches.batches_per_epoch)
    learner = make_learner(job.config, job.settings, job.total_steps, job.params)
    learner.restore(state)
    notes = run.resume(job.settings, job.batches.sha256, position, keep)
    _describe(report, backend, job)
    report.line(f"resumed   after {position.step} steps, {max(0, job.total_steps - position.step)} to go")
    session = _Session(report, job, run, learner, position, save_freq, keep)
    session.tell(notes)
    return session


def _settings_for(header: Header, flags: dict[str, Any]) -> Settings:
    """Settings of a run that starts from a checkpoint; InputError if a flag contradicts the checkpoint's model."""
    config = header.config
    own_size = {name: getattr(config, name) for name in SIZE_NAMES}
    model = next((name for name, size in SIZES.items() if size == own_size), None)
    fixed = own_size | {
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
    if flags.get("encoding") == CHARS:
        raise InputError(
            f"--encoding chars makes a new vocabulary, but {header.file} has its own: leave the flag out with --init"
        )
    base = defaults_for(model or "tiny")
    fixed |= {"encoding": flags.get("encoding") or encoding_of(header)}
    fixed |= dict.fromkeys(SIZE_NAMES) if model else {"model": base.model}
    return replace(base, **flags | fixed)


def _describe(report: Report, backend: str, job: Job) -> None:
    s, config, batches = job.settings, job.config, job.batches
    report.line(backend)
    report.line(
        f"model     {s.name}: {parameter_count(config):,} parameters, {config.n_layers} layers × {config.emb_dim}, "
        f"{config.n_heads} heads, context {config.context_length}, dropout {config.drop_rate:g}"
    )
    counts = f"{batches.tokens:,} tokens ({batches.encoding.name})"
    if s.tokens is None:
        report.line(f"text      {in_words(s.text)}: {len(batches.text):,} characters, {counts}")
    else:
        report.line(f"tokens    {s.tokens}: {counts}")
    report.line(
        f"batches   {s.batch_size} × {s.context_length} tokens; {batches.train_tokens:,} tokens an epoch, "
        f"{batches.val_tokens:,} for validation; {job.total_steps:,} steps{f' ({job.cap})' if job.cap else ''}"
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect signals that end a process, so that no step is cut short; a second one of a kind acts as usual."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def receive(number: int, frame: FrameType | None) -> None:
        if number not in received:
            received.append(number)
            again = "Ctrl-C again" if number == signal.SIGINT else f"another {signal.Signals(number).name}"
            with suppress(RuntimeError):  # the signal interrupted a write to stderr
                say(f"stopping after this step, and saving; {again} stops at once")
        elif callable(before[number]):
            before[number](number, frame)
        elif before[number] == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    if threading.current_thread() is threading.main_thread():  # others may not handle signals
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                before[number] = signal.getsignal(number)
                signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not installed by Python, which cannot restore it
                signal.signal(number, handler)
