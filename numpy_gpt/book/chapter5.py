"""Chapter 5 of "Build a Large Language Model (From Scratch)" (S. Raschka), from the seed to the last sample.

`replay` runs the chapter with any backend; `figures` compares its results, in NumPy and in torch if installed, with
those that the chapter prints.
"""

import json
import math
import subprocess
import sys
from collections import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import numpy as np

from numpy_gpt.book.figures import PRINTED, TOY_COUNTS, TOY_LOGITS, Printed
from numpy_gpt.config import GPTConfig
from numpy_gpt.data import CORPORA, VERDICT_SHA256, load_text, the_verdict
from numpy_gpt.decoding import keep_top_k, softmax
from numpy_gpt.errors import InputError
from numpy_gpt.io.paths import kind_of
from numpy_gpt.ops.cross_entropy import cross_entropy_forward
from numpy_gpt.random.generator import Generator
from numpy_gpt.runs.batches import Batches
from numpy_gpt.runs.learner import NumpyLearner
from numpy_gpt.runs.settings import Settings
from numpy_gpt.tokenizer import decode, encode
from numpy_gpt.train import Learner, Position, loader_loss, train
from numpy_gpt.typing import Array

INPUTS = np.array([[16833, 3626, 6100], [40, 1107, 588]])
TARGETS = np.array([[3626, 6100, 345], [1107, 588, 11311]])
TOY_DRAWS = 1000

OF_THE_TEXT = {"target text", "story", "characters", "tokens"}
OF_THE_TEXT |= {f"{part} {what}" for part in ("train", "val", "all") for what in ("batches", "tokens")}
"""Figures of the text and its windows, which do not depend on a backend: shown in NumPy's column only."""

Item = tuple[str | None, Any]
"""A result: its name in PRINTED, and a value that JSON can represent. Name None: progress, [steps made, all steps]."""


class Chapter(Learner, Protocol):
    """A learner with the chapter's other calculations, in its backend's own operations."""

    def seed(self) -> None:
        """Restarts the random stream, like torch.manual_seed(123)."""

    def predict(self, x: Array, y: Array) -> dict[str, Any]:
        """The figures of cells 12 to 21, by name, from the model's predictions for x (B, T) and targets y."""

    def toy_counts(self, logits: Sequence[float], temperature: float, draws: int) -> list[int]:
        """How often each index is drawn, one at a time, from softmax(logits / temperature) after reseeding."""

    def toy_top_k(self, logits: Sequence[float], k: int) -> list[float]:
        """The probabilities with only the k largest logits kept."""


class MakeChapter(Protocol):
    """A backend's constructor of its chapter: seeds once with settings.seed, then draws the weights."""

    def __call__(self, config: GPTConfig, settings: Settings, total_steps: int) -> Chapter: ...


class NumpyChapter(NumpyLearner):
    """The chapter in NumPy. See Chapter for the methods."""

    def seed(self) -> None:
        self.rng = Generator(self._settings.seed)

    def predict(self, x: Array, y: Array) -> dict[str, Any]:
        logits = self.model(x)
        flat = logits.reshape(-1, logits.shape[-1])
        probas = softmax(flat).reshape(logits.shape)
        target_probas = np.take_along_axis(probas, y[..., None], axis=-1)[..., 0]
        log_probas = np.log(target_probas).flatten()
        loss = float(cross_entropy_forward(logits, y)[0])
        return {
            "probas shape": str(probas.shape),
            "argmax": probas.argmax(axis=-1, keepdims=True).tolist(),
            "probas 0": target_probas[0].tolist(),
            "probas 1": target_probas[1].tolist(),
            "log probas": log_probas.tolist(),
            "mean": float(log_probas.mean()),
            "negative mean": float(-log_probas.mean()),
            "logits shape": str(logits.shape),
            "targets shape": str(y.shape),
            "flat logits shape": str(flat.shape),
            "flat targets shape": str(y.reshape(-1).shape),
            "cross-entropy": loss,
            "perplexity": math.exp(loss),
        }

    def toy_counts(self, logits: Sequence[float], temperature: float, draws: int) -> list[int]:
        self.seed()
        p = softmax(np.array([logits], np.float32) / np.float32(temperature))[0]
        ids = [self.rng.multinomial(p)[0] for _ in range(draws)]
        counts: list[int] = np.bincount(ids, minlength=len(logits)).tolist()
        return counts

    def toy_top_k(self, logits: Sequence[float], k: int) -> list[float]:
        kept: list[float] = softmax(keep_top_k(np.array([logits], np.float32), k))[0].tolist()
        return kept


