"""Downloads of large files over unreliable connections: resumed on the next try, renamed only when verified.

The bytes received so far of FILE are in .FILE.part; .FILE.part.from describes the file they belong to. Requests for
the rest name that exact file (RFC 9110, sections 13.1.5 and 14). Parts are joined only if it is still that file, or if
a SHA-256 will verify the result.
"""

import hashlib
import json
import operator
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy_gpt.errors import InputError
from numpy_gpt.io.network import NetworkError, ask, read, refused_by
from numpy_gpt.io.paths import check_regular

if TYPE_CHECKING:
    import requests

    from numpy_gpt.console import Report

TRIES = 4
"""Requests to one address while the connection keeps breaking, PAUSE seconds apart."""

PAUSE = 1.0

CHUNK = 1 << 16
"""Bytes read at a time: the most that a broken connection can lose."""


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Remote:
    """A remote file: the addresses to try in turn, and its SHA-256 and length in bytes if known."""

    name: str
    urls: tuple[str, ...]
    sha256: str | None
    length: int | None

    def fault(self, path: Path) -> str | None:
        """What is wrong with the file at path, in words that follow its name; None if it matches what is known."""
        length = path.stat().st_size
        if not path.is_file():
            return "is not a file"
        if length != (self.length or length):
            return f"has {length:,} bytes, not {self.length:,}"
        if self.sha256:
            with path.open("rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != self.sha256:
                    return f"is damaged or another file (its SHA-256 is not {self.sha256[:8]}…)"
        return None if length else "is empty"


class _Part:
    """The bytes received so far of a file, and the note describing that file."""

    def __init__(self, target: Path):
        self.name = target.name
        self.path = target.with_name(f".{target.name}.part")
        self._note = target.with_name(f".{target.name}.part.from")

    @property
    def length(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def note(self) -> dict[str, Any]:
        """url, length and validator (or None) of the complete file; empty if not known."""
        try:
            check_regular(self._note)
            note = json.loads(self._note.read_bytes())
            url, length, validator = str(note["url"]), operator.index(note["length"]), note["validator"]
        except (
            FileNotFoundError,
            ValueError,
            LookupError,
            TypeError,
            RecursionError,
        ):  # missing, or cut short by a crash
            return {}
        sendable = validator is None or (isinstance(validator, str) and validator.isascii() and validator.isprintable())
        return {"url": url, "length": length, "validator": validator} if sendable else {}

    def rest(self, url: str, covered: bool) -> dict[str, str]:
        """The headers that request the rest; empty if there is nothing yet, or if the rest could be another file's.

        covered: a SHA-256 will verify the result, so the rest may come from anywhere.
        """
        note = self.note
        validator = note["validator"] if note.get("url") == url else None
        if not self.length or not (validator or covered):
            return {}
        return {"Range": f"bytes={self.length}-"} | ({"If-Range": validator} if validator else {})

    def begin(self, url: str, length: int, validator: str | None) -> None:
        """Start a part. Removes the old one first, so that it never has another file's note."""
        self.forget()
        self._note.write_text(json.dumps({"url": url, "length": length, "validator": validator}))

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)


def fetch(file: Remote, folder: Path, report: "Report") -> None:
    """Download the file into `folder` unless a correct one exists; an incorrect one stays until it can be replaced.

    Without a known SHA-256, a file is correct if its length is as known, or else as the server announces.

    Raises InputError, which lists what was wrong with each address or says that the disk is full, and OSError if the
    folder cannot be written. The bytes received stay, and the next call resumes from them, even after Ctrl-C. Of
    several processes fetching into one folder, one downloads and the others wait.
    """
    with _alone(folder, report):
        _fetch(file, folder, report)


@contextmanager
def _alone(folder: Path, report: "Report") -> Iterator[None]:
    """Lock the folder against other fetching processes, waiting for one that holds it. A lock ends with its process.

    Without locks (Windows, some network file systems) nobody waits, and a process whose part was removed by another
    stops with an error.
    """
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if handle is not None:
            _lock(handle, lambda: report.line(f"waiting for another process, which is fetching into {folder}"))
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, before_waiting: Callable[[], None]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        before_waiting()
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        pass  # this file system has no locks


def _fetch(file: Remote, folder: Path, report: "Report") -> None:
    target = folder / file.name
    if target.exists():
        if fault := file.fault(target):
            report.line(f"{target} {fault}: fetching it again")
        elif file.sha256:
            if (part := _Part(target)).length:
                part.forget()
            report.line(f"{file.name}: already there, its SHA-256 is right")
            return
    wrong = []
    for url in file.urls:
        for left in reversed(range(TRIES)):
            try:
                report.line(f"{file.name}: {_try(file, url, target, report)}")
                return
            except NetworkError as error:
                words = str(error)
                if not error.again or not left:
                    break
            time.sleep(PAUSE)
        wrong.append(f"{url} {words}")
    raise InputError(
        f"{file.name} could not be fetched: {'; '.join(wrong)}: try again when the network is better, and it "
        "resumes, or use --from DIR with files that you already have"
    )


def _try(file: Remote, url: str, target: Path, report: "Report") -> str:
    """Make one request to one address and describe the result. Raises NetworkError, InputError or OSError."""
    part = _Part(target)
    start, length = part.length, part.note.get("length")
    if not start or start != length:  # else the part is complete, but not yet verified
        asked = part.rest(url, covered=file.sha256 is not None)
        # compression would change positions and lengths
        with ask(url, {"Accept-Encoding": "identity"} | asked) as answer:
            if asked and (
                answer.status_code == 416 or (answer.status_code == 206 and not _continues(answer, part, asked))
            ):
                part.forget()
                raise NetworkError("does not resume where a transfer broke off", again=True)
            if answer.status_code != 200 and not (asked and answer.status_code == 206):
                raise refused_by(answer)
            start = part.length if answer.status_code == 206 else 0
            length = start + _length(answer)
            if length != (file.length or length):
                raise NetworkError(f"offers {length:,} bytes, not {file.length:,}")
            if not file.sha256 and target.exists() and target.stat().st_size == length:
                part.forget()
                return "already there, with the length announced (its SHA-256 is not known)"
            if not start:
                part.begin(url, length, _validator(answer))
            _receive(answer, part, start, length, report)
    if fault := replace(file, length=file.length or length).fault(part.path):
        part.forget()
        raise NetworkError(f"gave a file that {fault}", again=start > 0)  # the parts may be of different files
    part.path.replace(target)
    part.forget()
    return f"{length:,} bytes, " + ("SHA-256 verified" if file.sha256 else "as announced (its SHA-256 is not known)")


def _receive(answer: "requests.Response", part: _Part, start: int, length: int, report: "Report") -> None:
    """Write the answer's body to the part, from byte start up to the complete file's length."""
    folder = part.path.parent
    if (free := shutil.disk_usage(folder).free) < length - start:
        raise InputError(
            f"{folder} has {free:,} bytes free, but {length - start:,} of {part.name} are still to come: free some "
            "space"
        )
    # seek, not append: without locks, two processes then write the same bytes to the same positions
    with part.path.open("r+b" if start else "wb") as f, report.transfer(part.name, start, length) as show:
        f.seek(start)
        for chunk in read(answer, CHUNK):
            f.write(chunk[: length - f.tell()])
            show(f.tell())
            if f.tell() == length:
                break  # ignore any surplus
        if f.tell() < length:  # urllib3 1 does not notice
            raise NetworkError("broke off before the end", again=True)
        f.flush()
        os.fsync(f.fileno())


def _continues(answer: "requests.Response", part: _Part, asked: dict[str, str]) -> bool:
    """Whether a partial answer is the rest, up to the end, of the file that the part belongs to."""
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", answer.headers.get("Content-Range", ""), re.ASCII)
    if not match:
        return False
    first, last, length = map(int, match.groups())
    # a server that ignores If-Range may have another file by now
    if "If-Range" in asked and (
        length != part.note.get("length") or _validator(answer) not in (asked["If-Range"], None)
    ):
        return False
    return first == part.length and last + 1 == length == first + _length(answer)


def _length(answer: "requests.Response") -> int:
    """The body's length in bytes. Without it, a truncated file could not be detected."""
    length = answer.headers.get("Content-Length", "")
    if not re.fullmatch(r"\d{1,18}", length, re.ASCII):
        raise NetworkError("does not give the file's length")
    return int(length)


def _validator(answer: "requests.Response") -> str | None:
    """The validator for If-Range: a strong ETag, else the date of the last change."""
    etag = answer.headers.get("ETag", "")
    return etag if etag.startswith('"') else answer.headers.get("Last-Modified")
