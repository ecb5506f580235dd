"""The page of numpy-gpt explore without a browser: its payload, its server, its file and its command."""

import asyncio
import base64
import contextlib
import gzip
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import webbrowser
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
from click.testing import CliRunner

from numpy_gpt import GPT, AdamW, GPTConfig, save, trace
from numpy_gpt.cli import explore as command
from numpy_gpt.cli import main
from numpy_gpt.errors import InputError
from numpy_gpt.explain.operations import operations
from numpy_gpt.explore import file as as_file
from numpy_gpt.explore import payload, server, sources
from numpy_gpt.explore.file import page_html, write_page
from numpy_gpt.explore.pages import Pages, StoppedError
from numpy_gpt.explore.payload import GROUPS, Page, parse_slice, read_text, stats
from numpy_gpt.explore.reference import stamp_of, torch_arrays
from numpy_gpt.explore.server import Served, listen
from numpy_gpt.explore.static_files import STATIC
from numpy_gpt.tokenizer import encode, get_encoding

TEXT = "Every effort moves you"
HOSTILE = (
    "<script>alert(1)</script>&amp;\u202e\u2066\u200b\x00\x1b[31m</SCRIPT ><!--\U0001f600 e\u0301 \ud83d'\"`${x}\\"
)
CONFIG = {"vocab_size": 257, "context_length": 128, "emb_dim": 16, "n_heads": 4, "n_layers": 2, "drop_rate": 0.1}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request):
    return GPT(GPTConfig(**CONFIG, tie_weights=request.param, qkv_bias=request.param), seed=1)


def page_of(model, text=TEXT, targets=None):
    words = get_encoding("bytes")
    return Page(model, words, "here", read_text(words, model.config, text, targets))


@pytest.fixture(scope="module")
def page(model):
    return page_of(model)


@pytest.fixture(scope="module")
def summary(page):
    return json.loads(json.dumps(page.summary(served=True, torch=False), allow_nan=False))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save(GPT(GPTConfig(**CONFIG), seed=1), path, about={"encoding": "bytes"})
    return path


