"""Files: those that do not travel with the package, known by their SHA-256; and how any file is written, whole."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from numpy_gpt.errors import InputError
from numpy_gpt.formats import foreign
from numpy_gpt.network import NetworkError, ask, read, refused_by
from numpy_gpt.paths import check_regular, refusal

PARTIAL = re.compile(r"\.(.+)\.(\d+)@([0-9a-f]{8})-\d+\.partial", re.DOTALL)
"""The name of a partial folder: that of its target, the number of its process and its host's, and one of its own."""

HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
"""A number for this machine: a folder may lie on a disk that several share, where process numbers repeat."""

_numbers = count()
"""Of this process's partial folders."""

SMALL = 2 << 20
"""Bytes of memory that the contents of any file may take, however short the file."""

VOCABULARY_TIMES = 40
"""Times its size that a vocabulary may take by json_memory: short tokens, one number each, take half of that."""


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; what is there when the block ends takes file's place, at once and for good.

    It is on the disk before it is renamed, and the new name before this returns, so that neither a kill nor a power
    cut at any instant leaves less than the old file or the new. A block that fails leaves the old one.
    """
    with partial_folder(file) as folder:  # a folder, for what a library may leave behind in it
        yield folder / file.name
        flush(folder / file.name)
        (folder / file.name).replace(file)
        flush(file.parent)


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A new folder beside target, .NAME.….partial, removed at the end with what is still in it.

    It is locked meanwhile, so that `sweep` can tell it from one that a killed process left.
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
    """A folder of a name that no other has, and its lock."""
    while True:
        folder = target.with_name(f".{target.name}.{os.getpid()}@{HOST}-{next(_numbers)}.partial")
        with suppress(FileExistsError):  # another process's
            folder.mkdir()
            with suppress(BlockingIOError, FileNotFoundError):  # swept by another before it was locked
                return folder, lock(folder)


def sweep(target: Path) -> None:
    """Remove the partial folders that killed processes left beside a target of this name."""
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
    """The partial folders in a folder, or those beside a target of this name."""
    try:
        found = [(each, PARTIAL.fullmatch(each.name)) for each in folder.iterdir()]
    except OSError:  # it cannot be listed: whoever writes into it will say so
        return []
    return [each for each, match in found if match and name in (None, match[1]) and _is_own_folder(each)]


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def being_written(target: Path) -> bool:
    """Whether any process is in the block of a `partial_folder` beside target."""
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
    """Lock a folder against every other caller of this, for `unlock` to release; the system does when a process ends.

    None where the system or the file system has no such locks (Windows, some network disks), and for a folder that may
    not be read. Raises BlockingIOError if it is locked, FileNotFoundError if it has gone.
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
    """Whether the process named in a partial folder's name may still run: for where nothing can be locked."""
    maker = PARTIAL.fullmatch(partial.name)
    if maker is None or maker[3] != HOST or os.name == "nt":  # where asking is not safe: os.kill ends the process
        return True
    try:
        os.kill(int(maker[2]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


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


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk, where the file system can say so."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call for folders
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return  # one that may be written to and not read
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do it for folders
            raise
    finally:
        os.close(handle)


def read_json(file: Path, times: int = 2) -> dict[str, Any]:
    """The JSON object in a file, which may take `times` the file's size in memory, or 2 MiB.

    Raises InputError if it is not there, holds something else, or would take more: that is judged before it is parsed.
    """
    try:
        check_regular(file)
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            room = max(SMALL, times * size)
            values = parse_json(f.read(min(size or room, room // 4) + 1), room)
    except FileNotFoundError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): put it there") from error
    except OSError as error:
        raise InputError(refusal(file, error)) from error
    except (ValueError, RecursionError) as error:
        words = foreign(file, "text", fix="put the right file in its place")
        why = f": {words}" if words else f" ({error}): it is damaged or another file"
        raise InputError(f"{file} cannot be used as JSON{why}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no JSON object: it is damaged or another file")
    return values


def parse_json(content: bytes, room: int) -> Any:
    """The value that JSON in UTF-8 describes. Raises ValueError if that may take more than `room` bytes of memory."""
    if (most := json_memory(content)) > room:
        raise ValueError(f"its {len(content):,} bytes may become {most:,} in memory, more than the {room:,} allowed")
    return json.loads(content.decode("utf-8"))


def json_memory(content: bytes) -> int:
    """An upper bound of the bytes that this JSON takes while it is parsed, from its length and its punctuation.

    Each value follows a comma or a bracket and takes up to 96 bytes: a short string, or a list of one value. A key
    takes up to 192: itself, and its slots in the dict and in the parser's memo, which double as they grow. The text is
    there as bytes, as a string and inside the values; one character beyond Latin-1 widens all others of its string.
    """
    wide = not content.isascii() or b"\\u" in content
    return (9 if wide else 4) * len(content) + 96 * sum(map(content.count, b",[{")) + 192 * content.count(b":")


@contextmanager
def temporary_files(use: str, contents: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary folder with these files, name -> content, removed at the end.

    Raises InputError, which names their use, where no folder can be made or there is no room.
    """
    with ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for name, content in contents.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise InputError(
                f"{use} needs a temporary folder, and none can be used ({error.strerror or error}): "
                "set TMPDIR to a folder with room in it"
            ) from error
        yield folder


def data_folder_file(name: str) -> Path | str:
    """Where the relative path `name` would lie in $NUMPY_GPT_DATA, or the words that there is no such folder."""
    folder = os.environ.get("NUMPY_GPT_DATA")
    return Path(folder, name) if folder else "$NUMPY_GPT_DATA is not set"


def find(what: str, sha256: str, places: Iterable[Path | str], url: str, store: Path | None, mend: str) -> bytes:
    """The bytes of the first file among `places` with this SHA-256, else of the download from `url`, kept as `store`.

    A place is a path, or the words that say why there is none. A file with another hash is passed over, and only a
    download replaces it; nothing but a whole and verified file ever takes the name `store`. None keeps nothing.

    Raises InputError, which says what was wrong with each place and ends with `mend`.
    """
    wrong: list[str] = []
    for place in places:
        if isinstance(place, str):
            wrong.append(place)
            continue
        try:
            with suppress(FileNotFoundError):
                check_regular(place)
            content = place.read_bytes()
        except FileNotFoundError:
            wrong.append(f"{place} does not exist")
        except OSError as error:
            wrong.append(f"{place} cannot be read ({error.strerror})")
        else:
            # These very bytes are what the caller gets: a file changed after the check could not slip in.
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
            wrong.append(f"{place} is damaged or another file (its SHA-256 is not {sha256[:8]}…)")
    try:
        if store:
            return _download(url, sha256, store)
        with tempfile.TemporaryDirectory() as folder:
            return _download(url, sha256, Path(folder, "download"))
    except NetworkError as error:
        wrong.append(f"{url} {error}")
        raise InputError(f"{what} was not found: {'; '.join(wrong)}: {mend}") from error
    except OSError as error:
        kept = f"could not be kept as {error.filename or store} ({error.strerror or error}; {disk_fix(error)})"
        raise InputError(f"{what} was not found: {'; '.join([*wrong, f'{url} {kept}'])}: {mend}") from error


def _download(url: str, sha256: str, store: Path) -> bytes:
    import pooch  # type: ignore[import-untyped]  # here, since it takes longer to import than all of numpy_gpt

    def fetch(url: str, file: str, _: object) -> None:
        with ask(url) as answer:
            if answer.status_code != 200:
                raise refused_by(answer)
            content = b"".join(read(answer, 1 << 16))  # these files are small
        if hashlib.sha256(content).hexdigest() != sha256:
            raise NetworkError("holds another file than the one known (its SHA-256 differs)")
        Path(file).write_bytes(content)
        # pooch makes files only their owner can read, and tiktoken fails on such a file in the cache that users share.
        Path(file).chmod(0o644)

    store.parent.mkdir(parents=True, exist_ok=True)  # pooch fails where another process makes it at the same time
    # pooch writes under another name, verifies, and only then renames.
    return Path(
        pooch.retrieve(url, f"sha256:{sha256}", fname=store.name, path=store.parent, downloader=fetch)
    ).read_bytes()


def disk_fix(error: OSError) -> str:
    """What to do about a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room there"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "let this user write there"
    if error.errno == errno.EROFS:
        return "remount that disk for writing"
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        return "move away what lies in its place"
    if error.errno == errno.ENOENT:
        return "something took it away meanwhile: try again"
    return "check that disk"
