"""weights.transfer and weights.download: whatever the network does, the result is a verified file or the old one."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from numpy_gpt.config import GPT2_SIZES
from numpy_gpt.console import Report
from numpy_gpt.errors import InputError
from numpy_gpt.io import network
from numpy_gpt.tokenizer import GPT2_FILES
from numpy_gpt.weights import download, transfer
from numpy_gpt.weights.download import MODEL_FILES, check_gpt2, fetch_gpt2
from numpy_gpt.weights.transfer import Remote, fetch
from parity_tests.judge.web import HANG, Ranged, Redirect, Web

FIRST, SECOND = "https://first.example/thing", "https://second.example/thing"
CONTENT = bytes(range(256)) * 8
OTHER = CONTENT[::-1]
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ETAG, OTHER_ETAG = {"ETag": '"one"'}, {"ETag": '"two"'}
DATE = {"Last-Modified": "Wed, 06 Nov 2019 00:00:00 GMT"}
BROKEN = Ranged(CONTENT, ETAG, sent=1000)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "PAUSE", 0)
        patch.setattr(transfer, "CHUNK", 64)
        yield patch


@pytest.fixture(scope="module")
def server(patch):
    with Web(patch) as web:
        yield web


@pytest.fixture
def web(server):
    server.pages, server.asked, server.headers = {}, [], []
    return server


class Lines(Report):
    """A report that keeps its lines."""

    def __init__(self, terminal=False):
        self.written = io.StringIO()
        self.console = Console(file=self.written, force_terminal=terminal, width=200, highlight=False)

    @property
    def lines(self):
        return self.written.getvalue().splitlines()


def remote(sha256=SHA256, length=None, urls=(FIRST, SECOND)):
    return Remote("thing", urls, sha256, length)


def get(folder, report=None, **known):
    fetch(remote(**known), folder, report or Lines())
    assert sorted(path.name for path in folder.iterdir()) == ["thing"], "something is left over"
    return (folder / "thing").read_bytes()


def fail(folder, **known):
    """The error message of a failing fetch; asserts that the target file is unchanged."""
    before = (folder / "thing").read_bytes() if (folder / "thing").exists() else None
    with pytest.raises(InputError) as error:
        fetch(remote(**known), folder, Lines())
    assert ((folder / "thing").read_bytes() if (folder / "thing").exists() else None) == before
    return str(error.value)


def ranges(web):
    return [headers.get("Range") for headers in web.headers]


def lay_part(folder, content, **note):
    """Write a partial file as left by an earlier call."""
    (folder / ".thing.part").write_bytes(content)
    if note:
        (folder / ".thing.part.from").write_text(json.dumps(note))


# One call, one address.


def test_complete_file_is_readable_by_all(web, tmp_path):
    web.pages[FIRST] = CONTENT
    report = Lines()
    assert get(tmp_path, report) == CONTENT
    assert report.lines == ["thing: 2,048 bytes, SHA-256 verified"]
    assert web.asked == [FIRST]
    assert ranges(web) == [None]
    assert web.headers[0]["Accept-Encoding"] == "identity"
    if os.name == "posix":
        assert (tmp_path / "thing").stat().st_mode & 0o444 == 0o444 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["known", "unknown"])
@pytest.mark.parametrize("headers", [ETAG, DATE, ETAG | DATE, {"ETag": 'W/"weak"'} | DATE], ids=lambda h: "+".join(h))
def test_broken_transfer_resumes(web, tmp_path, sha256, headers):
    web.pages[FIRST] = [
        Ranged(CONTENT, headers, sent=1000),
        Ranged(CONTENT, headers, sent=500),
        Ranged(CONTENT, headers),
    ]
    assert get(tmp_path, sha256=sha256) == CONTENT
    validator = '"one"' if "one" in headers.get("ETag", "") else DATE["Last-Modified"]
    first, *rest = web.headers
    assert "Range" not in first
    starts = [int(re.fullmatch(r"bytes=(\d+)-", asked["Range"])[1]) for asked in rest]
    assert 1000 - 64 <= starts[0] <= 1000 < starts[1] <= 1500
    assert [asked["If-Range"] for asked in rest] == [validator] * 2


def test_next_call_resumes(web, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TRIES", 1)
    web.pages[FIRST] = BROKEN
    assert f"{FIRST} broke off before the end; {SECOND} could not be reached (ConnectionError)" in fail(tmp_path)
    start = (tmp_path / ".thing.part").stat().st_size
    web.pages[FIRST] = Ranged(CONTENT, ETAG)
    assert get(tmp_path) == CONTENT
    assert ranges(web) == [None, f"bytes={start}-"]


def test_retries_are_bounded_and_spaced(web, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(transfer, "PAUSE", 7)
    monkeypatch.setattr(time, "sleep", slept.append)
    web.pages[FIRST] = Ranged(CONTENT, ETAG, sent=10)
    web.pages[SECOND] = CONTENT
    assert get(tmp_path) == CONTENT
    assert web.asked == [FIRST] * transfer.TRIES + [SECOND]
    assert slept == [7] * (transfer.TRIES - 1)


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}], ids=["none", "weak"])
def test_without_validator_or_hash_transfer_restarts(web, tmp_path, headers):
    web.pages[FIRST] = [Ranged(CONTENT, headers, sent=1000), Ranged(OTHER, headers)]
    assert get(tmp_path, sha256=None) == OTHER
    assert ranges(web) == [None, None]


def test_hash_allows_resuming_without_validator(web, tmp_path):
    web.pages[FIRST] = [Ranged(CONTENT, sent=1000), Ranged(CONTENT)]
    assert get(tmp_path) == CONTENT
    assert ranges(web)[1] is not None
    assert "If-Range" not in web.headers[1]


def test_resumed_answer_need_not_repeat_the_validator(web, tmp_path):
    web.pages[FIRST] = [Ranged(CONTENT, ETAG, sent=960), Ranged(CONTENT, {}, knows_if_range=False)]
    assert get(tmp_path, sha256=None) == CONTENT
    assert ranges(web) == [None, "bytes=960-"]


# Servers that do not resume.

ODD = {
    "ignores Range": Ranged(CONTENT, ETAG, knows_range=False),
    "changed": Ranged(OTHER, OTHER_ETAG),
    "changed, longer": Ranged(OTHER + b"more", OTHER_ETAG),
    "changed, ignores If-Range": [Ranged(OTHER, OTHER_ETAG, knows_if_range=False)] * 2,
    "changed, longer, ignores If-Range, no ETag any more": [Ranged(OTHER + b"more", {}, knows_if_range=False)] * 2,
    "changed, shorter than the part: 416": [Ranged(OTHER[:500], ETAG)] * 2,
    "another range": [Ranged(CONTENT, ETAG | {"Content-Range": "bytes 0-2047/2048"}), Ranged(CONTENT, ETAG)],
    "the whole as a range": [
        Ranged(CONTENT, ETAG | {"Content-Range": "bytes 0-2047/2048", "Content-Length": "2048"}),
        Ranged(CONTENT, ETAG),
    ],
    "another end": [Ranged(CONTENT, ETAG | {"Content-Range": "bytes 960-2000/2048"}), Ranged(CONTENT, ETAG)],
    "no range": [Ranged(CONTENT, ETAG | {"Content-Range": None}), Ranged(CONTENT, ETAG)],
    "no sense": [Ranged(CONTENT, ETAG | {"Content-Range": "bytes " + "9" * 5000}), Ranged(CONTENT, ETAG)],
    "another length": [Ranged(CONTENT, ETAG | {"Content-Length": "5"}), Ranged(CONTENT, ETAG)],
}


@pytest.mark.parametrize("kind", ODD)
def test_parts_of_two_files_are_never_joined(web, tmp_path, kind):
    pages = ODD[kind] if isinstance(ODD[kind], list) else [ODD[kind]]
    web.pages[FIRST] = [Ranged(CONTENT, ETAG, sent=960), *pages]
    assert get(tmp_path, sha256=None) == pages[-1].content
    assert ranges(web) == [None, "bytes=960-", None][: len(pages) + 1]
    assert web.asked == [FIRST] * (len(pages) + 1)


def test_server_refusing_ranges_is_an_error(web, tmp_path):
    web.pages[FIRST] = 416
    assert f"{FIRST} answered 416" in fail(tmp_path)
    assert web.asked == [FIRST] + [SECOND] * transfer.TRIES


def test_unrequested_partial_answer_is_refused(web, tmp_path):
    web.pages[FIRST] = Partial(CONTENT)
    assert f"{FIRST} answered 206" in fail(tmp_path, sha256=None)


class Partial(Ranged):
    def answer(self, asked):
        return super().answer({"Range": "bytes=0-"})


# Arbitrary answers.

VERSIONS = [
    (CONTENT, '"one"', "Wed, 06 Nov 2019"),
    (OTHER, '"two"', "Thu, 07 Nov 2019"),
    (OTHER + b"more", '"three"', ""),
]


@st.composite
def answers(draw, honest):
    """One answer of a server; an honest one never reuses a validator or sends a partial answer without one."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from([404, 416, 503]))
    content, etag, date = draw(st.sampled_from(VERSIONS))
    if not honest:
        etag = draw(st.sampled_from([tag for _, tag, _ in VERSIONS]))
    headers = draw(
        st.sampled_from([{"ETag": etag}, {"ETag": etag, "Last-Modified": date}, {"Last-Modified": date}, {}])
    )
    knows_if_range = "ETag" not in headers or draw(st.booleans())
    if draw(st.integers(0, 5)) == 0:
        headers = headers | {
            "Content-Range": draw(st.sampled_from(["bytes 64-2047/2048", "bytes 0-2047/2048", "x", None]))
        }
    sent = draw(st.none() | st.integers(0, len(content)))
    return Ranged(content, headers, sent, draw(st.booleans()) or draw(st.booleans()), knows_if_range)


