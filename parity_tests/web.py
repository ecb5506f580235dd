"""The network as the tests see it: a server on this machine that answers for any address, well or badly."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

import requests

HANG = "hang"
"""A page that is never sent."""


class Web:
    """While it is open, every download asks this server and nobody else.

    pages: address -> its bytes; (bytes, length) for a connection that ends before the announced length, or stalls there
    if that is None; a status number; or HANG. Other addresses cannot be reached. asked: what was asked for, in order.
    """

    def __init__(self, monkeypatch):
        self.pages = {}
        self.asked = []
        self._monkeypatch = monkeypatch
        self._closing = threading.Event()

    def __enter__(self):
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):  # http.server's name
                page = web.pages[unquote(self.path[1:])]
                if page == HANG:
                    web._closing.wait(10)
                elif isinstance(page, int):
                    self.send_error(page)
                else:
                    body, length = page if isinstance(page, tuple) else (page, len(page))
                    self.send_response(200)
                    self.send_header("Content-Length", str(length or len(body) + 1))
                    self.end_headers()
                    self.wfile.write(body)
                    if length is None:
                        web._closing.wait(10)

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
            return get(f"http://127.0.0.1:{self._server.server_port}/{quote(url, safe='')}", **options)

        self._monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        self._monkeypatch.setattr(requests, "get", local)  # pooch and tiktoken both fetch with it
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
