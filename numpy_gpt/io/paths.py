"""Paths given by users, whose system errors become InputErrors worded for the user."""

import errno
import os
import stat
from pathlib import Path
from typing import Literal

from numpy_gpt.errors import InputError

Kind = Literal["missing", "file", "folder", "pipe", "other"]


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """The kind of file at path, following links: "pipe" is a FIFO or <(command), "other" a device or a socket.

    Raises InputError for a path that cannot be looked up, rather than calling it missing.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and _has_place(path):
            return "missing"
        raise InputError(refusal(path, error)) from error
    kinds: dict[int, Kind] = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe"}
    return kinds.get(stat.S_IFMT(mode), "other")


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether path is a regular file. Raises InputError as kind_of does; Path.is_file hides some of these."""
    return kind_of(path) == "file"


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether path is a folder. Raises InputError as kind_of does."""
    return kind_of(path) == "folder"


def check_readable(file: Path) -> None:
    """Raise InputError unless this user may read an existing file."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise InputError(refusal(file, error)) from error


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError unless path is a regular file or a folder.

    Opening a FIFO waits for its other end, and reading a device may never end.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))


def absolute(path: str | os.PathLike[str]) -> Path:
    """The absolute path, following links except to a pipe, whose link (/dev/stdin) is its only usable name.

    Raises InputError for a path that cannot be looked up, or a relative one in a working directory that is gone.
    """
    kind = kind_of(path)
    try:
        return Path(path).absolute() if kind == "pipe" else Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(refusal(path, error)) from error


def refusal(path: str | os.PathLike[str], error: Exception) -> str:
    """The message, with the fix, for a path that is unusable because of this error."""
    name = os.fspath(path)
    shown = name if len(name) <= 80 else f"{name[:60]}... ({len(name):,} characters)"
    code = getattr(error, "errno", None)
    if code == errno.ENAMETOOLONG:
        return f"{shown!r} is too long to be a path: give the path of a file or folder here, not a text"
    if code == errno.ELOOP or isinstance(error, RuntimeError):
        return f"{shown} is a symbolic link that loops back to itself: give the path of the real file or folder"
    if isinstance(error, PermissionError):
        return f"{shown} may not be read by this user ({error.strerror}): change its permissions or its folder's"
    if isinstance(error, UnicodeError):
        return f"{shown!r} has characters that file names cannot have on this system: give another path"
    if isinstance(error, ValueError):
        return f"{shown!r} has a NUL character, which no path can have: give another path"
    if not _has_place(path):
        return f"{shown} is relative, but the working directory is gone: cd to another, or give an absolute path"
    return f"{shown} cannot be read ({getattr(error, 'strerror', None) or error}): give another path"


def _has_place(path: str | os.PathLike[str]) -> bool:
    """Whether a path can be looked up: a relative one needs an existing working directory."""
    try:
        return os.path.isabs(path) or bool(os.getcwd())
    except OSError:
        return False
