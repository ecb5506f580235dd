"""Ctrl-C at any bytecode inside a save or after any file operation, and an error at any file operation.

After each, the checkpoint must be that of the last completed save or of the one in progress, and the resumed run must
match an undisturbed one bit for bit; before the first save, the command must say so. Nothing may be left over, and
nothing that the run did not make may be touched. The commands must end without a traceback.
"""

import errno
import json
import os
import random
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partialmethod
from pathlib import Path
from unittest.mock import patch

import numpy_gpt
from numpy_gpt.runs.folder import Run
from parity_tests.tools.file_operations import ERRORS, READING, Fault, watched
from parity_tests.tools.trials import DifferentError, Stage

OURS = str(Path(numpy_gpt.__file__).parent)

RUNS = ("new", "resumed")

LASTING = ("ENOSPC", "EIO", "EROFS")
"""Errors that may occur once, or at every later operation that changes files."""


class Bytecodes:
    """Counts this thread's bytecodes while armed, and raises KeyboardInterrupt at chosen ones.

    Those of this module do not count. ours: count only numpy_gpt's functions. at: the bytecode to interrupt, counted
    from 1; 0: none. again: the number of bytecodes until a second interrupt; 0: none.
    """

    def __init__(self, ours: bool, at: int = 0, again: int = 0):
        self.ours, self.at, self.again, self.count = ours, at, again, 0
        self.struck: list[str] = []

    def arm(self) -> None:
        """Start counting at the caller's next bytecode."""
        self.count = 0
        self._trace(sys._getframe(1))

    def disarm(self) -> None:
        """Stop counting, unless it has struck: a second interrupt may still hit the clean-up."""
        if not self.struck:
            sys.settrace(None)

    def _trace(self, frame) -> None:
        sys.settrace(self._call)
        while frame is not None:
            frame.f_trace = self._call(frame, "call", None)
            frame = frame.f_back

    def _call(self, frame, event, arg):
        file = frame.f_code.co_filename
        if file == __file__ or (self.ours and not file.startswith(OURS)):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame, event, arg):
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                self.struck.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                self.at, self.again = self.count + self.again if self.again else 0, 0
                if self.at:  # an exception in a trace function ends the tracing
                    sys.setprofile(self._resume)
                raise KeyboardInterrupt
        return self._step

    def _resume(self, frame, event, arg):
        sys.setprofile(None)
        self._trace(frame)


@contextmanager
def at_bytecode(told: Path, ours: bool, span: int = 0, at: int = 0, again: int = 0) -> Iterator[None]:
    """In the block, interrupt the span-th creation, save or resumption at a bytecode.

    told: file for the number of bytecodes in each, and the lines interrupted.
    """
    bytecodes, counts = Bytecodes(ours, at, again), []

    def method(self, real, *args, **kwargs):
        return counted(real, self, *args, **kwargs)

    def counted(real, *args, **kwargs):
        if at and len(counts) != span:
            counts.append(0)
            return real(*args, **kwargs)
        bytecodes.arm()
        try:
            return real(*args, **kwargs)
        finally:
            bytecodes.disarm()
            counts.append(bytecodes.count)

    create = Run.create

    @contextmanager
    def created(*args):
        with ExitStack() as stack:
            yield counted(stack.enter_context, create(*args))

    with ExitStack() as stack:
        stack.enter_context(patch.object(Run, "create", created))
        for name in ("save", "resume"):
            stack.enter_context(patch.object(Run, name, partialmethod(method, getattr(Run, name))))
        try:
            yield
        finally:
            sys.settrace(None)
            sys.setprofile(None)
            told.write_text(json.dumps({"counts": counts, "struck": bytecodes.struck}))


@contextmanager
def at_operation(told: Path, folder: Path, fault: Fault | None = None) -> Iterator[None]:
    """In the block, inject the fault below folder. told: file for all operations and those struck."""
    try:
        with watched(folder, fault) as operations:
            yield
    finally:
        told.write_text(json.dumps({"seen": operations.seen, "struck": operations.struck}))


@contextmanager
def folders_that_cannot_be_flushed(told: Path) -> Iterator[None]:
    """In the block, fsync of a folder fails with EINVAL, as on some file systems. told: file for the failed calls."""
    real, struck = os.fsync, []

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            struck.append("fsync of a folder")
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    try:
        with patch.object(os, "fsync", fsync):
            yield
    finally:
        told.write_text(json.dumps({"struck": struck}))