class Client:
    """Asks a server that runs in a thread, by raw requests: every header is as given."""

    def __init__(self, pages, address, once):
        self.pages = pages
        self.once = once.rpartition("/")[2]
        _, _, host, self.secret, _ = address.split("/")
        self.port = int(host.rpartition(":")[2])

    def ask(self, path, method="GET", body=None, host=None, prefix=None, **headers):
        """(status, headers, body) of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, f"{prefix or f'/{self.secret}/'}{path}", skip_host=True)
            connection.putheader("Host", f"127.0.0.1:{self.port}" if host is None else host)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def post(self, path, body):
        status, _, answer = self.ask(path, "POST", json.dumps(body).encode(), Content_Type="application/json")
        return status, json.loads(answer)

    def numbers(self, path):
        status, _, answer = self.ask(path)
        assert status == 200, answer
        return np.frombuffer(answer, "<f4")


@contextlib.contextmanager
def served(page, torch=None):
    pages, sock = Pages(page, torch), listen(0)
    running, address, once = server.server(pages, sock)
    thread = threading.Thread(target=lambda: running.run(sockets=[sock]))
    thread.start()
    try:
        yield Client(pages, address, once)
    finally:
        running.should_exit = True
        thread.join(30)
        pages.close()


@pytest.fixture(scope="module")
def client(page):
    with served(page) as found:
        yield found


# what the page shows


def test_summary_says_what_the_trace_found(model, page, summary):
    ids = encode(get_encoding("bytes"), TEXT)
    t = trace(model, ids[None, :-1], ids[None, 1:])
    assert summary["tokens"] == [ids[:-1].tolist()]
    assert summary["targets"] == [ids[1:].tolist()]
    assert "".join(summary["pieces"]) == TEXT[:-1]
    assert summary["loss"] == float(t.loss)
    assert np.mean(summary["tokenLosses"]) == pytest.approx(float(t.loss), rel=1e-5)
    assert list(summary["arrays"]) == list(GROUPS)
    assert list(summary["arrays"]["values"]) == list(t.values)
    assert list(summary["arrays"]["grads"]) == list(t.grads)
    assert [each["output"] for each in summary["operations"]] == [each.output for each in operations(model.config)]
    assert summary["parameters"] == sum(a.size for a in model.params.values())
    for group in GROUPS:
        for name, found in summary["arrays"][group].items():
            a = page.group(group)[name]
            a = a[np.isfinite(a)].astype(float)
            assert found["shape"] == list(page.group(group)[name].shape)
            assert found["finite"] == a.size
            want = {"min": a.min(), "max": a.max(), "mean": a.mean(), "norm": np.linalg.norm(a)}
            for key, value in want.items():
                assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-9), (group, name, key)


def test_a_norm_that_overflows_is_none():
    assert stats(np.full(4, 1e200))["norm"] is None
    assert stats(np.full(2_000_000, 1.3e151))["norm"] is None


def test_the_norm_of_large_float32_numbers_is_finite():
    assert stats(np.full(4, 3e30, np.float32))["norm"] == pytest.approx(6e30)
    assert stats(np.full(4, 3e-30, np.float32))["norm"] == pytest.approx(6e-30)


def test_caches_are_what_their_names_say(page):
    found, t, b = page.group("caches"), page.trace, "trf_blocks.1."
    x_hat, x = found[f"{b}norm1.x_hat"], t.values[f"{b}resid_pre"]
    norm = x_hat * t.params[f"{b}norm1.scale"] + t.params[f"{b}norm1.shift"]
    assert np.allclose(norm, t.values[f"{b}norm1"], atol=1e-5)
    assert np.allclose(found[f"{b}norm1.rstd"], 1 / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5), rtol=1e-4)
    assert np.array_equal(
        np.exp(t.values[f"{b}att.scores"] - found[f"{b}att.probs.max"]) / found[f"{b}att.probs.total"],
        t.values[f"{b}att.probs"],
    )
    assert np.array_equal(t.grads[f"{b}ff.act"] * found[f"{b}ff.act.slope"], t.grads[f"{b}ff.pre"])
    blocks = {
        "norm1.x_hat",
        "norm1.rstd",
        "att.probs.max",
        "att.probs.total",
        "norm2.x_hat",
        "norm2.rstd",
        "ff.act.slope",
    }
    assert {name.removeprefix(b) for name in found if name.startswith(b)} == blocks


def test_predictions_are_the_likeliest_tokens(page, summary):
    logits = page.trace.logits[0].astype(float)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for row, found in zip(p, summary["predictions"], strict=True):
        assert [each["id"] for each in found] == np.argsort(-row, kind="stable")[:10].tolist()
        assert [each["p"] for each in found] == pytest.approx(np.sort(row)[::-1][:10])
    target = p[np.arange(len(p)), summary["targets"][0]]
    assert summary["tokenLosses"] == pytest.approx(-np.log(target))


def test_lens_ends_where_the_model_does(model, page, summary):
    assert summary["lens"][0]["name"] == "emb"
    assert len(summary["lens"]) == 1 + 2 * model.config.n_layers
    last = summary["lens"][-1]
    assert last["loss"] == pytest.approx(summary["loss"], rel=1e-5)
    assert [row[0]["id"] for row in last["top"]] == [row[0]["id"] for row in summary["predictions"]]
    assert last["targetP"] == pytest.approx(np.exp(-np.array(summary["tokenLosses"])), rel=1e-4)


def test_zeroed_heads_are_ablations_one_by_one(model, page, summary):
    HS = model.config.head_size
    assert summary["heads"]["loss"] == pytest.approx(summary["loss"], rel=1e-5)
    for layer, row in enumerate(summary["heads"]["zeroed"]):
        for head, loss in enumerate(row):
            name = f"trf_blocks.{layer}.att.heads"
            cells = (..., slice(head * HS, (head + 1) * HS))
            one = page.ablate({name: [cells]})["loss"]
            values = page.trace.values[name].copy()
            values[cells] = 0
            t = trace(model, page.ids.tokens, page.ids.targets, replace={name: values})
            assert loss == pytest.approx(one, rel=1e-6)
            assert loss == pytest.approx(float(t.loss), rel=1e-5)


def test_thumbnails_are_means(page, summary):
    for group, arrays in summary["thumbs"].items():
        for name, found in arrays.items():
            cells = np.frombuffer(base64.b64decode(found["data"]), np.int8).reshape(found["rows"], found["cols"])
            assert len(cells) <= 32
            assert len(cells.T) <= 48
            plane = payload.plane(page.group(group)[name])
            if plane.shape == cells.shape:
                a = np.where(np.isfinite(plane), plane, 0)
                assert np.abs(cells / 127 * found["scale"] - a).max() <= found["scale"] / 200
                assert np.abs(a).max() == pytest.approx(found["scale"])


@pytest.mark.parametrize("columns", [7, 120])
def test_a_large_thumbnail_pools_each_row_and_column_once(columns):
    a = np.random.default_rng(0).normal(size=(100, columns)).astype(np.float32)
    found = payload.thumb(a)
    down, across = 32, min(columns, 48)
    cells = np.frombuffer(base64.b64decode(found["data"]), np.int8).reshape(down, across)
    rows, cols = ([*(np.arange(few) * many // few), many] for few, many in ((down, 100), (across, columns)))
    want = np.array([[a[i:j, k:m].mean(axis=0).mean() for k, m in pairwise(cols)] for i, j in pairwise(rows)])
    assert np.abs(cells / 127 * found["scale"] - want).max() <= found["scale"] / 200


def test_nudge_is_what_the_gradient_says(page):
    name, at = "trf_blocks.1.ff.layers.0.weight", (5, 3)
    found = page.nudge(name, at, 1e-4)
    assert (found["loss"] - found["base"]) / 1e-4 == pytest.approx(float(page.trace.grads[name][at]), rel=1e-2)
    again = page.nudge(name, at, 0.0)
    assert again["loss"] == again["base"] == found["base"]  # the number is what it was


def test_update_is_one_step_of_adamw_and_changes_no_model(model, page):
    before = {name: a.copy() for name, a in model.params.items()}
    found = page.updated(1e-3)
    copied = GPT.from_params(model.config, {name: a.copy() for name, a in model.params.items()})
    _, grads = copied.loss_and_grads(page.ids.tokens, page.ids.targets)
    AdamW(copied.params, lr=1e-3, weight_decay=0.1).step(grads)
    assert found["loss"] == pytest.approx(float(copied.loss(page.ids.tokens, page.ids.targets)), rel=1e-5)
    assert found["loss"] < found["base"]
    assert all(np.array_equal(a, before[name]) for name, a in model.params.items())


def test_targets_come_after_the_last_token(model):
    words = get_encoding("bytes")
    ids = read_text(words, model.config, "abc", "xyz")
    assert ids.tokens.tolist() == [[97, 98, 99]]
    assert ids.targets.tolist() == [[98, 99, 120]]
    assert read_text(words, model.config, "a", "b").targets.tolist() == [[98]]


@pytest.mark.parametrize(
    ("text", "targets", "said"),
    [
        ("", None, "empty"),
        ("", "x", "empty"),
        ("a", None, "one token"),
        ("a", "", r"what follows the text \(--targets\) is empty"),
        ("a" * 130, None, r"reads 128 tokens, and the text has 129 \(and one that is only a target\)"),
        ("a" * 129, "x", "the text has 129: shorten it"),
    ],
)
def test_a_text_that_gives_no_pass_is_refused(model, text, targets, said):
    with pytest.raises(InputError, match=said):
        read_text(get_encoding("bytes"), model.config, text, targets)


def test_the_longest_text_is_read(model):
    assert read_text(get_encoding("bytes"), model.config, "a" * 129, None).tokens.shape == (1, 128)


def test_pieces_of_half_characters_are_escaped(model):
    page = page_of(model, "é€x")
    assert page.summary(True, False)["pieces"] == ["⟨C3⟩", "⟨A9⟩", "⟨E2⟩", "⟨82⟩", "⟨AC⟩"]
    assert page.piece(256) == "<|endoftext|>"
    assert page.piece(300) == "⟨id 300⟩"


# sources


def test_every_mark_is_one_line_of_its_listing():
    assert set(sources.LINES) | {"linear:unbiased"} == set(sources.FORMULAS) | {"residual:post"}
    for kind, both in sources.sources().items():
        for found, lines in zip(both.values(), sources.LINES[kind], strict=True):
            text = (sources.PACKAGE.parent / found["file"]).read_text().splitlines()
            shown = re.findall(r'<span class="line" data-line="(\d+)">', found["html"])
            assert [int(n) for n in shown] == list(range(found["first"], found["first"] + len(shown)))
            marks = found["marks"]
            assert marks["output"], kind
            wanted = zip(marks["output"], lines.output, strict=True)
            for line, part in wanted:
                assert part in text[line - 1], (kind, part)
            for group, given in (("inputs", lines.inputs), ("parameters", lines.parameters)):
                assert {int(i): len(each) for i, each in marks[group].items()} == {i: len(e) for i, e in given.items()}
                for i, parts in given.items():
                    assert all(p in text[n - 1] for p, n in zip(parts, marks[group][str(i)], strict=True)), (kind, i)


def test_every_operation_has_a_formula_and_lines_for_each_gradient():
    for operation in operations(GPTConfig(**CONFIG, qkv_bias=True)):
        found = sources.formulas()[operation.kind]
        branch = {"resid_mid": "mid = x + h", "resid_post": "return mid + h"}.get(operation.output.rpartition(".")[2])
        if branch:
            assert branch in sources.LINES[sources.source_key(operation)][0].output[0]
        assert found["title"]
        assert found["says"].endswith(".")
        assert all(found[side].startswith("<math") for side in ("forward", "backward"))
        for both in sources.LINES[sources.source_key(operation)]:
            assert set(both.parameters) >= set(range(len(operation.parameters))), operation
            inputs = [i for i, name in enumerate(operation.inputs) if name not in ("tokens", "targets")]
            assert set(both.inputs) >= set(inputs), operation


def test_outputs_are_marked_in_forward_and_gradients_in_backward():
    for key, both in sources.LINES.items():
        for lines in both:
            _, text = sources.cut(lines.file, lines.functions)
            starts = [i for i, line in enumerate(text) if re.match(r"def \w+_backward\(", line)]
            ends = [i for i, line in enumerate(text) if re.match(r"def ", line) and i > starts[0]]
            backward = range(starts[0], ends[0] if ends else len(text))
            assert not [p for p in lines.output if sources.found(text, p, lines) in backward], key
            gradients = [p for marks in (lines.inputs, lines.parameters) for parts in marks.values() for p in parts]
            assert not [p for p in gradients if sources.found(text, p, lines) not in backward], key


def test_a_mark_that_is_not_found_is_an_error(monkeypatch):
    lines = sources.LINES["gelu"][0]
    for wrong in ("no such line", "x"):  # in none, and in many
        with pytest.raises(LookupError, match=re.escape(wrong)):
            sources.listing(lines._replace(output=(wrong,)))


# the server


def test_arrays_are_the_traces_bytes(client, page):
    for group in GROUPS:
        for name, a in page.group(group).items():
            assert np.array_equal(client.numbers(f"array/{group}/{name}?run=1"), a.ravel()), name


def a_range(rng, n):
    start = int(rng.integers(n))
    return slice(start, int(rng.integers(start + 1, n + 1)))


def test_slices_are_numpys(client, page):
    rng = np.random.default_rng(0)
    for name, a in page.trace.values.items():
        for _ in range(3):
            at = [(slice(None), int(rng.integers(n)), a_range(rng, n))[rng.integers(3)] for n in a.shape]
            written = ",".join(
                ":" if i == slice(None) else f"{i.start}:{i.stop}" if isinstance(i, slice) else str(i) for i in at
            )
            want = a[tuple(at)]
            assert np.array_equal(client.numbers(f"array/values/{name}?at={written}"), want.ravel()), (name, at)


@pytest.mark.parametrize(
    "at",
    [
        "",
        "0",
        "0,0,0,0",
        "0,-1,0",
        "0,99,0",
        "0,21,0",
        "0,x,0",
        "0,1:1,0",
        "0,2:1,0",
        "0,1:22,0",
        "0,:2,0",
        "0,1:,0",
        "0,1:2:3,0",
        "0,::,0",
        "0,1:-1,0",
        "0,٣,0",
        "0," + "9" * 400 + ",0",
    ],
)
def test_a_slice_outside_the_array_is_refused(at):
    with pytest.raises(InputError, match="slice"):
        parse_slice(at, (1, 21, 16))


def test_summary_is_served(client, summary):
    status, headers, body = client.ask("summary")
    found = json.loads(body)
    assert (status, headers["content-type"], found.pop("run")) == (200, "application/json", 1)
    assert found == summary


def test_page_and_modules_are_served_under_a_strict_policy(client):
    for name, kind in (("", "text/html"), ("store.js", "text/javascript"), ("style.css", "text/css")):
        status, headers, body = client.ask(name)
        assert (status, headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        assert body == (STATIC / (name or "index.html")).read_bytes()
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self' 'sha256-")
        assert "unsafe" not in policy
        assert "*" not in policy
        assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
        assert headers["referrer-policy"] == "no-referrer"
    status, headers, _ = client.ask("", prefix=f"/{client.secret}")
    assert (status, headers["location"]) == (307, f"/{client.secret}/")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1",
        "127.0.0.1:1",
        "localhost",
        "",
        "127.0.0.1:PORT@evil",
        "evil:PORT",
        "127.0.0.1:PORT.",
    ],
)
def test_another_host_is_refused(client, host):
    status, _, body = client.ask("summary", host=host.replace("PORT", str(client.port)))
    assert (status, list(json.loads(body))) == (403, ["error"])


def test_two_hosts_are_refused(client):
    """By uvicorn's parser, and behind it by the app."""
    host = (b"host", f"127.0.0.1:{client.port}".encode())
    lines = b"".join(b"%b: %b\r\n" % each for each in (host, (b"Host", b"evil")))
    with socket.create_connection(("127.0.0.1", client.port)) as sock:
        sock.sendall(f"GET /{client.secret}/summary HTTP/1.1\r\n".encode() + lines + b"Connection: close\r\n\r\n")
        assert sock.recv(100).split()[1] in (b"400", b"403")
    app = server.application(client.pages, client.secret, "once", client.port)
    for hosts, want in (([host], 200), ([host, host], 403), ([], 403)):
        scope = {"type": "http", "method": "GET", "path": f"/{client.secret}/progress", "query_string": b""}
        sent = []

        async def send(message, sent=sent):
            sent.append(message)

        asyncio.run(app(scope | {"headers": hosts}, None, send))
        assert sent[0]["status"] == want


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:PORT", "http://localhost:PORT"]
)
def test_another_origin_is_refused(client, origin):
    origin = origin.replace("PORT", str(client.port))
    for method, path in (("GET", "summary"), ("POST", "run")):
        status, _, body = client.ask(path, method, b"{}", Origin=origin, Content_Type="application/json")
        assert (status, list(json.loads(body))) == (403, ["error"])


