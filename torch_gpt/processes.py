"""Several processes as one program: found by the launcher's variables, led by rank 0, ended together.

Rank 0 runs the command and alone reads, prints and writes. The others execute the calls that it sends them, until it
ends or dies. All ends of processes are noticed through a connection that carries nothing else.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist

from numpy_gpt.errors import DivergedError, InputError, LostProcessError
from numpy_gpt.io.outermost import INTERRUPTED, UNFORESEEN, say
from torch_gpt.launchers import Place, launched, meeting_point

Parallel = Literal["ddp", "fsdp"]
"""ddp: every process has all parameters; fsdp: each has a share of them, of their gradients and of AdamW's moments."""

COLLECTIVE, FOREVER = timedelta(minutes=10), timedelta(days=365)
"""Longest wait for the other processes within a computation, and for the next call."""

NOTICED, GRACE = 5.0, 30.0
"""NOTICED: seconds to find out which process broke a connection. GRACE: seconds before rank 0 gives up on a computation
with a dead process."""

WAITING = 15.0
"""Seconds after which rank 0 says that it is waiting for the others to start."""

RESUME = ": resume the run from its last save, if it has one, with --resume"

ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals that end a process; Windows has no SIGHUP."""


@dataclass(frozen=True)
class Process:
    """What rank 0 knows of a process: its pid and host, its command's arguments, and its host's GPUs."""

    pid: int
    host: str
    arguments: list[str]
    local_rank: int
    gpus: int


class Team:
    """The processes of a program. `make` creates, on every rank, the object whose methods are called."""

    def __init__(self, place: Place, arguments: list[str], make: Callable[..., Any]):
        """Join the others. arguments: the command's, which must be the same everywhere."""
        self.place, self._make, self._member = place, make, None
        os.environ.update(meeting_point(os.environ, place.size))
        if torch.cuda.is_available():
            torch.cuda.set_device(place.local_rank % torch.cuda.device_count())  # more processes: see check_gpus
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        self._calling, self._ended = False, threading.Event()
        self._lost: list[int] = []
        self._processes: list[Any] = [None] * place.size
        waiting = threading.Timer(WAITING, self._say_waiting)
        waiting.daemon = True
        waiting.start()
        try:
            with _ending_at_signals():
                dist.init_process_group(backend, rank=place.rank, world_size=place.size, timeout=COLLECTIVE)
                self._control = dist.new_group(backend="gloo", timeout=FOREVER)
                self._watch = dist.new_group(backend="gloo", timeout=FOREVER)
                gpus = torch.cuda.device_count()
                own = Process(os.getpid(), socket.gethostname(), arguments, place.local_rank, gpus)
                dist.all_gather_object(self._processes, own, group=self._control)
        except (RuntimeError, ValueError) as error:
            raise LostProcessError(
                f"the {place.size} processes could not meet at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({error!s:.200}): start them all again, with another MASTER_PORT if it "
                "is in use"
            ) from error
        finally:
            waiting.cancel()
        watched = range(1, place.size) if place.rank == 0 else [0]
        self._watchers = [threading.Thread(target=self._watch_rank, args=(rank,), daemon=True) for rank in watched]
        for watcher in self._watchers:
            watcher.start()

    def _say_waiting(self) -> None:
        if self.place.rank == 0:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            say(f"waiting at {where} for the other {self.place.size - 1} of {self.place.size} processes to start")

    def check_arguments(self) -> None:
        """Raise InputError unless all processes were started with the same arguments."""
        own = self._processes[0].arguments
        for rank, process in enumerate(self._processes):
            if process.arguments != own:
                raise InputError(
                    f"rank {rank} was started with other arguments than rank 0 ({' '.join(process.arguments)!r}, not "
                    f"{' '.join(own)!r}): start all with the same"
                )

    def check_gpus(self) -> None:
        """Raise InputError unless every process has a GPU of its own."""
        for rank, process in enumerate(self._processes):
            if process.local_rank >= process.gpus:
                raise InputError(
                    f"rank {rank} is process {process.local_rank + 1} on {process.host}, whose number of GPUs is "
                    f"{process.gpus}: start as many processes as GPUs, or use --device cpu"
                )

    def call(self, name: str, *args: Any, own: tuple[Any, ...] = ()) -> Any:
        """Rank 0: call this method everywhere and return its result here; "make" creates the object.

        own: further arguments that only rank 0 gets, since it has them in memory; the others get None for each.
        Raises LostProcessError if another process dies meanwhile.
        """
        self._calling = True
        try:
            dist.broadcast_object_list([name, args, len(own)], src=0, group=self._control)
            return self._execute(name, *args, *own)
        except InputError:
            raise
        except Exception as error:
            if lost := self._lost_now():
                raise LostProcessError(lost) from error
            raise
        finally:
            self._calling = False

    def follow(self) -> NoReturn:
        """Other ranks: execute rank 0's calls until it ends or dies, and then end with its exit code."""
        for name in ENDING:  # rank 0 receives them too, and decides
            if (number := getattr(signal, name, None)) is not None:
                signal.signal(number, signal.SIG_IGN)
        try:
            while True:
                call: list[Any] = [None, None, None]
                dist.broadcast_object_list(call, src=0, group=self._control)
                name, args, own = call
                with suppress(DivergedError):  # which rank 0 raises too
                    self._execute(name, *args, *[None] * own)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or re.search("(allocate|out of) memory", str(error)):
                say(
                    f"Error: rank {self.place.rank} is out of memory ({error!s:.200}): use more processes, or a "
                    "smaller model, batch or context"
                )
                os._exit(2)
            if not re.search("gloo|NCCL|[Cc]onnection", str(error)):
                raise
            time.sleep(NOTICED)  # lets rank 0 end this process; if rank 0 waits for it instead, exiting frees rank 0
            os._exit(LostProcessError.exit_code)

    def end(self, code: int) -> None:
        """Rank 0: end the other processes with this exit code."""
        self._ended.set()
        for rank in range(1, self.place.size):
            with suppress(Exception):  # it has died
                dist.send(torch.tensor([code]), dst=rank, group=self._watch)
        for watcher in self._watchers:
            watcher.join(NOTICED)

    def _execute(self, name: str, *args: Any) -> Any:
        if name == "make":
            self._member = self._make(self.place, *args)
            return self._member
        return getattr(self._member, name)(*args)

    def _watch_rank(self, rank: int) -> None:
        """Wait until a process ends: rank 0 sends its exit code first, the others end without sending anything."""
        code = torch.tensor([0])
        try:
            dist.recv(code, src=rank, group=self._watch)
        except Exception:
            if self.place.rank == 0:
                self._note_death(rank)
                return
            if self.place.rank == 1:
                say(
                    f"Error: {self._named(0)} has died: resume the run from its last save, if it has one, with --resume"
                )
            code = torch.tensor([LostProcessError.exit_code])
        sys.stdout.flush()
        os._exit(int(code))  # the main thread may be waiting in a computation that will never end

    def _note_death(self, rank: int) -> None:
        """Rank 0: note that a process has died. If the computation with it does not fail within GRACE, end."""
        if self._ended.is_set():
            return
        self._lost.append(rank)
        if not self._ended.wait(GRACE) and self._calling:
            say(f"Error: {self._named(rank)} has died{RESUME}")
            os._exit(LostProcessError.exit_code)

    def _lost_now(self) -> str:
        """The process that died, for a message; "" if none is known after NOTICED seconds."""
        deadline = time.monotonic() + NOTICED
        while not self._lost and time.monotonic() < deadline:
            time.sleep(0.01)
        return f"{self._named(self._lost[0])} has died" if self._lost else ""

    def _named(self, rank: int) -> str:
        process = self._processes[rank]
        return f"rank {rank} (process {process.pid} on {process.host})"


