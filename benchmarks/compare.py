"""The regression guard: compares the ratios of a new run with those of a committed one."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy_gpt.errors import InputError

BASELINE = Path(__file__).parent / "cpu.json"


@dataclass(frozen=True)
class Change:
    """One ratio of the baseline, compared with the new run. now is None if the new run lacks it.

    worse: by more than the tolerance, or missing although the same command was run.
    """

    name: str
    before: float
    now: float | None
    worse: bool

    def __str__(self) -> str:
        if self.now is None:
            return f"{self.name}: {'missing' if self.worse else 'not measured'}, was {self.before:.3f}"
        return f"{self.name}: {self.now:.3f}, was {self.before:.3f}"


def read(path: Path) -> dict[str, Any]:
    """A file that the benchmarks wrote. Raises InputError if it is not one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        str(document["machine"]["line"])
        for ratio in ratios(document).values():
            _worse(ratio, ratio, 0.0)  # checks that every field is present and a number
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}: python -m benchmarks all writes one") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise InputError(f"{path} is not a file that python -m benchmarks wrote: it is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{path} is not a file that python -m benchmarks wrote, or is cut short: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is JSON, but not a file that python -m benchmarks all wrote") from error
    return dict(document)


def ratios(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every ratio of a document, as "case: ratio"."""
    return {f"{row['name']}: {name}": r for row in document["rows"] for name, r in row["ratios"].items()}


def compare(baseline: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[Change]:
    """Every ratio of the baseline, compared with the new run's.

    A ratio is worse if it moved in the wrong direction by more than the tolerance, as a share of the baseline, and the
    middle half of its pairs does not overlap the baseline's: a single slow round is not a regression.
    """
    if not tolerance >= 0:
        raise InputError(f"the tolerance must be a share of at least 0, not {tolerance}")
    old, now = ratios(baseline), ratios(new)
    if not old:
        raise InputError("the baseline has no ratio to compare with: use one that python -m benchmarks all wrote")
    for name, before in old.items():
        if not math.isfinite(before["ratio"]):
            raise InputError(f"the baseline's {name} is {before['ratio']}: measure the baseline again")
    if not old.keys() & now.keys():
        commands = f"the new run is of {_command(new)!r}, the baseline of {_command(baseline)!r}"
        reason = "another model" if _quick(new) != _quick(baseline) else "other measurements"
        raise InputError(f"{reason}: nothing to compare: {commands}")
    same_command = _command(new).split()[:1] == _command(baseline).split()[:1]
    return [
        Change(name, before["ratio"], now[name]["ratio"], _worse(before, now[name], tolerance))
        if name in now
        else Change(name, before["ratio"], None, same_command)
        for name, before in old.items()
    ]


def other_machine(baseline: dict[str, Any], new: dict[str, Any]) -> str:
    """The relevant differences between the machines of two documents, in words; empty if there are none."""
    one, other = baseline["machine"], new["machine"]
    keys = ("processor", "cores", "blas", "torch_threads", "gpu")
    return ", ".join(f"{key} {one.get(key)} and {other.get(key)}" for key in keys if one.get(key) != other.get(key))


def _command(document: dict[str, Any]) -> str:
    return str(document.get("command", ""))


def _quick(document: dict[str, Any]) -> bool:
    return "--quick" in _command(document).split()


def _worse(before: dict[str, Any], now: dict[str, Any], tolerance: float) -> bool:
    if not math.isfinite(now["ratio"]):
        return True
    a, b = (each["pairs"] or {"q1": each["ratio"], "q3": each["ratio"]} for each in (before, now))
    if before["better"] == "higher":
        return bool(now["ratio"] < before["ratio"] * (1 - tolerance) and b["q3"] < a["q1"])
    return bool(now["ratio"] > before["ratio"] * (1 + tolerance) and b["q1"] > a["q3"])
