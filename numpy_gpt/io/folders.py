"""New folders: locked by one process, or filled under a temporary name until complete."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from numpy_gpt.errors import InputError
from numpy_gpt.io.files import PARTIAL, flush, lock, partial_folder, remove, unlock


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Make a folder, or use an empty one, locked by this process until the block ends.

    Raises InputError if it is not empty, is locked by another process, or cannot be made. If the block fails, removes
    the folders it made, unless others have put files in them.
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
    """A temporary folder to fill in the block; its content is moved to `folder` at the end.

    `folder` must be new or empty, before and after. A block that fails leaves nothing behind, and removes nothing that
    others have put there meanwhile. Raises InputError if `folder` is not empty or cannot be made.
    """
    check_free(folder)
    # inside an existing folder, which may be a mount point: renames work only within one disk
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
    """Raise InputError unless the folder is missing, or empty except for unfinished files."""
    try:
        if folder.is_dir():
            free = all(PARTIAL.fullmatch(child.name) for child in folder.iterdir())
        else:
            free = not os.path.lexists(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be used ({error.strerror}): choose another --out") from error
    if not free:
        raise InputError(f"{folder} exists and is not empty: choose another --out")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; if the block fails, remove those made here that are empty."""
    made: list[Path] = []
    try:
        try:
            for level in [*reversed(folder.parents), folder]:
                if not level.is_dir():
                    try:
                        level.mkdir()
                    except FileExistsError:
                        if not level.is_dir():
                            raise
                    else:  # made here, not by another process
                        made.append(level)
        except OSError as error:
            raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error
        yield
    except BaseException:
        for level in reversed(made):
            with suppress(OSError):
                level.rmdir()  # fails unless empty
        raise


def _move_content(source: Path, folder: Path) -> None:
    """Move the content of source to folder; if that fails, remove what was moved."""
    moved: list[Path] = []
    try:
        for child in sorted(source.iterdir()):
            moved.append(folder / child.name)
            try:
                child.rename(folder / child.name)
            except OSError:
                moved.pop()  # without locks, it may be another process's
                raise
        flush(folder)
        flush(folder.parent)
    except BaseException as error:
        for path in moved:
            remove(path)
        if isinstance(error, OSError):
            raise InputError(f"cannot write into {folder}: {error.strerror}; choose another --out") from error
        raise