def test_its_own_origin_is_answered(client):
    for host in ("127.0.0.1", "localhost"):
        at = f"{host}:{client.port}"
        assert client.ask("progress", host=at, Origin=f"http://{at}")[0] == 200


def test_nothing_is_served_but_the_page(client):
    secret = client.secret
    outside = ["/", "/summary", f"/{secret[:-1]}/summary", f"/{secret}x/summary", "//", "/static"]
    outside += [
        f"/{wrong}/summary" for wrong in ("x" * len(secret), secret.swapcase(), secret[::-1], "é" * len(secret))
    ]
    for path in outside:
        assert client.ask("", prefix=quote(path))[0] == 404, path
    inside = ["../server.py", "..%2fserver.py", "%2e%2e/server.py", "server.py", "index.html", "static/store.js"]
    inside += ["store.js/", "Store.js", "store.js%00", "/etc/passwd", "//summary", "array/values/..", "array/x/logits"]
    inside += ["array/values/nothing", "torch/values/logits", "array/params/__class__", ".", "docs", "openapi.json"]
    for path in inside:
        assert client.ask(path)[0] == 404, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT"):
        assert client.ask("summary", method)[0] in (400, 404, 405), method
    status, headers, _ = client.ask("summary", "POST")
    assert (status, set(headers["allow"].split(", "))) == (405, {"GET", "HEAD"})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("run", {"text": ""}),
        ("run", {"text": "a"}),
        ("run", {"text": "a" * 200}),
        ("run", {"text": 3}),
        ("run", {"text": "ab", "targets": 3}),
        ("run", []),
        ("nudge", {"name": "logits", "index": [0, 0, 0], "h": 1}),
        ("nudge", {"name": "tok_emb.weight", "index": [0], "h": 1}),
        ("nudge", {"name": "tok_emb.weight", "index": [0, 99], "h": 1}),
        ("nudge", {"name": "tok_emb.weight", "index": [True, 0], "h": 1}),
        ("nudge", {"name": "tok_emb.weight", "index": [0, 0], "h": float("nan")}),
        ("nudge", {"name": ["tok_emb.weight"], "index": [0, 0], "h": 1}),
        ("nudge", {"name": "tok_emb.weight", "index": "00", "h": 10**400}),
        ("ablate", {"name": "tok_emb.weight", "at": "0,0"}),
        ("ablate", {"name": "logits", "at": "0"}),
        ("ablate", {"name": "logits"}),
        ("ablate", {"heads": [[0, 4]]}),
        ("ablate", {"heads": [[2, 0]]}),
        ("ablate", {"heads": [[1, 2], [1, 2]]}),
        ("ablate", {"heads": [0]}),
        ("ablate", {"heads": 0}),
        ("updated", {"lr": -1}),
        ("updated", {"lr": "1"}),
        ("updated", {"lr": True}),
        ("updated", {}),
    ],
)
def test_unusable_input_is_refused_in_one_sentence(client, path, body):
    status, answer = client.post(path, body)
    assert (status, list(answer)) == (400, ["error"])
    assert 0 < len(answer["error"]) < 300
    assert "Traceback" not in answer["error"]