@st.composite
def histories(draw):
    """(sha256 or None, the existing file or None, both addresses' answers in each call)"""
    sha256 = draw(st.sampled_from([SHA256, None]))
    pages = st.lists(answers(honest=sha256 is None), min_size=1, max_size=4)
    return sha256, draw(st.sampled_from([None, OTHER[:-1]])), draw(st.lists(st.tuples(pages, pages), max_size=3))


@given(histories())
@settings(max_examples=40)
@example((None, None, [([BROKEN, Ranged(OTHER, OTHER_ETAG, knows_if_range=False)], [404])]))
@example((SHA256, OTHER, [([BROKEN, Ranged(OTHER, ETAG)], [BROKEN, Ranged(CONTENT, OTHER_ETAG)])]))
def test_fetch_leaves_a_complete_file_or_the_old_one(server, history):
    sha256, before, calls = history
    whole = [CONTENT] if sha256 else [content for content, _, _ in VERSIONS]
    with tempfile.TemporaryDirectory() as name:
        target = Path(name, "thing")
        if before:
            target.write_bytes(before)
        for first, second in calls:
            server.pages = {FIRST: list(first), SECOND: list(second)}
            try:
                fetch(remote(sha256), target.parent, Lines())
            except InputError:
                assert (target.read_bytes() if target.exists() else None) == before
            else:
                before = target.read_bytes()
                assert before in whole
                assert os.listdir(name) == ["thing"]
        server.pages = {FIRST: Ranged(CONTENT, ETAG)}
        assert get(target.parent, sha256=sha256) in whole


