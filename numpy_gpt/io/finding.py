"""Files not shipped with the package, identified by SHA-256: found locally, or downloaded once."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from numpy_gpt.errors import InputError
from numpy_gpt.io.files import disk_fix
from numpy_gpt.io.network import NetworkError, ask, read, refused_by
from numpy_gpt.io.paths import check_regular


@contextmanager
def temporary_files(use: str, contents: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary folder with these files, name -> content, removed at the end.

    Raises InputError, which names their use, if no folder can be made or the disk is full.
    """
    with ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for name, content in contents.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise InputError(
                f"{use} needs a temporary folder, but none is usable ({error.strerror or error}): "
                "set TMPDIR to a folder with free space"
            ) from error
        yield folder


def data_folder_file(name: str) -> Path | str:
    """The path of `name` in $NUMPY_GPT_DATA, or a phrase saying that the variable is not set."""
    folder = os.environ.get("NUMPY_GPT_DATA")
    return Path(folder, name) if folder else "$NUMPY_GPT_DATA is not set"


def find(what: str, sha256: str, places: Iterable[Path | str], url: str, store: Path | None, fix: str) -> bytes:
    """The bytes of the first file among `places` with this SHA-256, else of a download from `url`, kept as `store`.

    A place is a path, or a phrase saying why no path is known. A file with another hash is skipped; only a download
    replaces it, and `store` only ever names a complete, verified file. store None: the download is not kept.

    Raises InputError, which lists what was wrong with each place and ends with `fix`.
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
            # return the bytes that were checked: the file may change after the check
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
        raise InputError(f"{what} was not found: {'; '.join(wrong)}: {fix}") from error
    except OSError as error:
        kept = f"could not be kept as {error.filename or store} ({error.strerror or error}; {disk_fix(error)})"
        raise InputError(f"{what} was not found: {'; '.join([*wrong, f'{url} {kept}'])}: {fix}") from error


def _download(url: str, sha256: str, store: Path) -> bytes:
    import pooch  # type: ignore[import-untyped]  # here, since it takes longer to import than all of numpy_gpt

    def fetch(url: str, file: str, _: object) -> None:
        with ask(url) as answer:
            if answer.status_code != 200:
                raise refused_by(answer)
            content = b"".join(read(answer, 1 << 16))  # these files are small
        if hashlib.sha256(content).hexdigest() != sha256:
            raise NetworkError("serves another file than expected (its SHA-256 differs)")
        Path(file).write_bytes(content)
        # pooch makes files that only their owner can read; in a shared cache, tiktoken fails on them.
        Path(file).chmod(0o644)

    store.parent.mkdir(parents=True, exist_ok=True)  # pooch fails if another process makes it at the same time
    # pooch writes under another name, verifies, and only then renames.
    return Path(
        pooch.retrieve(url, f"sha256:{sha256}", fname=store.name, path=store.parent, downloader=fetch)
    ).read_bytes()