def test_bodies_that_are_no_json_are_refused(client):
    kind = {"Content_Type": "application/json"}
    assert client.ask("run", "POST", b"{", **kind)[0] == 400
    assert client.ask("run", "POST", b"\xff\xfe", **kind)[0] == 400
    assert client.ask("run", "POST", b"[" * 100_000, **kind)[0] == 400
    assert client.ask("run", "POST", b"{", Content_Type="Application/JSON; charset=utf-8")[0] == 400
    assert client.ask("run", "POST", b'{"text": "ab"}')[0] == 415
    assert client.ask("run", "POST", b'{"text": "ab"}', Content_Type="text/plain")[0] == 415
    assert client.ask("run", "POST", b'"' + b"a" * (1 << 20) + b'"', **kind)[0] == 413
    assert client.pages.run == 1


def test_changes_are_answered(client, page, summary):
    assert client.post("nudge", {"name": "tok_emb.weight", "index": [69, 1], "h": 0.01}) == (
        200,
        page.nudge("tok_emb.weight", (69, 1), 0.01),
    )
    cells = (0, slice(None), 3, slice(None))
    found = client.post("ablate", {"name": "trf_blocks.0.att.k", "at": "0,:,3,:"})
    assert found == (200, page.ablate({"trf_blocks.0.att.k": [cells]}))
    assert found[1]["loss"] != found[1]["base"]
    _, found = client.post("ablate", {"heads": [[0, 1], [1, 3]]})
    assert found == page.ablate(
        {f"trf_blocks.{i}.att.heads": [(..., slice(4 * h, 4 * h + 4))] for i, h in ((0, 1), (1, 3))}
    )
    assert client.post("updated", {"lr": 1e-3}) == (200, page.updated(1e-3))
    assert client.post("heads", {}) == (200, summary["heads"])
    assert json.loads(client.ask("progress")[2]) == {"done": None, "of": None}