# Lengths.


def test_bytes_after_the_announced_length_are_ignored(web, tmp_path):
    web.pages[FIRST] = Ranged(CONTENT, ETAG, extra=b"more")
    assert get(tmp_path, sha256=None) == CONTENT


def test_endless_stream_stops_at_the_announced_length(web, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TRIES", 1)
    body = b"%x\r\n%b\r\n" % (3 * len(CONTENT), 3 * CONTENT)  # one chunk of several: no length binds the client
    page = Ranged(body, {"Content-Length": str(len(CONTENT) - 7), "Transfer-Encoding": "chunked"})
    web.pages[FIRST] = page
    assert get(tmp_path, sha256=None, urls=(FIRST,)) == CONTENT[:-7]


@pytest.mark.parametrize("length", [None, "soon", "-1", "²", "9" * 5000])
def test_length_must_be_announced(web, tmp_path, length):
    web.pages[FIRST] = Ranged(CONTENT, ETAG | {"Content-Length": length})
    assert f"{FIRST} does not give the file's length" in fail(tmp_path)


def test_file_of_wrong_length_is_not_fetched(web, tmp_path):
    web.pages[FIRST] = CONTENT + b"x"
    assert f"{FIRST} offers 2,049 bytes, not 2,048" in fail(tmp_path, sha256=None, length=2048)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("announced", ["2100", "9000"])
def test_file_shorter_than_announced_is_refused(web, tmp_path, announced):
    web.pages[FIRST] = Ranged(CONTENT, ETAG | {"Content-Length": announced})
    assert f"{FIRST} " in fail(tmp_path, sha256=None)


def test_short_transfer_is_detected_with_old_urllib3(web, tmp_path, monkeypatch):
    """urllib3 1 treats an early end of the connection as the end of the file."""
    import requests

    body = requests.Response.iter_content

    def uncounted(answer, size):
        answer.raw.enforce_content_length = False
        return body(answer, size)

    monkeypatch.setattr(requests.Response, "iter_content", uncounted)
    web.pages[FIRST] = [BROKEN, Ranged(CONTENT, ETAG)]
    assert get(tmp_path, sha256=None) == CONTENT
    assert ranges(web) == [None, "bytes=1000-"]


# Hashes and addresses.


def test_wrong_file_falls_back_to_the_next_address(web, tmp_path):
    web.pages[FIRST], web.pages[SECOND] = OTHER, CONTENT
    assert get(tmp_path) == CONTENT
    assert web.asked == [FIRST, SECOND]
    assert ranges(web) == [None, None]


def test_wrong_files_everywhere_are_named_and_removed(web, tmp_path):
    web.pages[FIRST], web.pages[SECOND] = OTHER, Ranged(b"")
    words = fail(tmp_path)
    wrong = f"gave a file that is damaged or another file (its SHA-256 is not {SHA256[:8]}…)"
    assert words == (
        f"thing could not be fetched: {FIRST} {wrong}; {SECOND} {wrong}: try again when the network is better, and it "
        "resumes, or use --from DIR with files that you already have"
    )
    assert list(tmp_path.iterdir()) == []


def test_empty_file_is_refused(web, tmp_path):
    web.pages[FIRST] = Ranged(b"")
    assert f"{FIRST} gave a file that is empty" in fail(tmp_path, sha256=None)


def test_hash_allows_resuming_from_another_address(web, tmp_path):
    web.pages[FIRST] = [Ranged(CONTENT, ETAG, sent=960), 503]
    web.pages[SECOND] = Ranged(CONTENT, OTHER_ETAG)
    assert get(tmp_path) == CONTENT
    assert ranges(web) == [None, "bytes=960-", "bytes=960-"]
    assert "If-Range" not in web.headers[2]


def test_without_hash_another_address_restarts(web, tmp_path):
    web.pages[FIRST] = [Ranged(CONTENT, ETAG, sent=960), 503]
    web.pages[SECOND] = Ranged(OTHER, ETAG)
    assert get(tmp_path, sha256=None) == OTHER
    assert ranges(web)[2] is None


def test_resumed_file_with_wrong_hash_restarts(web, tmp_path):
    lay_part(tmp_path, OTHER[:960])
    web.pages[FIRST] = Ranged(CONTENT, ETAG)
    assert get(tmp_path) == CONTENT
    assert web.asked == [FIRST, FIRST]
    assert ranges(web) == ["bytes=960-", None]


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["known", "unknown"])
def test_complete_part_is_only_verified(web, tmp_path, sha256):
    lay_part(tmp_path, CONTENT, url=FIRST, length=len(CONTENT), validator='"one"')
    assert get(tmp_path, sha256=sha256) == CONTENT
    assert web.asked == []