class Saves:
    """Trials, identified by name, of interrupts and errors in a run that saves at every step."""

    def __init__(self, base: Path):
        self.stage, self._told = Stage(base), base / "told"

    def bytecodes(self, trials: int, seed: int) -> list[str]:
        """Plan interrupts at random bytecodes, about half of them followed by a second one.

        Half are at bytecodes of numpy_gpt, the others anywhere; nine of ten are in a new run.
        """
        counts = {}
        for run in RUNS:
            for whose in ("ours", "any"):
                self.stage.disturbed(run == "resumed", at_bytecode(self._told, whose == "ours"))
                counts[run, whose] = json.loads(self._told.read_text())["counts"]
        rng, names = random.Random(seed), []
        for k in range(trials):
            run, whose = rng.choices(RUNS, (9, 1))[0], ("ours", "any")[k % 2]
            span = rng.randrange(len(counts[run, whose]))
            again = int(2 ** rng.uniform(0, 12)) if rng.random() < 0.5 else 0
            names.append(f"bytecodes {run} {whose} {span} {rng.randint(1, counts[run, whose][span])} {again}")
        return names

    def operations(self, every: int, seed: int) -> list[str]:
        """Plan an interrupt after every operation (or every `every`-th); a third also with a second interrupt."""
        rng, names = random.Random(seed), []
        for run in RUNS:
            numbers = range(0, len(self.seen(run)), every)
            names += [f"operations {run} {number} 0" for number in numbers]
            names += [f"operations {run} {number} {rng.randint(1, 12)}" for number in numbers[::3]]
        return names

    def errors(self, every: int, seed: int) -> list[str]:
        """Plan every error at each operation that changes files, and two errors at each that reads.

        With `every` above 1: one error, in turn, at every `every`-th operation.
        """
        names = []
        for run in RUNS:
            for number, operation in enumerate(self.seen(run)):
                kinds = [(name, "once") for name in ERRORS] + [(name, "lasting") for name in LASTING]
                if operation.startswith(tuple(READING)):
                    kinds = [] if operation.startswith("close") else [("EIO", "once"), ("EACCES", "once")]
                if kinds and every > 1:
                    kinds = [kinds[number // every % len(kinds)]] if number % every == seed % every else []
                names += [f"errors {run} {number} {name} {how}" for name, how in kinds]
            names.append(f"errors {run} folders EINVAL lasting")
        return names

    def trial(self, name: str) -> str:
        """Do the trial of this name. -> how the run continued. Raises DifferentError at a fault."""
        kind, run, *words = name.split()
        if kind == "bytecodes":
            span, at, again = map(int, words[1:])
            disturb = at_bytecode(self._told, words[0] == "ours", span, at, again)
        elif words[0] == "folders":
            disturb = folders_that_cannot_be_flushed(self._told)
        elif kind == "operations":
            disturb = at_operation(self._told, self.stage.trial, Fault(int(words[0]), again=int(words[1])))
        else:
            fault = Fault(int(words[0]), ERRORS[words[1]], words[2] == "lasting")
            disturb = at_operation(self._told, self.stage.trial, fault)
        self._told.unlink(missing_ok=True)
        ending = self.stage.disturbed(run == "resumed", disturb)
        struck = json.loads(self._told.read_text())["struck"]
        if not struck:
            return "not reached"
        codes = {0, 2} if kind == "errors" else {0, 1, 130}
        try:
            # shutil.rmtree, interrupted twice, closes a folder twice
            closed_twice = kind == "bytecodes" and "Bad file descriptor" in ending.errors
            if ending.traceback or not (closed_twice or ending.code in ({0} if words[0] == "folders" else codes)):
                raise DifferentError(f"the command ends with {ending.code}: {ending.last_line}")
            return self.stage.finish(noted=kind == "errors" and "note: " in ending.output)
        except Exception as error:  # a checkpoint that does not load is a fault too
            text = str(error) if isinstance(error, DifferentError) else repr(error)
            raise DifferentError(f"[{'; '.join(struck[:2])}] {text}") from error

    def seen(self, run: str) -> list[str]:
        """The file operations of an undisturbed run."""
        self.stage.disturbed(run == "resumed", at_operation(self._told, self.stage.trial))
        return json.loads(self._told.read_text())["seen"]
