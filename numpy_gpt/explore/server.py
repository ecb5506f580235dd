"""The page's server: on 127.0.0.1 only, under a secret path, for one Host and Origin, and nothing but the page."""

import base64
import hashlib
import logging
import re
import secrets
import socket
import warnings
from collections.abc import Callable
from contextlib import suppress
from errno import EADDRINUSE
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from numpy_gpt.errors import InputError
from numpy_gpt.explore.pages import ANOTHER_TEXT, Pages, StoppedError
from numpy_gpt.explore.payload import Page, parse_slice, raw
from numpy_gpt.explore.static_files import STATIC, index_html
from numpy_gpt.io.bounded_json import SMALL, parse_json
from numpy_gpt.io.outermost import report_unforeseen
from numpy_gpt.typing import Array

HOST = "127.0.0.1"
TYPES = {"js": "text/javascript", "css": "text/css"}
LARGEST_BODY = 1 << 20
INLINE_SCRIPT = re.compile(r"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)


def policy(html: str) -> str:
    """The Content-Security-Policy of the page: itself, and the inline scripts that are in it now."""
    digests = [hashlib.sha256(script.encode()).digest() for script in INLINE_SCRIPT.findall(html)]
    scripts = " ".join(["'self'", *(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)])
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'self'; img-src data:; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


def application(pages: Pages, secret: str, once: str, port: int) -> ASGIApp:
    """The app under /secret/, for http://127.0.0.1:port or localhost; /once leads there, the first time only."""

    def current(request: Request) -> Page:
        run = request.query_params.get("run")
        if run is not None and run != str(pages.run):
            raise HTTPException(409, ANOTHER_TEXT)
        return pages.page

    async def index(request: Request) -> Response:
        return Response(index_html(), media_type="text/html; charset=utf-8")

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if not re.fullmatch(r"[a-z]+\.(js|css)", name) or not (STATIC / name).is_file():
            raise HTTPException(404, "there is no such file")
        return Response((STATIC / name).read_bytes(), media_type=f"{TYPES[name.rpartition('.')[2]]}; charset=utf-8")

    async def summary(request: Request) -> Response:
        return Response(pages.summary, media_type="application/json")

    async def progress(request: Request) -> Response:
        done, of = pages.progress or (None, None)
        return JSONResponse({"done": done, "of": of})

    async def array(request: Request) -> Response:
        page, group = current(request), request.path_params["group"]
        try:
            found = page.group(group)
        except KeyError:
            raise HTTPException(404, "there is no such group of arrays") from None
        return await numbers(request, found)

    async def torch(request: Request) -> Response:
        found = await pages.compute(pages.reference, current(request))
        return await numbers(request, found.get(request.path_params["group"], {}))

    async def numbers(request: Request, arrays: Any) -> Response:
        name, at = request.path_params["name"], request.query_params.get("at")
        if name not in arrays:
            raise HTTPException(404, "there is no such array")
        found: Array = arrays[name]
        index = () if at is None else parse_slice(at, found.shape)
        return Response(await run_in_threadpool(raw, found, index), media_type="application/octet-stream")

    async def run(request: Request) -> Response:
        body = await json_body(request)
        text, targets = body.get("text"), body.get("targets")
        if not isinstance(text, str) or not isinstance(targets, str | None):
            raise InputError("text and targets are strings; targets may be null")
        return Response(await pages.compute(pages.read, text, targets), media_type="application/json")

    async def nudge(request: Request) -> Response:
        page, body = current(request), await json_body(request)
        name, index, h = body.get("name"), body.get("index"), finite(body, "h")
        if not isinstance(name, str) or name not in page.trace.params:
            raise InputError("name must be a parameter's")
        if not isinstance(index, list) or not all(type(i) is int for i in index):
            raise InputError("index must be a list of whole numbers")
        at = parse_slice(",".join(map(str, index)), page.trace.params[name].shape)
        return JSONResponse(await pages.compute(page.nudge, name, at, h))

    async def ablate(request: Request) -> Response:
        page, body = current(request), await json_body(request)
        return JSONResponse(await pages.compute(page.ablate, zeroed(page, body)))

    async def updated(request: Request) -> Response:
        page, lr = current(request), finite(await json_body(request), "lr")
        return JSONResponse(await pages.compute(page.updated, lr))

    async def heads(request: Request) -> Response:
        return JSONResponse(await pages.compute(pages.heads, current(request)))

    routes = [
        Route("/", index),
        Route("/summary", summary),
        Route("/progress", progress),
        Route("/array/{group}/{name}", array),
        Route("/torch/{group}/{name}", torch),
        *(Route(f"/{each.__name__}", each, methods=["POST"]) for each in (run, nudge, ablate, updated, heads)),
        Route("/{name}", static),
    ]
    kinds = (HTTPException, InputError, MemoryError, StoppedError, Exception)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, _answer))
    app.router.redirect_slashes = False
    default = [HOST, "localhost"] if port == 80 else []  # a browser leaves the default port out
    return Guard(app, secret, once, {*default, *(f"{host}:{port}" for host in (HOST, "localhost"))})


async def _answer(request: Request, error: Exception) -> Response:
    """A sentence, and its status. An error that was not foreseen is raised again afterwards, for Guard to report."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    if isinstance(error, InputError):
        return JSONResponse({"error": str(error)}, 400)
    if isinstance(error, MemoryError):
        said = "not enough memory: a shorter text or a smaller model needs less"
        return JSONResponse({"error": said}, 413)
    if isinstance(error, StoppedError):
        return JSONResponse({"error": "the server is ending"}, 409)
    return JSONResponse({"error": "internal error: see the terminal"}, 500)


async def json_body(request: Request) -> dict[str, Any]:
    """The request's body, a JSON object of at most a megabyte; InputError for anything else."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body is JSON: say so in Content-Type")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > LARGEST_BODY:
            raise HTTPException(413, "the body is larger than a megabyte")
    try:
        body = parse_json(bytes(data), SMALL)
    except (ValueError, RecursionError) as error:
        raise InputError("the body is not JSON") from error
    if not isinstance(body, dict):
        raise InputError("the body is a JSON object")
    return body