def test_complete_but_wrong_part_is_refetched(web, tmp_path):
    lay_part(tmp_path, OTHER, url=FIRST, length=len(CONTENT), validator='"one"')
    web.pages[FIRST] = CONTENT
    assert get(tmp_path) == CONTENT
    assert web.asked == [FIRST]


NOTES = [
    *("", "{", "[]", "null", '{"url": 1}', '{"url": "", "length": "x", "validator": 1}'),
    *(json.dumps({"url": FIRST, "length": 2048, "validator": bad}) for bad in (1, [], "a\nb", "\0", "é")),
]


@pytest.mark.parametrize("note", NOTES)
def test_unreadable_note_is_ignored(web, tmp_path, note):
    lay_part(tmp_path, OTHER[:960])
    (tmp_path / ".thing.part.from").write_text(note)
    web.pages[FIRST] = Ranged(CONTENT, ETAG)
    assert get(tmp_path, sha256=None) == CONTENT
    assert ranges(web) == [None]


REFUSALS = {
    "no such page": (404, "answered 404 Not Found"),
    "busy": (503, "answered 503 Service Unavailable"),
    "forbidden": (403, "answered 403 Forbidden"),
    "too many": (429, "answered 429 Too Many Requests"),
    "no content": (Ranged(b"", {"Content-Length": "0"}), "gave a file that is damaged"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusal_is_not_retried(web, tmp_path, kind):
    page, words = REFUSALS[kind]
    web.pages[FIRST], web.pages[SECOND] = page, CONTENT
    assert get(tmp_path) == CONTENT
    assert web.asked == [FIRST, SECOND]
    (tmp_path / "thing").unlink()
    del web.pages[SECOND]
    assert f"{FIRST} {words}" in fail(tmp_path)


@pytest.mark.parametrize("page", [HANG, (CONTENT[:1000], None)], ids=["no answer", "half an answer"])
def test_hanging_server_times_out(web, tmp_path, monkeypatch, page):
    """The server hangs forever: without a time-out this test would not end."""
    monkeypatch.setattr(transfer, "TRIES", 1)
    monkeypatch.setattr(network, "TIMEOUT", 0.2)
    web.pages[FIRST] = page
    assert f"{FIRST} did not answer within 0.2 seconds" in fail(tmp_path)
    assert web.asked == [FIRST, SECOND]


MALFORMED = [
    "http://[",
    "http://:80",
    "http://a:99999/",
    "http://a..b/",
    "ftp://a/",
    "file:///etc/passwd",
    "http://\xe9/",
]


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["known", "unknown"])
@pytest.mark.parametrize("place", MALFORMED)
def test_redirect_to_malformed_address_is_named(web, tmp_path, place, sha256):
    """requests does not wrap all errors of urllib3 and of Python."""
    web.pages[FIRST] = Redirect(place.encode("latin-1"))
    assert f"{FIRST} redirects to an address that cannot be used (" in fail(tmp_path, sha256=sha256)
    assert web.asked == [FIRST] + [SECOND] * transfer.TRIES
    web.pages[SECOND] = CONTENT
    assert get(tmp_path, sha256=sha256) == CONTENT


def test_redirect_is_followed_and_loop_is_refused(web, tmp_path):
    web.pages[FIRST] = Redirect(web.address(FIRST).encode())
    assert f"{FIRST} redirects endlessly" in fail(tmp_path)
    web.pages[FIRST] = Redirect(web.address(SECOND).encode())
    web.pages[SECOND] = CONTENT
    assert get(tmp_path) == CONTENT


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["known", "unknown"])
def test_web_page_is_refused(web, tmp_path, sha256):
    """A captive portal's login page has status 200 and a length."""
    web.pages[FIRST] = Ranged(b"<!DOCTYPE html><p>Log in", {"Content-Type": "text/html; charset=utf-8"})
    assert f"{FIRST} answered with a web page in place of the file" in fail(tmp_path, sha256=sha256)
    assert list(tmp_path.iterdir()) == []


