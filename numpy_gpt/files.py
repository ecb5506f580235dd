"""Files: those that do not travel with the package, known by their SHA-256; and how any file is written, whole."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy_gpt.errors import InputError

TIMEOUT = 10.0
"""Seconds to wait for a connection, and then for each next piece of a download."""


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; what is there when the block ends takes file's place, at once and for good.

    It is on the disk before it is renamed, and the new name before this returns, so that neither a kill nor a power
    cut at any instant leaves less than the old file or the new. A block that fails leaves the old one.
    """
    sweep(file)
    # a folder of its own, for what a library may leave behind in it; and no other writer's, who would take it away
    folder = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        folder.mkdir()
        yield folder / file.name
        flush(folder / file.name)
        (folder / file.name).replace(file)
        flush(file.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(file: Path) -> None:
    """Take away what `replacing` left beside a file of this name, or of this pattern, in processes that were killed."""
    for left in file.parent.glob(f".{file.name}.*.partial"):
        pid = re.search(r"\.(\d+)-\d+\.partial$", left.name)
        if pid and not _alive(int(pid[1])):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # where asking is not safe: os.kill ends the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder, to be filled in the block; what fails in the block takes it away again.

    Raises InputError if there is something in it, or it cannot be made.
    """
    try:
        there = folder.exists()
        if there and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and is not empty: choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error
    try:
        yield
    except BaseException:
        for each in folder.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        if not there:
            folder.rmdir()
        raise


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call for folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError if it is not there, or holds something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error}): put it there") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}): it is damaged or another file") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no JSON object: it is damaged or another file")
    return values


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
    except (
        OSError,
        ValueError,
    ) as error:  # requests' exceptions are OSErrors; pooch's for a wrong hash is a ValueError
        wrong.append(f"{url} {reason(error)}")
        raise InputError(f"{what} was not found: {'; '.join(wrong)}: {mend}") from error


def _download(url: str, sha256: str, store: Path) -> bytes:
    import pooch  # type: ignore[import-untyped]  # here, since it takes longer to import than all of numpy_gpt

    # pooch writes under another name, verifies, and only then renames. The files are small: taken whole rather than
    # streamed, for then requests closes a connection that breaks off.
    fetch = pooch.HTTPDownloader(timeout=TIMEOUT, stream=False)
    path = Path(pooch.retrieve(url, f"sha256:{sha256}", fname=store.name, path=store.parent, downloader=fetch))
    # pooch makes files only their owner can read, and tiktoken fails on such a file in the cache that users share.
    path.chmod(0o644)
    return path.read_bytes()


def reason(error: Exception) -> str:
    """What went wrong with a download, in the words of the user rather than of urllib3."""
    if isinstance(error, ValueError) and "hash" in str(error):
        return "holds another file than the one known (its SHA-256 differs)"
    if (response := getattr(error, "response", None)) is not None:
        return f"answered {response.status_code} {response.reason}"
    if "timed out" in str(error):
        return f"did not answer within {TIMEOUT:g} seconds"
    if isinstance(error, OSError) and error.filename:
        return f"could not be kept as {error.filename} ({error.strerror})"
    if "Connection broken" in str(error):
        return "broke off before the end"
    return f"could not be reached ({type(error).__name__})"