def test_heads_of_a_large_model_are_left_for_later(page, summary, monkeypatch):
    monkeypatch.setattr(payload, "QUICK_FLOPS", 0)
    assert page.summary(served=True, torch=False)["heads"] is None
    assert page.summary(served=False, torch=False)["heads"] == summary["heads"]
    with served(page) as client:
        assert client.post("heads", {}) == (200, summary["heads"])


def test_another_text_takes_the_place_of_the_first(model):
    with served(page_of(model)) as client:
        status, found = client.post("run", {"text": "other", "targets": "!"})
        assert (status, found["run"], found["text"], found["targetPieces"]) == (
            200,
            2,
            "other",
            ["t", "h", "e", "r", "!"],
        )
        assert json.loads(client.ask("summary")[2]) == found
        want = trace(model, found["tokens"], found["targets"]).grads["emb"]
        assert np.array_equal(client.numbers("array/grads/emb?run=2"), want.ravel())
        for path in ("array/grads/emb?run=1", "torch/grads/emb?run=1"):
            status, _, body = client.ask(path)
            assert (status, "reload" in json.loads(body)["error"]) == (409, True)
        assert client.post("nudge?run=1", {"name": "tok_emb.weight", "index": [0, 0], "h": 1})[0] == 409


def test_hostile_text_is_data(model):
    with served(page_of(model, HOSTILE)) as client:
        for found in (json.loads(client.ask("summary")[2]), client.post("run", {"text": HOSTILE})[1]):
            assert found["text"] == HOSTILE.replace("\ud83d", "\ufffd")
            raw = bytes(found["tokens"][0] + found["targets"][0][-1:])
            assert raw.decode() == found["text"]
            assert not any("\ud800" <= c <= "\udfff" for piece in found["pieces"] for c in piece)


def random_requests(rng, secret, count):
    """Paths, methods and bodies: near the right ones, and far from them."""
    words = [
        "array",
        "values",
        "grads",
        "caches",
        "logits",
        "emb",
        "tok_emb.weight",
        "run",
        "nudge",
        "ablate",
        "updated",
    ]
    words += [
        "..",
        "%00",
        "%ff",
        "torch",
        "summary",
        "é",
        "heads",
        "store.js",
        ",",
        ":",
        "0",
        "-1",
        "9" * 30,
        "",
        "at",
        "run=1",
    ]
    values = [
        None,
        True,
        -1,
        0,
        3,
        1e308,
        "x",
        "",
        "logits",
        "tok_emb.weight",
        "0,:",
        [],
        [[0, 1]],
        [0, 0],
        {"a": [1]},
        "\ud800",
    ]
    keys = ["text", "targets", "name", "index", "h", "lr", "at", "heads"]
    for _ in range(count):
        path = "/".join(rng.choice(words, rng.integers(1, 4)))
        if rng.random() < 0.4:
            path += "?" + rng.choice(["at", "run", "x"]) + "=" + ",".join(rng.choice(words, rng.integers(0, 4)))
        method = rng.choice(["GET", "GET", "POST", "POST", "HEAD", "PUT", "PROPFIND"])
        body = json.dumps({k: values[rng.integers(len(values))] for k in rng.choice(keys, rng.integers(0, 5))}).encode()
        if rng.random() < 0.2:
            body = rng.bytes(rng.integers(0, 60))
        yield path, str(method), body