# Several at once.

FETCH = """
import sys
from pathlib import Path
from numpy_gpt.weights import transfer
from numpy_gpt.console import Report
transfer.PAUSE, transfer.TRIES, transfer.CHUNK = 0, 1000, 1 << 12
url, folder, sha256 = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
transfer.fetch(transfer.Remote("thing", (url,), sha256 or None, None), Path(folder), Report())
"""

FIND = """
import sys
from pathlib import Path
from numpy_gpt.io.finding import find
url, folder, sha256 = sys.argv[1:]
store = Path(folder, "made", "for", "thing")
print("ready", flush=True)
sys.stdin.readline()
print(len(find("the thing", sha256, [store], url, store, "do this")))
"""


def run_at_once(script, arguments, count=4):
    """(exit code, stdout, stderr) of processes that run the script, started together once all are ready."""
    command = [sys.executable, "-c", script, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"NO_PROXY": "127.0.0.1"}
    running = [subprocess.Popen(command, **pipes, text=True, env=environment) for _ in range(count)]
    assert [process.stdout.readline() for process in running] == ["ready\n"] * count
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in running]
    return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_four_processes_fetch_one_file_over_a_broken_line(web, tmp_path, known):
    content = CONTENT * 64
    web.pages[FIRST] = Ranged(content, ETAG, sent=len(content) // 16)
    sha256 = hashlib.sha256(content).hexdigest() if known else ""
    done = run_at_once(FETCH, [web.address(FIRST), str(tmp_path), sha256])
    assert [(code, err) for code, _, err in done] == [(0, "")] * 4
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"thing": content}
    assert sum("131,072 bytes" in out for _, out, _ in done) == 1, "it was fetched more than once"
    assert sum("already there" in out for _, out, _ in done) == 3