@contextmanager
def _ending_at_signals() -> Iterator[None]:
    """Let signals end the process at once in the block, which waits outside of Python: nothing is written yet."""
    numbers = [number for name in ENDING if (number := getattr(signal, name, None)) is not None]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not installed by Python, which cannot restore it
                signal.signal(number, handler)


@contextmanager
def joined(arguments: list[str], make: Callable[..., Any]) -> Iterator[Team | None]:
    """The team of this process, or None if it was started alone. Other ranks than 0 never enter the block.

    When rank 0's block ends, all end with its exit code.
    """
    code, team, place = UNFORESEEN, None, None
    try:
        place = launched()
        alone = place is None or (place.size == 1 and "fsdp" not in " ".join(arguments))
        if place is not None and not alone:
            team = Team(place, arguments, make)
            if place.rank > 0:
                team.follow()
            team.check_arguments()
        yield team
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        raise
    except (InputError, LostProcessError) as error:
        code = error.exit_code
        if place is None or place.rank == 0:
            say(f"Error: {error}")
        raise SystemExit(code) from error
    except Exception:
        raise
    except BaseException:  # Ctrl-C, or a signal that ends the process
        code = INTERRUPTED
        raise
    finally:
        if team is not None and team.place.rank == 0:
            team.end(code)
