"""python -m parity_tests.tools.team_gradients FOLDER PARALLEL, on several processes: the first step's gradients.

FOLDER has config.json and batch.npz with x and y; rank 0 writes gradients.npz, in float64.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from numpy_gpt.config import GPTConfig
from numpy_gpt.runs.settings import Settings
from torch_gpt.parallel import Member, TeamLearner
from torch_gpt.processes import joined


class Graded(Member):
    """A member whose gradients can be fetched."""

    def gradients(self, x, y):
        loss = self._backward(x, y)
        return {"loss": np.array(loss)} | {name: self._array(p.grad) for name, p in self._parameters.items()}


def main():
    folder, parallel = Path(sys.argv[1]), sys.argv[2]
    with joined(sys.argv[1:], Graded) as team:
        config = GPTConfig.from_dict(json.loads((folder / "config.json").read_text()))
        options = {"device": torch.device("cpu"), "dtype": "float64", "attention": "plain", "compiled": False}
        settings = Settings(context_length=config.context_length, batch_size=8)
        TeamLearner(config, settings, 1, team=team, parallel=parallel, **options)
        batch = np.load(folder / "batch.npz")
        np.savez(folder / "gradients.npz", **team.call("gradients", batch["x"], batch["y"]))


if __name__ == "__main__":
    main()