def test_four_processes_find_one_file(web, tmp_path):
    web.pages[FIRST] = CONTENT
    done = run_at_once(FIND, [web.address(FIRST), str(tmp_path), SHA256])
    assert [(code, out) for code, out, _ in done] == [(0, f"{len(CONTENT)}\n")] * 4
    assert [path.name for path in (tmp_path / "made" / "for").iterdir()] == ["thing"]


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems only")
def test_waiting_process_says_so(web, tmp_path):
    web.pages[FIRST] = CONTENT
    fetching, waiting = threading.Event(), threading.Event()

    class Slow(Lines):
        @contextmanager
        def transfer(self, *_):
            fetching.set()
            waiting.wait()
            yield lambda _: None

    class Second(Lines):
        def line(self, text=""):
            super().line(text)
            waiting.set()

    second = Second()
    holder = threading.Thread(target=fetch, args=(remote(), tmp_path, Slow()))
    holder.start()
    fetching.wait()
    fetch(remote(), tmp_path, second)
    holder.join()
    assert second.lines == [
        f"waiting for another process, which is fetching into {tmp_path}",
        "thing: already there, its SHA-256 is right",
    ]
    assert web.asked == [FIRST]


def test_file_system_without_locks_works(web, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="folders are locked on POSIX systems only")

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    web.pages[FIRST] = CONTENT
    assert get(tmp_path) == CONTENT


# Existing files.


def test_verified_file_is_not_refetched(web, tmp_path):
    (tmp_path / "thing").write_bytes(CONTENT)
    lay_part(tmp_path, CONTENT[:1000], url=FIRST, length=len(CONTENT), validator='"one"')
    report = Lines()
    assert get(tmp_path, report) == CONTENT
    assert report.lines == ["thing: already there, its SHA-256 is right"]
    assert web.asked == []


def test_wrong_file_is_named_and_replaced(web, tmp_path):
    (tmp_path / "thing").write_bytes(OTHER)
    web.pages[FIRST] = CONTENT
    report = Lines()
    assert get(tmp_path, report) == CONTENT
    assert f"{tmp_path / 'thing'} is damaged or another file (its SHA-256 is not {SHA256[:8]}…)" in report.lines[0]


def test_wrong_file_stays_until_replaced(web, tmp_path):
    (tmp_path / "thing").write_bytes(OTHER)
    web.pages[FIRST], web.pages[SECOND] = Ranged(CONTENT, ETAG, sent=10), OTHER
    words = fail(tmp_path)
    assert (tmp_path / "thing").read_bytes() == OTHER, "the old file was lost without a replacement"
    assert FIRST in words
    assert f"{SECOND} gave a file that is damaged" in words


def test_without_hash_the_announced_length_suffices(web, tmp_path):
    (tmp_path / "thing").write_bytes(OTHER)
    web.pages[FIRST] = CONTENT
    report = Lines()
    assert get(tmp_path, report, sha256=None) == OTHER
    assert report.lines == ["thing: already there, with the length announced (its SHA-256 is not known)"]
    (tmp_path / "thing").write_bytes(OTHER[:-1])
    assert get(tmp_path, sha256=None) == CONTENT


# The disk.


def usage(free):
    return lambda _: namedtuple("usage", "total used free")(10**6, 10**6 - free, free)


