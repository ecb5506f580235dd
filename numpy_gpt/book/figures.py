"""The figures that chapter 5 of "Build a Large Language Model (From Scratch)" (S. Raschka) prints.

"In [n]" is a cell of the chapter's notebook; 5.2 and 5.3 are sections of the print edition, whose losses are those of
a CPU (the notebook has since been run on a GPU, where dropout draws other masks).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy_gpt.console import one_line
from numpy_gpt.data import VERDICT_SHA256

LOG_ULP = 2.0**-20
"""One float32 step of a number from 8 to 16, which the losses and the logarithms of the probabilities are."""

RUN_SPREAD = 5e-5
"""Allowed between two runs' losses, for sums round differently: torch's own in float32 and float64 differ by 1e-5."""


@dataclass(frozen=True)
class Printed:
    """A printed figure: where, what it is, its text, and how a found value is shown and judged."""

    where: str
    what: str
    text: str
    show: Callable[[Any], str] = str
    judge: Callable[[Any], bool] | None = None  # None: shown, the value must be the text
    note: str = ""

    def agrees(self, value: Any) -> bool:
        """Is this value the printed one?"""
        return self.show(value) == self.text if self.judge is None else self.judge(value)


def numbers(spec: str) -> Callable[[Sequence[float]], str]:
    """Shows numbers as torch prints a tensor of them."""
    return lambda values: "[" + ", ".join(format(value, spec) for value in values) + "]"


def close(where: str, what: str, text: str, tolerance: float, note: str) -> Printed:
    """A number that may differ by a stated amount, which the note gives the reason for."""
    return Printed(where, what, text, repr, lambda value: bool(abs(value - float(text)) <= tolerance), note)


def probabilities(where: str, what: str, texts: Sequence[str]) -> Printed:
    """Probabilities printed to five digits: half of the last one, and one float32 step of the logarithm, are free.

    The first of the chapter needs both: it is 7.45405e-05 to six digits, so the fifth hangs on the last bit.
    """
    want = [float(text) for text in texts]
    free = [0.5e-4 * 10.0 ** math.floor(math.log10(p)) + p * LOG_ULP for p in want]

    def judge(found: Sequence[float]) -> bool:
        return all(abs(f - p) <= t for f, p, t in zip(found, want, free, strict=True))

    note = "± half of the last digit and one float32 step of the logarithm"
    return Printed(where, what, f"[{', '.join(texts)}]", numbers(".6e"), judge, note)


def losses(step: int, epoch: int, train: str, val: str) -> Printed:
    """A line of the training run: half of the last printed digit, and RUN_SPREAD, are free."""

    def line(train: str, val: str) -> str:
        return f"Ep {epoch} (Step {step:06d}): Train loss {train}, Val loss {val}"

    def judge(found: Sequence[float]) -> bool:
        return all(abs(f - float(p)) <= 0.5e-3 + RUN_SPREAD for f, p in zip(found, (train, val), strict=True))

    note = f"± half of the last digit and {RUN_SPREAD:g}"
    return Printed(
        "5.2", f"losses after step {step}", line(train, val), lambda v: line(*map("{:.6f}".format, v)), judge, note
    )


def sample(where: str, what: str, text: str) -> Printed:
    """A text of the model, word for word; shown on one line, as the book does."""
    return Printed(where, what, one_line(text), one_line, lambda found: bool(found == text))


STEPS_AN_EPOCH = 9
LOSSES = {  # after the step: train, validation
    0: ("9.781", "9.933"),
    5: ("8.111", "8.339"),
    10: ("6.661", "7.048"),
    15: ("5.961", "6.616"),
    20: ("5.726", "6.600"),
    25: ("5.201", "6.348"),
    30: ("4.417", "6.278"),
    35: ("4.069", "6.226"),
    40: ("3.732", "6.160"),
    45: ("2.850", "6.179"),
    50: ("2.427", "6.141"),
    55: ("2.104", "6.134"),
    60: ("1.882", "6.233"),
    65: ("1.320", "6.238"),
    70: ("0.985", "6.242"),
    75: ("0.717", "6.293"),
    80: ("0.541", "6.393"),
    85: ("0.391", "6.452"),
}
SAMPLES = (  # after each epoch
    "Every effort moves you,,,,,,,,,,,,." + 37 * "\n",
    "Every effort moves you, and, and, and, and, and, and, and, and, and, and, and, and, and, and, "
    "and, and, and, and, and, and, and, and,, and, and,",
    "Every effort moves you, and I had been." + 44 * "\n",
    "Every effort moves you know the"
    + 26 * "\n"
    + '"I he had the donkey and I had the and I had the donkey and down the room, I had',
    "Every effort moves you know it was not that the picture--I had the fact by the last I had "
    "been--his, and in the" + 12 * "\n" + '"Oh, and he said, and down the room, and in',
    'Every effort moves you know," was one of the picture. The--I had a little of a little: "Yes, '
    "and in fact, and in the picture was, and I had been at my elbow and as his pictures, and down "
    "the room, I had",
    'Every effort moves you know," was one of the picture for nothing--I told Mrs.\n\n"I was no--as! '
    "The women had been, in the moment--as Jack himself, as once one had been the donkey, and were, "
    "and in his",
    'Every effort moves you know," was one of the axioms he had been the tips of a self-confident '
    "moustache, I felt to see a smile behind his close grayish beard--as if he had the donkey. "
    '"strongest," as his',
    'Every effort moves you?"\n\n"Yes--quite insensible to the irony. She wanted him vindicated--and '
    'by me!"\n\nHe laughed again, and threw back the window-curtains, I had the donkey. "There were '
    "days when I",
    'Every effort moves you know," was one of the axioms he laid down across the Sevres and silver '
    "of an exquisitely appointed luncheon-table, when, on a later day, I had again run over from "
    "Monte Carlo; and Mrs. Gis",
)
GREEDY_25 = (
    'Every effort moves you know," was one of the axioms he laid down across the Sevres and silver '
    "of an exquisitely appointed lun"
)
TOP_K_25 = "Every effort moves you stand to work on surprise, a one of us had gone with random-"

TOY_WORDS = ("closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you")
TOY_LOGITS = (4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79)
TOY_COUNTS = {  # temperature: how often each word comes in 1,000 draws
    1.0: (73, 0, 0, 582, 2, 0, 0, 343, 0),
    0.1: (0, 0, 0, 985, 0, 0, 0, 15, 0),
    5.0: (165, 75, 42, 239, 71, 46, 32, 227, 103),
}

_LOG_PROBAS = "[-9.5042, -10.3796, -11.3677, -11.4798, -9.7764, -12.2561]"
_GREEDY_10 = "Every effort moves you rentingetic wasnم refres RexMeCHicular stren"
_ON_A_GPU = "± 1e-5: printed on a GPU, and float32 sums differ"

PRINTED: dict[str, Printed] = {
    "greedy 10": sample("In [4]", "ten greedy tokens of the untrained model", _GREEDY_10),
    "probas shape": Printed("In [12]", "shape of the probabilities", "(2, 3, 50257)"),
    "argmax": Printed("In [13]", "likeliest token ids", "[[[16657], [339], [42826]], [[49906], [29669], [41751]]]"),
    "argmax shape": Printed("In [13]", "their shape", "(2, 3, 1)"),
    "target text": sample("In [11]", "targets of batch 1 as text", " effort moves you"),
    "argmax text": sample("In [11]", "outputs of batch 1 as text", " Armed heNetflix"),
    "probas 0": probabilities(
        "In [14]", "probabilities of the targets, text 1", ("7.4541e-05", "3.1061e-05", "1.1563e-05")
    ),
    "probas 1": probabilities(
        "In [14]", "probabilities of the targets, text 2", ("1.0337e-05", "5.6776e-05", "4.7559e-06")
    ),
    "log probas": Printed("In [15]", "their logarithms", _LOG_PROBAS, numbers(".4f")),
    "mean": Printed("In [16]", "mean of the logarithms", "-10.7940", "{:.4f}".format),
    "negative mean": Printed("In [17]", "its negative", "10.7940", "{:.4f}".format),
    "logits shape": Printed("In [18]", "shape of the logits", "(2, 3, 50257)"),
    "targets shape": Printed("In [18]", "shape of the targets", "(2, 3)"),
    "flat logits shape": Printed("In [19]", "shape of the flat logits", "(6, 50257)"),
    "flat targets shape": Printed("In [19]", "shape of the flat targets", "(6,)"),
    "cross-entropy": Printed("In [20]", "cross-entropy (nats/token)", "10.7940", "{:.4f}".format),
    "perplexity": close("In [21]", "perplexity", "48725.8203", 48725.8203 * LOG_ULP, "± one float32 step of the loss"),
    "story": Printed("In [22]", "SHA-256 of the story", VERDICT_SHA256),
    "characters": Printed("In [24]", "characters", "20479"),
    "tokens": Printed("In [24]", "tokens", "5145"),
    "train batches": Printed("In [27]", "batches of the train loader", str([((2, 256), (2, 256))] * 9)),
    "val batches": Printed("In [27]", "batches of the validation loader", str([((2, 256), (2, 256))])),
    "train tokens": Printed("In [28]", "training tokens", "4608"),
    "val tokens": Printed("In [28]", "validation tokens", "512"),
    "all tokens": Printed("In [28]", "all tokens", "5120"),
    "train loss": close("In [30]", "training loss", "10.987583584255642", 1e-5, _ON_A_GPU),
    "val loss": close("In [30]", "validation loss", "10.98110580444336", 1e-5, _ON_A_GPU),
    **{
        f"toy {temperature}": Printed(
            "5.3", f"1,000 draws from nine words, temperature {temperature:g}", str([*counts])
        )
        for temperature, counts in TOY_COUNTS.items()
    },
    "toy top 3": Printed(
        "5.3",
        "probabilities of the top three",
        "[0.0615, 0.0000, 0.0000, 0.5775, 0.0000, 0.0000, 0.0000, 0.3610, 0.0000]",
        numbers(".4f"),
    ),
    **{f"step {step}": losses(step, step // STEPS_AN_EPOCH + 1, *pair) for step, pair in LOSSES.items()},
    **{f"epoch {i}": sample("5.2", f"sample after epoch {i}", text) for i, text in enumerate(SAMPLES, 1)},
    "greedy 25": sample("5.3", "25 greedy tokens of the trained model", GREEDY_25),
    "top-k 25": sample("5.3", "15 tokens, top-k 25, temperature 1.4", TOP_K_25),
}
"""Every figure by a name of its own, not quite in the order in which a replay comes to them."""
