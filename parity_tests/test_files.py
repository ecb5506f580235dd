"""io.finding: the first place with a valid file wins, and nothing unverified is used or kept."""

import errno
import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from numpy_gpt.data import rereadable
from numpy_gpt.errors import InputError
from numpy_gpt.io import finding, network
from numpy_gpt.tokenizer import _gpt2, get_encoding
from parity_tests.judge.web import HANG, Ranged, Redirect, Web

URL = "https://example.org/folder/thing.bin"
CONTENT = b"the thing itself" * 500
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def web(monkeypatch):
    with Web(monkeypatch) as web:
        yield web


def find(places, store):
    return finding.find("the thing", SHA256, places, URL, store, "do this")


def place(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_first_valid_place_wins_without_download(tmp_path, web, monkeypatch):
    read = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or read_bytes(path))
    places = [tmp_path / "missing", "there is no second place", place(tmp_path / "good"), place(tmp_path / "spare")]
    assert find(places, tmp_path / "store") == CONTENT
    assert read == ["missing", "good"]
    assert web.asked == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "spare"]


@pytest.mark.parametrize("bad", [CONTENT[:-1], b"", CONTENT[:-1] + b"\0"], ids=["cut", "empty", "one byte"])
def test_damaged_file_is_skipped_and_kept(tmp_path, bad):
    damaged = place(tmp_path / "damaged", bad)
    assert find([damaged, place(tmp_path / "good")], None) == CONTENT
    assert damaged.read_bytes() == bad


def test_download_is_stored_and_reused(tmp_path, web):
    web.pages[URL] = CONTENT
    store = tmp_path / "made" / "for" / "it"
    assert find([store], store) == CONTENT
    assert store.read_bytes() == CONTENT
    if sys.platform != "win32":
        assert stat.S_IMODE(store.stat().st_mode) == 0o644
    assert find([store], store) == CONTENT
    assert web.asked == [URL]
    assert list(store.parent.iterdir()) == [store]


def test_download_replaces_a_damaged_file(tmp_path, web):
    web.pages[URL] = CONTENT
    store = place(tmp_path / "store", b"damaged")
    assert find([store], store) == CONTENT
    assert store.read_bytes() == CONTENT


def test_download_without_a_store_is_not_kept(web, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    web.pages[URL] = CONTENT
    assert find([], None) == CONTENT
    assert list(tmp_path.iterdir()) == []


BAD_PAGES = {
    "other content": (CONTENT[::-1], "serves another file than expected (its SHA-256 differs)"),
    "cut short": ((CONTENT[:-1], len(CONTENT)), "broke off before the end"),
    "cut short, unnoticed": (CONTENT[:-1], "serves another file than expected (its SHA-256 differs)"),
    "no such page": (404, "answered 404 Not Found"),
    "a login page": (
        Ranged(b"<p>Log in", {"Content-Type": "text/html"}),
        "answered with a web page in place of the file",
    ),
    "a redirect to nowhere": (Redirect(b"http://a..b/"), "redirects to an address that cannot be used ("),
    "no answer": (HANG, "did not answer within 0.2 seconds"),
    "half an answer": ((CONTENT[:5000], None), "did not answer within 0.2 seconds"),
    "no network": (None, "could not be reached (ConnectionError)"),
}


@pytest.mark.parametrize("kind", BAD_PAGES)
@pytest.mark.parametrize("before", [None, b"an older, damaged file"], ids=["nothing before", "damaged before"])
def test_bad_download_is_named_and_leaves_the_store(tmp_path, web, monkeypatch, kind, before):
    page, reason = BAD_PAGES[kind]
    if "did not answer" in reason:  # the server hangs forever: without a time-out this test would not end
        monkeypatch.setattr(network, "TIMEOUT", 0.2)
    if page is not None:
        web.pages[URL] = page
    store = tmp_path / "store"
    if before:
        place(store, before)
    with pytest.raises(InputError) as error:
        find([store], store)
    assert f"{URL} {reason}" in str(error.value)
    assert web.asked == [URL]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([before] if before else [])


def test_error_names_each_places_problem(tmp_path, monkeypatch, web):
    read_bytes = Path.read_bytes

    def locked(path):  # the tests may run as root, to whom permissions do not apply
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", locked)
    (tmp_path / "folder").mkdir()
    damaged = place(tmp_path / "damaged", b"x")
    with pytest.raises(InputError) as error:
        find([tmp_path / "missing", "no such place", damaged, tmp_path / "locked"], tmp_path / "store")
    assert str(error.value) == (
        f"the thing was not found: {tmp_path / 'missing'} does not exist; no such place; "
        f"{damaged} is damaged or another file (its SHA-256 is not {SHA256[:8]}…); "
        f"{tmp_path / 'locked'} cannot be read (Permission denied); "
        f"{URL} could not be reached (ConnectionError): do this"
    )


def test_unusable_store_is_named(tmp_path, web):
    web.pages[URL] = CONTENT
    in_the_way = place(tmp_path / "file")
    with pytest.raises(InputError, match=f"{URL} could not be kept as .*file .*; move what is in the way"):
        find([], in_the_way / "store")


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EACCES, "let this user write there"),
        (errno.EROFS, "remount that disk for writing"),
    ],
)
def test_disk_error_is_not_reported_as_network_error(tmp_path, web, monkeypatch, code, fix):
    def fail(path, _):
        raise OSError(code, os.strerror(code))

    web.pages[URL] = CONTENT
    monkeypatch.setattr(Path, "write_bytes", fail)
    store = tmp_path / "store"
    with pytest.raises(InputError) as error:
        find([], store)
    assert f"{URL} could not be kept as {store} ({os.strerror(code)}; {fix})" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [None, ""])
def test_unset_data_folder_is_named(monkeypatch, value):
    monkeypatch.delenv("NUMPY_GPT_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("NUMPY_GPT_DATA", value)
    assert finding.data_folder_file("a/b") == "$NUMPY_GPT_DATA is not set"


def test_data_folder_comes_from_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMPY_GPT_DATA", str(tmp_path))
    assert finding.data_folder_file("a/b") == tmp_path / "a" / "b"


@pytest.fixture(params=["none usable", "full"])
def temporary(request, monkeypatch, tmp_path):
    """No usable temporary folder, as on a read-only system, or one on a full disk."""
    if request.param == "none usable":
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
        return "No usable temporary directory found"

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", full)
    return "No space left on device"


def test_missing_temporary_folder_is_named(temporary, tmp_path, monkeypatch):
    fifo = tmp_path / "fifo"
    (tmp_path / "story.txt").write_text("a story")
    monkeypatch.setattr("numpy_gpt.data.kind_of", lambda path: "pipe" if path == str(fifo) else "file")
    monkeypatch.setattr("numpy_gpt.data._blocks", lambda path: iter([b"a story", b""]))
    message = (
        rf"needs a temporary folder, but none is usable \(.*{temporary}.*\): set TMPDIR to a folder with free space"
    )
    with pytest.raises(InputError, match=f"the text read from a pipe {message}"), rereadable(str(fifo)):
        pytest.fail("there is no such folder")
    _gpt2.cache_clear()
    with pytest.raises(InputError, match=f"the vocabulary of the encoding gpt2 {message}"):
        get_encoding("gpt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["story.txt"]