def test_free_space_is_checked_first(web, tmp_path, monkeypatch):
    web.pages[FIRST] = CONTENT
    monkeypatch.setattr(shutil, "disk_usage", usage(2047))
    words = fail(tmp_path)
    assert words == (f"{tmp_path} has 2,047 bytes free, but 2,048 of thing are still to come: free some space")
    monkeypatch.setattr(shutil, "disk_usage", usage(2048))
    assert get(tmp_path) == CONTENT


def test_downloaded_part_needs_no_extra_space(web, tmp_path, monkeypatch):
    lay_part(tmp_path, CONTENT[:1000])
    web.pages[FIRST] = Ranged(CONTENT, ETAG)
    monkeypatch.setattr(shutil, "disk_usage", usage(1048))
    assert get(tmp_path) == CONTENT


def test_old_part_is_never_paired_with_a_new_note(web, tmp_path, monkeypatch):
    lay_part(tmp_path, CONTENT[:960], url=FIRST, length=len(CONTENT), validator='"one"')
    web.pages[FIRST] = Ranged(OTHER, OTHER_ETAG)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", usage(0))
        fail(tmp_path, sha256=None)
    assert get(tmp_path, sha256=None) == OTHER


def test_file_is_flushed_before_renaming(web, tmp_path, monkeypatch):
    web.pages[FIRST] = CONTENT
    sync = os.fsync
    done = []

    def fsync(fd):
        done.append((os.fstat(fd).st_size, (tmp_path / "thing").exists()))
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert get(tmp_path) == CONTENT
    assert done == [(len(CONTENT), False)]


def test_part_restarted_by_another_process_is_refused(web, tmp_path, monkeypatch):
    web.pages[FIRST] = Ranged(CONTENT, ETAG)
    monkeypatch.setattr(os, "fsync", lambda _: lay_part(tmp_path, CONTENT[:100]))
    assert "gave a file that has 100 bytes, not 2,048" in fail(tmp_path, sha256=None)


# GPT-2's five files.

STAND_INS = {name: name.encode() * 100 for name in (*MODEL_FILES, *GPT2_FILES)}


@pytest.fixture
def gpt2(web, monkeypatch):
    """Stand-ins for the files, with hashes for all of 124M but, for 355M, only for the vocabulary, and a length."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in STAND_INS.items()}
    monkeypatch.setattr(download, "SHA256", {f"124M/{name}": hashes[name] for name in MODEL_FILES})
    monkeypatch.setattr(download, "GPT2_FILES", {name: hashes[name] for name in GPT2_FILES})
    length = len(STAND_INS[download.DATA_FILE])
    monkeypatch.setattr(download, "parameter_count", lambda _: length // 4)
    for size in ("124M", "355M"):
        for name, content in STAND_INS.items():
            web.pages[f"{download.ADDRESSES[0]}{size}/{name}"] = content
    return web


def test_data_file_has_four_bytes_per_parameter():
    """For 124M and 355M these are the lengths OpenAI's server announces."""
    lengths = {
        size: next(f.length for f in download._files(size) if f.name == download.DATA_FILE) for size in GPT2_SIZES
    }
    assert lengths == {"124M": 497_759_232, "355M": 1_419_292_672, "774M": 3_096_120_320, "1558M": 6_230_444_800}


def test_release_addresses():
    file = download._files("774M")[0]
    assert file.urls == (
        "https://openaipublic.blob.core.windows.net/gpt-2/models/774M/hparams.json",
        "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/774M/hparams.json",
    )


def test_every_file_of_124m_has_a_hash():
    assert all(re.fullmatch("[0-9a-f]{64}", file.sha256) for file in download._files("124M"))
    assert [file.name for file in download._files("355M") if file.sha256] == list(GPT2_FILES)


@pytest.mark.parametrize("size", ["124M", "355M"])
def test_five_files_are_fetched(gpt2, tmp_path, size):
    folder = tmp_path / "made" / "for it"
    report = Lines()
    fetch_gpt2(size, folder, report)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == STAND_INS
    known = "SHA-256 verified" if size == "124M" else "as announced (its SHA-256 is not known)"
    assert report.lines[0] == f"hparams.json: {len(STAND_INS['hparams.json']):,} bytes, {known}"
    assert len(report.lines) == 5
    check_gpt2(size, folder)
    asked = len(gpt2.asked)
    fetch_gpt2(size, folder, report)
    assert len(gpt2.asked) == asked + (0 if size == "124M" else 3)


