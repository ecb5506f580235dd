"""Whatever stops a run or a command: interrupts, errors, signals and races, planned as trials with names, and done.

A trial's name is all it takes to repeat it.
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
"""Kind of trial -> whose method of that name plans trials, and whose method `trial` does them."""

LONG = {"bytecodes": 1000, "operations": 1, "errors": 1, "chains": 100, "races": 520}
"""How many trials of a kind; of operations and errors, at which operations: 1 for each, 2 for every other one."""


@dataclass
class Findings:
    """What came of the trials so far."""

    endings: Counter = field(default_factory=Counter)
    """(kind, how a trial ended) -> how often."""
    faults: list[str] = field(default_factory=list)

    def add(self, other: "Findings") -> None:
        """Enter another's as well."""
        self.endings += other.endings
        self.faults += other.faults


def plan(kind: str, number: int, seed: int) -> list[str]:
    """The names of the trials of a kind; for `number` see LONG."""
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
    """A folder in memory, where there is one."""
    return place if (place := Path("/dev/shm")).is_dir() else None
