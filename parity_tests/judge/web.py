"""A local server that answers for any address, correctly or with faults."""

import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

import requests

PROXIES = [name for scheme in ("HTTP", "HTTPS", "ALL") for name in (f"{scheme}_PROXY", f"{scheme}_proxy".lower())]
"""The environment variables that set a proxy."""

HANG = "hang"
"""A page that is never sent."""


@dataclass(frozen=True)
class Ranged:
    """One answer of a server that may support Range and If-Range (by ETag or Last-Modified).

    sent: bytes after which the connection ends. headers: added to the answer's or overriding them; None omits one.
    extra: bytes sent after the end.
    """

    content: bytes
    headers: dict[str, str | None] = field(default_factory=dict)
    sent: int | None = None
    knows_range: bool = True
    knows_if_range: bool = True
    extra: bytes = b""

    def answer(self, asked):
        """(status, headers, body) for the request's headers."""
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
    """A redirect: content is the address, as the bytes of the Location header."""

    def answer(self, asked):
        return 302, {"Location": self.content.decode("latin-1"), "Content-Length": "0"}, b""


class Web:
    """Within the block, every download goes to this server.

    pages: address -> its bytes; (bytes, length) for a connection that ends before the announced length, or stalls if
    length is None; a status number; HANG; a Ranged; or a list of these, one per request, the last repeated. Other
    addresses are unreachable. asked: the addresses requested, in order; headers: the requests' headers. Other processes
    request address(url). Proxies in the environment are unset within the block.
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
        """The local address of a page."""
        return f"http://127.0.0.1:{self._server.server_port}/{quote(url, safe='')}"

    def __exit__(self, *_):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