def test_unknown_size_is_refused(tmp_path):
    for call in (lambda: fetch_gpt2("125M", tmp_path / "new", Lines()), lambda: check_gpt2("125M", tmp_path)):
        with pytest.raises(InputError, match="unknown GPT-2 size '125M': choose one of 124M"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_file_in_place_of_the_folder_is_named(gpt2, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(InputError, match=r"file.* cannot be written \(.*\): move what is in the way"):
            fetch_gpt2("124M", folder, Lines())


DISK_FAULTS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EACCES: "let this user write there",
    errno.EPERM: "let this user write there",
    errno.EROFS: "remount that disk for writing",
    errno.EIO: "check that disk",
    errno.ENOENT: "something removed it meanwhile: try again",
}


@pytest.mark.parametrize("code", DISK_FAULTS)
def test_unwritable_folder_is_named(gpt2, tmp_path, monkeypatch, code):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(code, os.strerror(code))

    path_type = type(tmp_path)
    real = path_type.open
    monkeypatch.setattr(
        path_type, "open", lambda path, mode="r", *a, **k: Full() if mode == "wb" else real(path, mode, *a, **k)
    )
    words = f"{tmp_path} cannot be written ({os.strerror(code)}): {DISK_FAULTS[code]}, or use --from DIR"
    with pytest.raises(InputError, match=re.escape(words)):
        fetch_gpt2("124M", tmp_path, Lines())
    assert not (tmp_path / "hparams.json").exists()
    assert len(gpt2.asked) == 1, "no other address can help"


def test_ctrl_c_keeps_the_part(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK", 64)
    url = f"{download.ADDRESSES[0]}124M/hparams.json"
    gpt2.pages[url] = Ranged(STAND_INS["hparams.json"], ETAG)

    class Stopped(Lines):
        @contextmanager
        def transfer(self, *_):
            def show(done):
                if done > 300:
                    raise KeyboardInterrupt

            yield show

    report = Stopped()
    with pytest.raises(KeyboardInterrupt):
        fetch_gpt2("124M", tmp_path, report)
    assert report.lines == [f"stopped: the partial download stays in {tmp_path}; run the same command to resume it"]
    assert (tmp_path / ".hparams.json.part").read_bytes() == STAND_INS["hparams.json"][:320]
    fetch_gpt2("124M", tmp_path, Lines())
    assert gpt2.headers[1]["Range"] == "bytes=320-"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == STAND_INS


def test_progress_is_shown_on_a_terminal_only(web, tmp_path):
    web.pages[FIRST] = CONTENT
    report = Lines(terminal=True)
    fetch(remote(), tmp_path, report)
    assert "2.0/2.0 kB" in report.written.getvalue()


def test_unreadable_file_is_named(gpt2, tmp_path, monkeypatch):
    fetch_gpt2("124M", tmp_path, Lines())

    def locked(path, *_):  # the tests may run as root, to whom permissions do not apply
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "open", locked)
    with pytest.raises(InputError, match=r"hparams.json cannot be read \(Permission denied\): give a folder"):
        check_gpt2("124M", tmp_path)


WRONG_FOLDERS = {
    "missing": (lambda path: path.unlink(), "does not exist"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"(has [\d,]+ bytes, not|is damaged|is empty)"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is not a file"),
}


@pytest.mark.parametrize("kind", WRONG_FOLDERS)
@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("size", ["124M", "355M"])
def test_files_already_there_are_checked(gpt2, tmp_path, size, name, kind):
    for stand_in, content in STAND_INS.items():
        (tmp_path / stand_in).write_bytes(content)
    check_gpt2(size, tmp_path)
    spoil, words = WRONG_FOLDERS[kind]
    spoil(tmp_path / name)
    unknown = size == "355M" and name in ("hparams.json", "model.ckpt.index")
    if (kind == "missing" and name in GPT2_FILES) or (kind == "cut" and unknown):
        check_gpt2(size, tmp_path)
        return
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path / name))} {words}.*: give a folder with all files"):
        check_gpt2(size, tmp_path)
    assert gpt2.asked == []
