"""The book's chapter 5 in torch: the second column of `numpy-gpt chapter5`."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from numpy_gpt.book.chapter5 import replay
from numpy_gpt.config import GPTConfig
from numpy_gpt.runs.settings import Settings
from numpy_gpt.typing import Array
from torch_gpt.train import TorchLearner


class TorchChapter(TorchLearner):
    """The book's chapter in torch: on the CPU, attention step by step. See numpy_gpt.book.chapter5.Chapter."""

    def __init__(self, config: GPTConfig, settings: Settings, total_steps: int):
        super().__init__(config, settings, total_steps, device=torch.device("cpu"), attention="plain")

    def seed(self) -> None:
        torch.manual_seed(self._seed)

    def predict(self, x: Array, y: Array) -> dict[str, Any]:
        self.model.eval()
        targets = torch.from_numpy(y)
        with torch.no_grad():
            logits = self.model(torch.from_numpy(x))
        flat, flat_targets = logits.flatten(0, 1), targets.flatten()
        probas = torch.softmax(logits, dim=-1)
        target_probas = probas.gather(-1, targets[..., None])[..., 0]
        log_probas = torch.log(target_probas).flatten()
        loss = torch.nn.functional.cross_entropy(flat, flat_targets)
        return {
            "probas shape": str(tuple(probas.shape)),
            "argmax": torch.argmax(probas, dim=-1, keepdim=True).tolist(),
            "probas 0": target_probas[0].tolist(),
            "probas 1": target_probas[1].tolist(),
            "log probas": log_probas.tolist(),
            "mean": log_probas.mean().item(),
            "negative mean": (log_probas.mean() * -1).item(),
            "logits shape": str(tuple(logits.shape)),
            "targets shape": str(tuple(targets.shape)),
            "flat logits shape": str(tuple(flat.shape)),
            "flat targets shape": str(tuple(flat_targets.shape)),
            "cross-entropy": loss.item(),
            "perplexity": torch.exp(loss).item(),
        }

    def toy_counts(self, logits: Sequence[float], temperature: float, draws: int) -> list[int]:
        self.seed()
        probas = torch.softmax(torch.tensor(logits) / temperature, dim=0)
        ids = torch.tensor([torch.multinomial(probas, num_samples=1).item() for _ in range(draws)])
        counts: list[int] = torch.bincount(ids, minlength=len(logits)).tolist()
        return counts

    def toy_top_k(self, logits: Sequence[float], k: int) -> list[float]:
        given = torch.tensor(logits)
        lowest = torch.topk(given, k).values[-1]
        kept: list[float] = torch.softmax(given.masked_fill(given < lowest, -torch.inf), dim=0).tolist()
        return kept


def answer(text: str, quick: bool) -> None:
    """For every line on stdin, write the replay's next item to stdout as a line of JSON, until the replay ends."""
    items = replay(TorchChapter, text, quick)
    for _ in sys.stdin:
        item = next(items, None)
        if item is None:
            return
        print(json.dumps(item), flush=True)