def replay(make: MakeChapter, text: str = "the-verdict", quick: bool = False) -> abc.Generator[Item, None, None]:
    """Yield the chapter's figures as they are computed. quick: only those that need no training.

    text: the story's name or file, read twice. Raises InputError if the story or GPT-2's vocabulary cannot be found, or
    if the text is not the story.
    """
    if sha256(_story(text).encode()).hexdigest() != VERDICT_SHA256:
        raise InputError(f"{text} is not the chapter's story, the basis of its figures: give the story, or omit --text")
    config, settings = GPTConfig(), Settings(text=text)  # the book's GPT_CONFIG_124M, and its run
    batches = Batches(settings)
    words = batches.encoding
    learner = make(config, settings, 0)
    prompt = encode(words, settings.prompt)[None]
    yield "greedy 10", decode(words, learner.sample(prompt, 10)[0])

    for key, value in learner.predict(INPUTS, TARGETS).items():
        yield key, value
        if key == "argmax":
            yield "argmax shape", str(np.array(value).shape)
            yield "target text", decode(words, TARGETS[0])
            yield "argmax text", decode(words, np.array(value)[0].flatten())

    yield "story", sha256(batches.text.encode()).hexdigest()
    yield "characters", len(batches.text)
    yield "tokens", len(encode(words, batches.text))
    train_loader, val_loader = batches.loaders(learner)
    loaders = {"train": train_loader, "val": val_loader}
    seen = {part: [(x.shape, y.shape) for x, y in loader] for part, loader in loaders.items()}
    yield from ((f"{part} batches", str(shapes)) for part, shapes in seen.items())
    tokens = {part: sum(math.prod(x) for x, _ in shapes) for part, shapes in seen.items()}
    yield from ((f"{part} tokens", count) for part, count in (tokens | {"all": sum(tokens.values())}).items())

    learner.seed()
    yield "train loss", loader_loss(learner, train_loader)
    yield "val loss", loader_loss(learner, val_loader)
    for temperature in TOY_COUNTS:
        yield f"toy {temperature}", str(learner.toy_counts(TOY_LOGITS, temperature, TOY_DRAWS))
    yield "toy top 3", learner.toy_top_k(TOY_LOGITS, 3)
    if quick:
        return

    del learner, loaders, train_loader, val_loader  # the loaders keep the learner alive
    steps = settings.epochs * batches.batches_per_epoch
    learner = make(config, settings, steps)
    run = train(learner, *batches.loaders(learner), steps, settings.eval_freq, settings.eval_iter, Position())
    for step in run:
        yield None, [step.step + 1, steps]
        if step.evaluation is not None:
            yield f"step {step.step}", [step.evaluation.train_loss, step.evaluation.val_loss]
        if step.epoch_ended:
            yield f"epoch {step.epoch}", decode(words, learner.sample(prompt, settings.sample_tokens)[0])
    yield "greedy 25", decode(words, learner.sample(prompt, 25)[0])
    yield "top-k 25", decode(words, learner.sample(prompt, 15, temperature=1.4, top_k=25)[0])


def _story(text: str) -> str:
    """load_text, with errors that advise only the chapter's story."""
    if text == "the-verdict":
        return the_verdict("give its file with --text")
    if text not in CORPORA and kind_of(text) == "missing":
        raise InputError(f"{text!r} is neither a known text nor a file: give a file with the chapter's story")
    return load_text(text)


def torch_replay(text: str, quick: bool) -> abc.Generator[Item, None, None]:
    """`replay` in torch, in a separate process: numpy_gpt does not import torch.

    The process computes an item only on request, so that it never competes with NumPy for the cores.
    Raises InputError if it fails; its own error is on stderr.
    """
    command = [sys.executable, "-P", "-m", "torch_gpt", "chapter5", "--text", text, *(["--quick"] if quick else [])]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C goes to this process, which ends the other
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            while process.poll() is None:
                process.stdin.write("next\n")
                process.stdin.flush()
                if line := process.stdout.readline():
                    key, value = json.loads(line)
                    yield key, value
                else:
                    process.wait()
        except BrokenPipeError:
            process.wait()
        finally:
            process.kill()
        if process.returncode:
            raise InputError("torch could not replay the chapter (see above): fix it, or use --no-torch")


@dataclass(frozen=True)
class Figure:
    """A printed figure and each side's result: name of the side -> value."""

    printed: Printed
    found: dict[str, Any]

    @property
    def off(self) -> list[str]:
        """The sides whose result differs."""
        return [side for side, value in self.found.items() if not self.printed.agrees(value)]


def figures(text: str, quick: bool, with_torch: bool, progress: Callable[[str], None]) -> Iterator[Figure]:
    """Yield every figure of the chapter once both sides have it; progress receives the current activity."""

    def found_by(side: str, items: Iterator[Item]) -> Iterator[tuple[str, Any]]:
        progress(side)
        for key, value in items:
            if key is None:
                progress(f"{side}: training, step {value[0]} of {value[1]}")
            else:
                yield key, value
                progress(side)

    replays = {"NumPy": replay(NumpyChapter, text, quick)}
    if with_torch:
        replays["torch"] = torch_replay(text, quick)
    with ExitStack() as stack:
        sides = [found_by(side, stack.enter_context(closing(items))) for side, items in replays.items()]
        for found in zip(*sides, strict=True):
            (key,) = {key for key, _ in found}  # the same replay: the same figures
            sides_found = {side: value for side, (_, value) in zip(replays, found, strict=True)}
            if key in OF_THE_TEXT:
                sides_found.pop("torch", None)
            yield Figure(PRINTED[key], sides_found)
