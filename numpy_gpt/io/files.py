"""Atomic writing of files, and removal of what killed writers left behind."""

import errno
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from numpy_gpt.errors import InputError

PARTIAL = re.compile(r"\.(.+)\.(\d+)@([0-9a-f]{8})-\d+\.partial", re.DOTALL)
"""A partial folder's name: its target's name, its process number, its host's hash, and a counter."""

HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
"""A hash of this machine's name: process numbers repeat among machines that share a disk."""

_numbers = count()
"""Counts this process's partial folders."""


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to; when the block ends, the file there replaces `file` atomically and durably.

    The content is flushed to disk before the rename, and the new name before this returns: after a kill or a power cut
    at any moment, either the old file or the new one is complete. If the block fails, the old file stays.
    """
    with partial_folder(file) as folder:  # a folder, because a library may leave other files beside its output
        yield folder / file.name
        flush(folder / file.name)
        (folder / file.name).replace(file)
        flush(file.parent)


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A new folder next to target, .NAME.….partial, removed at the end with its content.

    It stays locked until then, so that `sweep` removes only those that killed processes left.
    """
    sweep(target)
    folder, held = _new_partial(target)
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            unlock(held)


def _new_partial(target: Path) -> tuple[Path, int | None]:
    """A new folder with a unique name, and its lock."""
    while True:
        folder = target.with_name(f".{target.name}.{os.getpid()}@{HOST}-{next(_numbers)}.partial")
        with suppress(FileExistsError):  # another process's
            folder.mkdir()
            with suppress(BlockingIOError, FileNotFoundError):  # swept by another before it was locked
                return folder, lock(folder)


def sweep(target: Path) -> None:
    """Remove the partial folders that killed processes left for this target."""
    for left in _partials(target.parent, target.name):
        _remove_unless_in_use(left)


def sweep_folder(folder: Path) -> None:
    """Remove all partial folders that killed processes left in a folder."""
    for left in _partials(folder):
        _remove_unless_in_use(left)


def _remove_unless_in_use(partial: Path) -> None:
    with suppress(OSError):  # held by another process, already gone, or another user's
        held = lock(partial)
        try:
            if held is not None or not _maker_lives(partial):
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            unlock(held)


def _partials(folder: Path, name: str | None = None) -> list[Path]:
    """The partial folders in a folder: all, or those of the target with this name."""
    try:
        found = [(path, PARTIAL.fullmatch(path.name)) for path in folder.iterdir()]
    except OSError:  # it cannot be listed: writing into it will raise the error
        return []
    return [path for path, match in found if match and name in (None, match[1]) and _is_own_folder(path)]


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def being_written(target: Path) -> bool:
    """Whether any process is inside a `partial_folder` block for target."""
    for partial in _partials(target.parent, target.name):
        try:
            held = lock(partial)
        except OSError:
            return True
        unlock(held)
        if held is None and _maker_lives(partial):
            return True
    return False


def lock(folder: Path) -> int | None:
    """Lock a folder against other callers, until `unlock` or the end of the process.

    Returns None where the system or the file system lacks such locks (Windows, some network disks), and for an
    unreadable folder. Raises BlockingIOError if it is locked, FileNotFoundError if it is gone.
    """
    try:
        import fcntl

        held = os.open(folder, os.O_RDONLY)
    except (ImportError, PermissionError):
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(held), folder.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    except (BlockingIOError, FileNotFoundError):
        os.close(held)
        raise
    except OSError:
        os.close(held)
        return None
    except BaseException:
        os.close(held)
        raise
    return held


def unlock(held: int | None) -> None:
    """Release what `lock` returned."""
    if held is not None:
        os.close(held)


def _maker_lives(partial: Path) -> bool:
    """Whether the process named in a partial folder's name may still be running; used where locks are unavailable."""
    maker = PARTIAL.fullmatch(partial.name)
    if maker is None or maker[3] != HOST or os.name == "nt":  # on Windows os.kill would end the process
        return True
    try:
        os.kill(int(maker[2]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into an InputError that names path, or the file in its way, and the fix."""
    try:
        yield
    except OSError as error:
        in_the_way = error.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR)
        place = (error.filename2 or error.filename or path) if in_the_way else path
        raise InputError(f"cannot write {place}: {error.strerror or error}; {disk_fix(error)}") from error


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, ignoring errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk, where the file system supports that."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call for folders
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return  # writable but not readable
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)


def disk_fix(error: OSError) -> str:
    """The fix to suggest for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room there"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "let this user write there"
    if error.errno == errno.EROFS:
        return "remount that disk for writing"
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        return "move what is in the way"
    if error.errno == errno.ENOENT:
        return "something removed it meanwhile: try again"
    return "check that disk"