def test_a_thousand_random_requests_end_in_sentences(page, capfd, monkeypatch):
    seen = []
    monkeypatch.setattr(server, "report_unforeseen", seen.append)
    rng, statuses = np.random.default_rng(17), {}
    with served(page) as client:
        for path, method, body in random_requests(rng, client.secret, 1000):
            sent = "".join(c if c.isascii() and c > " " else "%C3%A9" for c in path)
            status, _, answer = client.ask(sent, method, body, Content_Type="application/json")
            statuses[status] = statuses.get(status, 0) + 1
            assert status < 500, (method, path, body, answer)
            assert b"Traceback" not in answer
            if status >= 400 and method != "HEAD":
                assert list(json.loads(answer)) == ["error"], (method, path, answer)
        for _ in range(100):  # no HTTP at all
            with socket.create_connection(("127.0.0.1", client.port), 10) as sock:
                sock.sendall(rng.bytes(rng.integers(1, 200)) + b"\r\n\r\n")
                sock.shutdown(socket.SHUT_WR)
                answer = sock.recv(1000)
                assert answer == b"" or b" 400 " in answer
        assert client.ask("summary")[0] == 200
    assert not seen
    assert statuses.keys() >= {200, 400, 404}, statuses
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


def test_an_unforeseen_error_shows_no_traceback(page, monkeypatch):
    seen = []
    monkeypatch.setattr(server, "report_unforeseen", seen.append)
    monkeypatch.setattr(page, "updated", lambda lr: 1 / 0)
    with served(page) as client:
        status, answer = client.post("updated", {"lr": 1})
    assert (status, list(answer), [type(error) for error in seen]) == (500, ["error"], [ZeroDivisionError])
    assert "division" not in answer["error"]


def test_a_lack_of_memory_is_a_sentence(page, monkeypatch):
    def greedy(lr):
        raise MemoryError("numpy._core 10 GiB")

    monkeypatch.setattr(page, "updated", greedy)
    with served(page) as client:
        status, answer = client.post("updated", {"lr": 1})
    assert (status, "memory" in answer["error"]) == (413, True)


def test_every_secret_is_another_and_long(page):
    pages = Pages(page)
    addresses = set()
    for _ in range(3):
        with listen(0) as sock:
            addresses |= {address.split("/")[3] for address in server.server(pages, sock)[1:]}
    pages.close()
    assert len(addresses) == 6
    assert min(map(len, addresses)) >= 32


def test_the_browsers_address_leads_to_the_page_once(page):
    """A browser's arguments are seen by other users of the machine, so they do not hold the page's own address."""
    with served(page) as client:
        assert client.secret not in client.once
        assert client.ask("", prefix=f"/{client.once}", host="evil.example")[0] == 403
        status, headers, _ = client.ask("", prefix=f"/{client.once}")
        assert (status, headers["location"]) == (303, f"/{client.secret}/")
        assert client.ask("", prefix=f"/{client.once}")[0] == 404
        assert client.ask("summary")[0] == 200


