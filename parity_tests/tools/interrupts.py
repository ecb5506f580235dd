"""Plans and runs named trials that disturb a run or a command: interrupts, errors, signals and races.

A trial can be repeated by its name alone.
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parity_tests.tools.chains import Chains
from parity_tests.tools.races import Races
from parity_tests.tools.saves import Saves
from parity_tests.tools.trials import DifferentError

KINDS: dict[str, type] = {"bytecodes": Saves, "operations": Saves, "errors": Saves, "chains": Chains, "races": Races}
"""Kind of trial -> the class whose method of that name plans trials, and whose method `trial` does one."""

LONG = {"bytecodes": 1000, "operations": 1, "errors": 1, "chains": 100, "races": 520}
"""Trials per kind; for operations and errors instead the stride: 1 for every operation, 2 for every other one."""


@dataclass
class Findings:
    """The results of the trials so far."""

    endings: Counter = field(default_factory=Counter)
    """(kind, ending of a trial) -> count."""
    faults: list[str] = field(default_factory=list)

    def add(self, other: "Findings") -> None:
        """Add another's results."""
        self.endings += other.endings
        self.faults += other.faults


def plan(kind: str, number: int, seed: int) -> list[str]:
    """The names of a kind's trials; number: as in LONG."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as base:
        return getattr(KINDS[kind](Path(base)), kind)(number, seed)


def do(names: Sequence[str]) -> Findings:
    """Do the trials of these names."""
    found, made = Findings(), {}
    with tempfile.TemporaryDirectory(dir=in_memory()) as base:
        for name in names:
            kind = name.partition(" ")[0]
            if KINDS[kind] not in made:
                (place := Path(base, kind)).mkdir()
                made[KINDS[kind]] = KINDS[kind](place)
            try:
                ending = made[KINDS[kind]].trial(name)
            except Exception as error:  # a checkpoint that does not load is a fault too
                ending = "fault"
                found.faults.append(f"{name}: {error if isinstance(error, DifferentError) else repr(error)}")
            found.endings[kind, ending] += 1
    return found


def in_memory() -> Path | None:
    """A folder in memory, or None if the system has none."""
    return place if (place := Path("/dev/shm")).is_dir() else None
