"""Chapter 5 of "Build a Large Language Model (From Scratch)" (S. Raschka), cell by cell, in NumPy.

The printed figures are those of the chapter's notebook, under its cell numbers.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from numpy_gpt.config import GPTConfig
from numpy_gpt.data import VERDICT_SHA256, Loader, load_text, sliding_windows, split_text
from numpy_gpt.decoding import generate, softmax
from numpy_gpt.learner import NumpyLearner
from numpy_gpt.ops.cross_entropy import cross_entropy_forward
from numpy_gpt.run import Settings
from numpy_gpt.tokenizer import decode, encode, get_encoding
from numpy_gpt.train import loader_loss
from numpy_gpt.typing import Array

PROMPT = "Every effort moves you"
GENERATED = "Every effort moves you rentingetic wasnم refres RexMeCHicular stren"
INPUTS = np.array([[16833, 3626, 6100], [40, 1107, 588]])
TARGETS = np.array([[3626, 6100, 345], [1107, 588, 11311]])
ARGMAX = [[[16657], [339], [42826]], [[49906], [29669], [41751]]]

LOG_ULP = 2.0**-20
"""One float32 step of a number from 8 to 16, which the losses and the logarithms of the probabilities are."""


@dataclass(frozen=True)
class Figure:
    """One printed figure of the chapter beside ours, as text."""

    cell: int
    what: str
    printed: str
    found: str
    agrees: bool
    note: str = ""


def same(cell: int, what: str, printed: Any, found: Any) -> Figure:
    """A figure that must be the same to the letter."""
    return Figure(cell, what, str(printed), str(found), str(printed) == str(found))


def close(cell: int, what: str, printed: str, found: float, tolerance: float, note: str) -> Figure:
    """A figure that may differ by a stated amount, which the note gives the reason for."""
    return Figure(cell, what, printed, repr(float(found)), abs(found - float(printed)) <= tolerance, note)


def numbers(values: Sequence[float] | Array, spec: str) -> str:
    """Numbers as torch prints a tensor of them."""
    return "[" + ", ".join(format(float(value), spec) for value in values) + "]"


def probabilities(cell: int, what: str, printed: Sequence[str], found: Array) -> Figure:
    """Probabilities printed to five digits: half of the last one, and one float32 step of the logarithm, are free.

    The first of the chapter needs both: it is 7.45405e-05 to six digits, so the fifth hangs on the last bit.
    """
    free = [0.5e-4 * 10.0 ** math.floor(math.log10(float(p))) + float(p) * LOG_ULP for p in printed]
    agrees = all(abs(f - float(p)) <= t for f, p, t in zip(found, printed, free, strict=True))
    note = "± half of the last digit and one float32 step of the logarithm"
    return Figure(cell, what, f"[{', '.join(printed)}]", numbers(found, ".6e"), agrees, note)


def figures(text: str = "the-verdict") -> Iterator[Figure]:
    """The chapter's figures up to the losses before training (cells 4 to 30), one by one as they are computed.

    text: the story, as load_text takes it. Takes some 20 seconds for GPT-2 124M. Raises InputError if the story or
    GPT-2's vocabulary cannot be had.
    """
    encoding = get_encoding("gpt2")
    story = load_text(text)
    config = GPTConfig()  # the book's GPT_CONFIG_124M
    learner = NumpyLearner(config, Settings(seed=123), total_steps=0)
    model = learner.model

    ids = generate(model, encode(encoding, PROMPT)[None], 10)
    yield same(4, "ten greedy tokens of the untrained model", GENERATED, decode(encoding, ids[0]))

    logits = model(INPUTS)
    probs = softmax(logits.reshape(-1, config.vocab_size)).reshape(logits.shape)
    yield same(12, "shape of the probabilities", "(2, 3, 50257)", probs.shape)
    argmax = probs.argmax(axis=-1, keepdims=True)
    yield same(13, "likeliest token ids", ARGMAX, argmax.tolist())
    yield same(13, "their shape", "(2, 3, 1)", argmax.shape)
    yield same(11, "targets of batch 1 as text", " effort moves you", decode(encoding, TARGETS[0]))
    yield same(11, "outputs of batch 1 as text", " Armed heNetflix", decode(encoding, argmax[0].flatten()))
    target_probs = np.take_along_axis(probs, TARGETS[..., None], axis=-1)[..., 0]
    for i, row in enumerate((("7.4541e-05", "3.1061e-05", "1.1563e-05"), ("1.0337e-05", "5.6776e-05", "4.7559e-06"))):
        yield probabilities(14, f"probabilities of the targets, text {i + 1}", row, target_probs[i])
    log_probs = np.log(target_probs).flatten()
    printed = "[-9.5042, -10.3796, -11.3677, -11.4798, -9.7764, -12.2561]"
    yield same(15, "their logarithms", printed, numbers(log_probs, ".4f"))
    yield same(16, "mean of the logarithms", "-10.7940", f"{log_probs.mean():.4f}")
    yield same(17, "its negative", "10.7940", f"{-log_probs.mean():.4f}")
    yield same(18, "shape of the logits", "(2, 3, 50257)", logits.shape)
    yield same(18, "shape of the targets", "(2, 3)", TARGETS.shape)
    yield same(19, "shape of the flat logits", "(6, 50257)", logits.reshape(-1, config.vocab_size).shape)
    yield same(19, "shape of the flat targets", "(6,)", TARGETS.reshape(-1).shape)
    loss = cross_entropy_forward(logits, TARGETS)[0]
    yield same(20, "cross-entropy (nats/token)", "10.7940", f"{loss:.4f}")
    yield close(21, "perplexity", "48725.8203", math.exp(loss), 48725.8203 * LOG_ULP, "± one float32 step of the loss")

    yield same(22, "SHA-256 of the story", VERDICT_SHA256, hashlib.sha256(story.encode()).hexdigest())
    tokens = encode(encoding, story)
    yield same(24, "characters", 20479, len(story))
    yield same(24, "tokens", 5145, len(tokens))

    def loader(part: str, train: bool) -> Loader:
        windows = sliding_windows(encode(encoding, part), config.context_length, config.context_length)
        order = learner.shuffled_order if train else learner.file_order
        return Loader(*windows, batch_size=2, drop_last=train, begin_epoch=order)

    train_part, val_part = split_text(story)
    train_loader, val_loader = loader(train_part, True), loader(val_part, False)
    batch = ((2, 256), (2, 256))
    for name, each, count in (("train", train_loader, 9), ("validation", val_loader, 1)):
        yield same(27, f"batches of the {name} loader", [batch] * count, [(x.shape, y.shape) for x, y in each])
    sizes = [sum(x.size for x, _ in each) for each in (train_loader, val_loader)]
    yield same(28, "training tokens", 4608, sizes[0])
    yield same(28, "validation tokens", 512, sizes[1])
    yield same(28, "all tokens", 5120, sum(sizes))

    learner.rng.set_state(type(learner.rng)(123).get_state())  # the chapter seeds anew before these losses
    note = "± 1e-5: printed on a GPU, and float32 sums differ"
    yield close(30, "training loss", "10.987583584255642", loader_loss(learner, train_loader), 1e-5, note)
    yield close(30, "validation loss", "10.98110580444336", loader_loss(learner, val_loader), 1e-5, note)