def finite(body: dict[str, Any], key: str) -> float:
    value = body.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise InputError(f"{key} is a finite number")
    return float(value)


def zeroed(page: Page, body: dict[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
    """What an ablation sets to 0: activation -> indices."""
    config = page.model.config
    if "heads" in body:
        pairs, HS = body["heads"], config.head_size
        known = isinstance(pairs, list) and len(pairs) <= config.n_layers * config.n_heads
        found: dict[str, list[tuple[Any, ...]]] = {}
        for pair in pairs if known else [None]:
            if (
                not isinstance(pair, list)
                or [type(i) for i in pair] != [int, int]
                or not (0 <= pair[0] < config.n_layers and 0 <= pair[1] < config.n_heads)
                or pairs.count(pair) > 1
            ):
                raise InputError("heads is a list of pairs: layer and head, each once")
            cells = (..., slice(pair[1] * HS, (pair[1] + 1) * HS))
            found.setdefault(f"trf_blocks.{pair[0]}.att.heads", []).append(cells)
        return found
    name, at = body.get("name"), body.get("at")
    if not isinstance(name, str) or name not in page.trace.values or not isinstance(at, str):
        raise InputError("name is an activation's, and at a slice such as 0,:,3,:")
    return {name: [parse_slice(at, page.trace.values[name].shape)]}


class Guard:
    """Passes on requests from the page itself, and adds the security headers."""

    def __init__(self, app: ASGIApp, secret: str, once: str, hosts: set[str]):
        self.app, self.prefix, self.hosts = app, f"/{secret}/", hosts
        self._once: str | None = f"/{once}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers()]
            await send(message)

        try:
            await self._route(scope)(scope, receive, answer)
        except ClientDisconnect:
            pass
        except Exception as error:  # it has been answered
            report_unforeseen(error)

    def _route(self, scope: Scope) -> ASGIApp:
        """The app, with the secret cut from the path, or a response that refuses the request."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        hosts = [value.decode("latin-1").lower() for value in headers.get(b"host", [])]
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return JSONResponse({"error": "this server answers to 127.0.0.1 only"}, 403)
        origins = {value.decode("latin-1").lower() for value in headers.get(b"origin", [])}
        if origins - {f"http://{hosts[0]}"}:
            return JSONResponse({"error": "this request comes from another page"}, 403)
        path = scope["path"]
        if self._once is not None and _same(path, self._once):
            self._once = None
            return RedirectResponse(self.prefix, 303)
        if _same(path, self.prefix[:-1]):
            return RedirectResponse(self.prefix)
        if not _same(path[: len(self.prefix)], self.prefix):
            return JSONResponse({"error": "there is nothing here: use the address that numpy-gpt explore printed"}, 404)
        scope["path"] = path[len(self.prefix) - 1 :]
        scope["raw_path"] = scope["path"].encode("utf-8", "surrogatepass")
        return self.app

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = {
            "content-security-policy": policy(index_html()),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-resource-policy": "same-origin",
            "cross-origin-opener-policy": "same-origin",
            "cache-control": "no-store",
        }
        return [(name.encode(), value.encode()) for name, value in headers.items()]


def _same(given: str, secret: str) -> bool:
    """Whether two texts are equal, in a time that does not tell where they differ."""
    return secrets.compare_digest(given.encode("utf-8", "surrogatepass"), secret.encode())


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1; port 0: any free one. Raises InputError if the port is in use or not allowed."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # so named, asyncio sets TCP_NODELAY
    try:
        sock.bind((HOST, port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        why = "is in use" if error.errno == EADDRINUSE else f"cannot be used ({error.strerror})"
        raise InputError(f"port {port} {why}: choose another, or leave --port out for a free one") from error
    return sock


class Served(NamedTuple):
    """A server, not yet running, the page's address, and one that leads there once.

    The second is for a browser's command line, which other users of the machine can read: who opens it first gets the
    page, and the other sees that it is gone.
    """

    server: uvicorn.Server
    address: str
    once: str


def server(pages: Pages, sock: socket.socket) -> Served:
    """A server for this socket."""
    secret, once, port = secrets.token_urlsafe(24), secrets.token_urlsafe(24), sock.getsockname()[1]
    config = uvicorn.Config(
        application(pages, secret, once, port),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        limit_concurrency=200,
        timeout_graceful_shutdown=1,
    )
    root = f"http://{HOST}:{port}"
    return Served(uvicorn.Server(config), f"{root}/{secret}/", f"{root}/{once}")


def serve(pages: Pages, sock: socket.socket, ready: Callable[[Served], None]) -> None:
    """Serve until Ctrl-C. ready is called with what is served, whose addresses can be opened from then on."""
    served = server(pages, sock)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # which reports a flood of connections line by line
    try:
        with suppress(KeyboardInterrupt), warnings.catch_warnings():  # uvicorn raises it again when all is closed
            warnings.filterwarnings("ignore", ".*was never awaited", RuntimeWarning)  # if it comes before the first
            ready(served)  # the socket listens already: a browser waits until it is served
            served.server.run(sockets=[sock])
    finally:
        pages.close()