def test_only_the_loopback_listens():
    with listen(0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"


def test_answers_do_not_wait_for_acknowledgements():
    """asyncio sets TCP_NODELAY only on sockets whose protocol is named; without it each answer took 44 ms."""
    with listen(0) as sock, socket.create_connection(sock.getsockname()):
        accepted, _ = sock.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP


# PyTorch's numbers


def test_torch_numbers_match(checkpoint):
    pytest.importorskip("torch")
    page = page_of(GPT(GPTConfig(**CONFIG), seed=1))
    with served(page, partial(torch_arrays, checkpoint, stamp_of(checkpoint))) as client:
        assert json.loads(client.ask("summary")[2])["torch"] is True
        for group in ("values", "grads"):
            arrays = page.group(group)
            largest = max(float(np.abs(a[np.isfinite(a)]).max()) for a in arrays.values())
            for name, a in arrays.items():
                found = client.numbers(f"torch/{group}/{name}").reshape(a.shape)
                finite = np.isfinite(a)
                assert np.array_equal(finite, np.isfinite(found)), name
                assert np.abs(found[finite] - a[finite]).max() <= 1e-5 * largest, name
        assert client.ask("torch/grads/nothing")[0] == 404
        assert client.ask("torch/masks/logits")[0] == 404


def test_torch_numbers_need_torch(client):
    status, _, body = client.ask("torch/values/logits")
    assert (status, "not installed" in json.loads(body)["error"]) == (404, True)


def test_a_torch_that_fails_is_a_sentence(page, tmp_path):
    file = tmp_path / "junk.safetensors"
    file.write_bytes(b"junk")
    with pytest.raises(InputError, match="PyTorch could not run this pass"):
        torch_arrays(file, stamp_of(file), page, lambda: None)


def test_torchs_process_ends_with_the_one_that_asks(checkpoint):
    """Also if that one is killed: the ids never come."""
    pytest.importorskip("torch")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as parent:
        command = [sys.executable, "-m", "torch_gpt", "explore", str(checkpoint), "--parent", str(parent.pid)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.wait(60) == 1
        parent.kill()


def test_a_torch_that_fails_is_asked_once(page):
    asked = []

    def failing(page, check_cancelled):
        asked.append(page)
        raise InputError("PyTorch could not run this pass")

    with served(page, failing) as client:
        for name in ("logits", "emb"):
            status, _, body = client.ask(f"torch/values/{name}")
            assert (status, json.loads(body)) == (400, {"error": "PyTorch could not run this pass"})
    assert len(asked) == 1


@pytest.mark.parametrize("change", ["replaced", "rewritten", "removed"])
def test_a_checkpoint_that_changed_is_not_compared(checkpoint, tmp_path, change):
    """A run in training saves other weights under the same name."""
    pytest.importorskip("torch")
    file = tmp_path / "model.safetensors"
    shutil.copy(checkpoint, file)
    stamp = stamp_of(file)
    other = GPT(GPTConfig(**CONFIG), seed=2)
    if change == "replaced":
        save(other, tmp_path / "other.safetensors", about={"encoding": "bytes"})
        os.replace(tmp_path / "other.safetensors", file)
    elif change == "rewritten":
        file.write_bytes(file.read_bytes())
        os.utime(file, ns=(stamp[2] + 1, stamp[2] + 1))
    else:
        file.unlink()
    with pytest.raises(InputError, match="has changed since the page was opened: start numpy-gpt explore again"):
        torch_arrays(file, stamp, page_of(GPT(GPTConfig(**CONFIG), seed=1)), lambda: None)


def test_torch_is_not_taken_from_the_working_folder(checkpoint, tmp_path, monkeypatch):
    """A torch.py in the current folder would be run by python -m."""
    pytest.importorskip("torch")
    (tmp_path / "torch.py").write_text("open('ran', 'w')")
    (tmp_path / "torch_gpt.py").write_text("open('ran', 'w')")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.chdir(tmp_path)
    found = torch_arrays(checkpoint, stamp_of(checkpoint), page_of(GPT(GPTConfig(**CONFIG), seed=1)), lambda: None)
    assert "logits" in found["values"]
    assert not (tmp_path / "ran").exists()


# the page as a file


@pytest.fixture(scope="module")
def html(model):
    return page_html(page_of(model, HOSTILE))


def test_file_embeds_every_array(model, html):
    page = page_of(model, HOSTILE)
    found = dict(re.findall(r'<script type="text/plain" id="array:([^"]+)">([^<]*)</script>', html))
    assert list(found) == [f"{group}/{name}" for group in GROUPS for name in page.group(group)]
    for group in GROUPS:
        for name, a in page.group(group).items():
            planes = np.frombuffer(gzip.decompress(base64.b64decode(found[f"{group}/{name}"])), np.uint8)
            numbers = np.ascontiguousarray(planes.reshape(4, -1).T).view("<f4").reshape(a.shape)
            assert np.array_equal(numbers, a), name


def test_file_embeds_the_summary_and_no_markup_of_the_text(html):
    (content,) = re.findall(r'<script type="application/json" id="summary">(.*?)</script>', html)
    summary = json.loads(content)
    assert (summary["served"], summary["text"]) == (False, HOSTILE.replace("\ud83d", "\ufffd"))
    assert len(summary["heads"]["zeroed"]) == 2
    assert "alert(1)</" not in html
    assert "<" not in content


def test_file_loads_nothing_from_elsewhere(html):
    (importmap,) = re.findall(r'<script type="importmap">(.*?)</script>', html)
    modules = json.loads(importmap)["imports"]
    assert set(modules) == {f"explore/{path.name}" for path in STATIC.glob("*.js")}
    code = re.sub(r'<script type="text/plain".*?</script>|[A-Za-z0-9+/=]{200,}', "", html)
    for name, address in modules.items():
        source = base64.b64decode(address.removeprefix("data:text/javascript;base64,")).decode()
        assert source == (STATIC / name.partition("/")[2]).read_text("utf-8")
        code += source
        assert {*re.findall(r'^import\b[^"\n]*"([^"]+)"', source, re.MULTILINE)} <= set(modules), name
        assert not re.search(r"\bimport\(|\bimportScripts|\bnew (Worker|WebSocket|EventSource)|XMLHttpRequest", source)
    namespaces = {"http://www.w3.org/1998/Math/MathML", "http://www.w3.org/2000/svg"}
    assert {*re.findall(r"(?:https?:|(?<=[\"'(])//)[^\s\"'<>)\\]+", code)} <= namespaces
    assert not re.search(r"<(?:link[^>]+stylesheet|script[^>]+src|img|iframe|base|object|embed)\b", html)
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_a_file_that_would_be_too_large_names_its_size(model, monkeypatch):
    with pytest.raises(InputError, match=r"1,30\d MB"):
        as_file.check_fits(GPTConfig.gpt2("124M"), 4)
    page = page_of(model)
    monkeypatch.setattr(as_file, "LARGEST", 100_000)
    with pytest.raises(InputError, match=r"MB of arrays.*to serve the page"):
        page_html(page)


# the command


def run(*args):
    return CliRunner().invoke(main, ["explore", *map(str, args)])


def test_out_writes_the_file(checkpoint, tmp_path):
    out = tmp_path / "page.html"
    result = run(checkpoint, TEXT, "--out", out)
    assert (result.exit_code, result.output.startswith(f"Saved {out}")) == (0, True), result.output
    assert out.read_text("utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [out]


def test_unusable_input_is_one_sentence_and_exit_code_2(checkpoint, tmp_path):
    big = tmp_path / "big.safetensors"
    save(GPT(GPTConfig(**CONFIG | {"emb_dim": 256, "vocab_size": 40000})), big, about={"encoding": "bytes"})
    there = tmp_path / "there.html"
    there.write_text("precious")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = [
            ((tmp_path / "nowhere", TEXT), "does not exist"),
            (("", TEXT), "an empty path names no checkpoint"),
            ((checkpoint, TEXT, "--out", tmp_path / f"{'x' * 220}.html"), "a name of at most 200 bytes"),
            ((tmp_path / "gpt2-124M", TEXT), "(to fetch GPT-2: numpy-gpt download 124M)"),
            ((checkpoint, ""), "empty"),
            ((checkpoint, "a"), "one token"),
            ((checkpoint, TEXT, "--targets", ""), "what follows the text (--targets) is empty"),
            ((checkpoint, "a" * 200), "reads 128 tokens, and the text has 199"),
            ((checkpoint, TEXT, "--port", taken.getsockname()[1]), "is in use"),
            ((checkpoint, TEXT, "--encoding", "gpt2"), "50,257"),
            ((TEXT, checkpoint), "swapped"),
            ((checkpoint, TEXT, "--out", there), "exists already"),
            ((checkpoint, TEXT, "--out", tmp_path / "page"), "a name that ends in .html"),
            ((checkpoint, TEXT, "--out", tmp_path / "no" / "x.html"), "is not a folder"),
            ((big, TEXT, "--out", tmp_path / "x.html"), "MB of arrays"),
        ]
        for args, said in cases:
            result = run(*args)
            assert (result.exit_code, result.stdout) == (2, ""), (args, result.output)
            assert said in result.stderr, (args, result.stderr)
            assert result.stderr.count("\n") == 1, result.stderr
    assert there.read_text() == "precious"
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("package", command.EXTRA)
def test_a_missing_extra_is_said(checkpoint, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == package else object())
    result = run(checkpoint, TEXT)
    assert result.exit_code == 2
    assert result.stderr == f"Error: the page needs {package}: {sys.executable} -m pip install -e '.[explore]'\n"


@pytest.mark.parametrize(("flags", "asked", "word"), [((), True, "Opening"), (("--no-browser",), False, "Open")])
def test_address_is_printed_and_opened(checkpoint, monkeypatch, flags, asked, word):
    opened = []
    browser = SimpleNamespace(open=lambda address: not opened.append(address))
    monkeypatch.setattr(webbrowser, "get", lambda: browser)
    monkeypatch.setattr(server, "serve", lambda pages, sock, ready: ready(Served(None, "http://here/", "http://once")))
    result = run(checkpoint, TEXT, *flags)
    assert (result.exit_code, result.output) == (0, f"{word} http://here/ in a browser; Ctrl-C stops the server\n")
    assert opened == (["http://once"] if asked else [])


def test_a_file_made_meanwhile_is_kept(page, tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    real = as_file.page_html

    def slow(page):
        out.write_text("precious")
        return real(page)

    monkeypatch.setattr(as_file, "page_html", slow)
    with pytest.raises(InputError, match="exists already"):
        write_page(page, out)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {out: "precious"}


def test_an_unusable_browser_variable_is_no_error(checkpoint, monkeypatch):
    monkeypatch.setenv("BROWSER", "foo '%s")
    monkeypatch.setattr(server, "serve", lambda pages, sock, ready: ready(Served(None, "http://here/", "http://once")))
    result = run(checkpoint, TEXT)
    assert (result.exit_code, result.output) == (0, "Open http://here/ in a browser; Ctrl-C stops the server\n")


@pytest.mark.parametrize("kind", ["none", "broken", "terminal"])
def test_without_a_browser_the_address_is_enough(checkpoint, monkeypatch, kind):
    def get():
        if kind == "none":
            raise webbrowser.Error("could not locate runnable browser")
        if kind == "broken":
            return SimpleNamespace(open=lambda address: False)
        browser = webbrowser.GenericBrowser("w3m")
        browser.open = lambda address: pytest.fail("w3m would take over the terminal")
        return browser

    monkeypatch.setattr(webbrowser, "get", get)
    monkeypatch.setattr(server, "serve", lambda pages, sock, ready: ready(Served(None, "http://here/", "http://once")))
    result = run(checkpoint, TEXT)
    assert (result.exit_code, result.output) == (0, "Open http://here/ in a browser; Ctrl-C stops the server\n")


def test_ctrl_c_ends_it_without_a_word(checkpoint):
    code = "from numpy_gpt.cli import main; main(prog_name='numpy-gpt')"
    flags = [str(checkpoint), TEXT, "--no-browser"]
    with subprocess.Popen(
        [sys.executable, "-c", code, "explore", *flags],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        address = process.stdout.readline().split()[1]
        connection = http.client.HTTPConnection(*address.split("/")[2].split(":"), timeout=30)
        connection.request("GET", f"/{address.split('/')[3]}/summary")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


def test_close_stops_what_is_being_computed(page):
    pages = Pages(page)

    def endless(tick):
        while True:
            tick(0, 1)

    page.zeroed_heads, pages._heads = endless, None
    try:

        async def end():
            asyncio.get_running_loop().call_later(0.1, pages.close)
            await pages.compute(pages.heads, pages.page)

        with pytest.raises(StoppedError):
            asyncio.run(end())
    finally:
        del page.zeroed_heads


def test_queued_work_answers_for_the_text_it_was_asked_for(model):
    """Another text may be shown while a request waits for its turn."""
    old = page_of(model)
    pages = Pages(old, lambda page, check: {"values": {}})
    pages.show(page_of(model))
    for work in (pages.heads, pages.reference):
        with pytest.raises(server.HTTPException) as error:
            work(old)
        assert error.value.status_code == 409
        assert work(pages.page) is not None
    pages.close()


@pytest.mark.parametrize(("port", "host", "allowed"), [(80, "127.0.0.1", True), (81, "127.0.0.1", False)])
def test_host_without_a_port_is_that_of_port_80(page, port, host, allowed):
    pages = Pages(page)
    assert (host in server.application(pages, "secret", "once", port).hosts) == allowed
    pages.close()
