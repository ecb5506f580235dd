"""The network as the tests see it: a server on this machine that answers for any address, well or badly."""

import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

import requests

PROXIES = [name for scheme in ("HTTP", "HTTPS", "ALL") for name in (f"{scheme}_PROXY", f"{scheme}_proxy".lower())]
"""The variables that send requests elsewhere."""

HANG = "hang"
"""A page that is never sent."""


@dataclass(frozen=True)
class Ranged:
    """A page of a server that knows Range and If-Range (its ETag, or Last-Modified), or not; as it answers once.

    sent: bytes after which the connection ends. headers: more of them; those of the answer itself are overridden, and
    None leaves one out. extra: what is sent after the end.
    """

    content: bytes
    headers: dict[str, str | None] = field(default_factory=dict)
    sent: int | None = None
    knows_range: bool = True
    knows_if_range: bool = True
    extra: bytes = b""

    def answer(self, asked):
        """(status, headers, body) for the headers asked with."""
        status, start, length = 200, 0, len(self.content)
        headers = {}
        wanted = re.fullmatch(r"bytes=(\d+)-", asked.get("Range", ""))
        condition = asked.get("If-Range")
        known = condition in (None, self.headers.get("ETag"), self.headers.get("Last-Modified"))
        if wanted and self.knows_range and (known or not self.knows_if_range):
            status, start = 206, int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{length - 1}/{length}"
            if start >= length:
                status, start, headers["Content-Range"] = 416, length, f"bytes */{length}"
        headers = {"Content-Length": str(length - start)} | headers | self.headers
        body = self.content[start:][: self.sent] + (self.extra if self.sent is None else b"")
        return status, {name: value for name, value in headers.items() if value is not None}, body


@dataclass(frozen=True)
class Redirect(Ranged):
    """A page that is somewhere else: content is the address, as the bytes of the header."""

    def answer(self, asked):
        return 302, {"Location": self.content.decode("latin-1"), "Content-Length": "0"}, b""


class Web:
    """While it is open, every download asks this server and nobody else.

    pages: address -> its bytes; (bytes, length) for a connection that ends before the announced length, or stalls there
    if that is None; a status number; HANG; a Ranged; or a list of these, one for each time it is asked, the last for
    good. Other addresses cannot be reached. asked: what was asked for, in order; headers: with what. Other processes
    ask for address(url). Proxies set in the environment are unset meanwhile.
    """

    def __init__(self, monkeypatch):
        self.pages = {}
        self.asked = []
        self.headers = []
        self._monkeypatch = monkeypatch
        self._closing = threading.Event()

    def __enter__(self):
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):  # http.server's name
                page = web.pages[unquote(self.path[1:])]
                web.headers.append(dict(self.headers))
                if isinstance(page, list):
                    page = page.pop(0) if len(page) > 1 else page[0]
                if page == HANG:
                    web._closing.wait()
                elif isinstance(page, int):
                    self.send_error(page)
                elif isinstance(page, Ranged):
                    status, headers, body = page.answer(self.headers)
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)
                else:
                    body, length = page if isinstance(page, tuple) else (page, len(page))
                    self.send_response(200)
                    self.send_header("Content-Length", str(length or len(body) + 1))
                    self.end_headers()
                    self.wfile.write(body)
                    if length is None:
                        web._closing.wait()

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        get = requests.get

        def local(url, **options):
            self.asked.append(url)
            if url not in self.pages:
                raise requests.exceptions.ConnectionError(f"the tests have no page {url}")
            return get(self.address(url), **options)

        for name in PROXIES:
            self._monkeypatch.delenv(name, raising=False)
        self._monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        self._monkeypatch.setattr(requests, "get", local)  # numpy_gpt.io.network fetches with it, and so does tiktoken
        return self

    def address(self, url):
        """Where this machine has the page of an address."""
        return f"http://127.0.0.1:{self._server.server_port}/{quote(url, safe='')}"

    def __exit__(self, *_):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
