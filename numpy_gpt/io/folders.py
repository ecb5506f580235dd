"""New folders: taken by one process alone, or filled under another name until they are complete."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from numpy_gpt.errors import InputError
from numpy_gpt.files import PARTIAL, flush, lock, partial_folder, remove, unlock


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Make a folder, or take an empty one, for this process alone until the block ends.

    Raises InputError if there is something in it, another process has taken it, or it cannot be made. If the block
    fails, the folders made here are removed as far as they are empty: what others put there stays.
    """
    with _made(folder):
        try:
            held = lock(folder)
        except BlockingIOError as error:
            raise InputError(f"another process is working in {folder}: choose another --out") from error
        except OSError as error:
            raise InputError(f"{folder} cannot be used ({error.strerror}): choose another --out") from error
        try:
            check_free(folder)
            yield
        finally:
            unlock(held)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill in the block under another name; what is in it at the end appears in `folder`.

    `folder` must be new or empty, before and after. A block that fails leaves nothing, and removes nothing that others
    have put there meanwhile. Raises InputError if it is not empty, or cannot be made.
    """
    check_free(folder)
    # inside a folder that exists, for it may be a disk of its own
    beside = folder / (folder.name or "new") if folder.is_dir() else folder  # "." has no name
    with _made(folder.parent), ExitStack() as stack:
        try:
            partial = stack.enter_context(partial_folder(beside))
        except OSError as error:
            raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error
        yield partial
        with taken(folder):
            _move_content(partial, folder)


def check_free(folder: Path) -> None:
    """Raise InputError unless a folder can be made here, or is there and empty (but for what is being written)."""
    try:
        if folder.is_dir():
            free = all(PARTIAL.fullmatch(each.name) for each in folder.iterdir())
        else:
            free = not os.path.lexists(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be used ({error.strerror}): choose another --out") from error
    if not free:
        raise InputError(f"{folder} exists and is not empty: choose another --out")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; those made are removed if the block fails, as far as they are empty."""
    made: list[Path] = []
    try:
        try:
            for each in [*reversed(folder.parents), folder]:
                if not each.is_dir():
                    try:
                        each.mkdir()
                    except FileExistsError:
                        if not each.is_dir():
                            raise
                    else:  # and no other process did
                        made.append(each)
        except OSError as error:
            raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error
        yield
    except BaseException:
        for each in reversed(made):
            with suppress(OSError):
                each.rmdir()  # which removes none with something in it
        raise


def _move_content(source: Path, folder: Path) -> None:
    """Move what is in source to folder; if that fails, remove what has been moved."""
    moved: list[Path] = []
    try:
        for each in sorted(source.iterdir()):
            moved.append(folder / each.name)
            try:
                each.rename(folder / each.name)
            except OSError:
                moved.pop()  # another's, where no lock tells
                raise
        flush(folder)
        flush(folder.parent)
    except BaseException as error:
        for each in moved:
            remove(each)
        if isinstance(error, OSError):
            raise InputError(f"cannot write into {folder}: {error.strerror}; choose another --out") from error
        raise
