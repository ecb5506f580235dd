"""HTTP requests, whose failures all become one exception worded for the user.

requests lets exceptions of every layer below through: its own, urllib3's, OSError for a missing CA bundle, ValueError
and UnicodeError for a redirect to a malformed address. They are caught only around the request and each read, so that
errors of the disk and of the network are never confused.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import requests

TIMEOUT = 10.0
"""Seconds to wait for a connection, and then for each next piece of an answer."""


class NetworkError(Exception):
    """A failed request, in words that follow the address. again: retrying may help."""

    def __init__(self, words: str, again: bool = False):
        super().__init__(words)
        self.again = again


def ask(url: str, headers: dict[str, str] | None = None) -> "requests.Response":
    """Request url and return the answer, whatever its status, as a context manager; its body is not yet read.

    Raises NetworkError, also for a web page: no file requested here is HTML, but login and error pages are.
    """
    import requests  # here, since it takes longer to import than all of numpy_gpt

    with _in_words(url):
        answer = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    if answer.status_code == 200 and answer.headers.get("Content-Type", "").lower().startswith("text/html"):
        answer.close()
        raise NetworkError("answered with a web page in place of the file")
    return answer


def read(answer: "requests.Response", size: int) -> Iterator[bytes]:
    """The answer's body in pieces of at most `size` bytes. Raises NetworkError."""
    pieces = answer.iter_content(size)
    while True:
        with _in_words(answer.url):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def refused_by(answer: "requests.Response") -> NetworkError:
    """The error for an answer with an unexpected status."""
    return NetworkError(f"answered {answer.status_code} {answer.reason or ''}".rstrip())


@contextmanager
def _in_words(url: str) -> Iterator[None]:
    import requests
    import urllib3

    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise _worded(url, error) from error


def _worded(url: str, error: Exception) -> NetworkError:
    import requests

    text = str(error)
    if "timed out" in text:
        return NetworkError(f"did not answer within {TIMEOUT:g} seconds", again=True)
    if "Connection broken" in text or "ended prematurely" in text:
        return NetworkError("broke off before the end", again=True)
    if isinstance(error, requests.TooManyRedirects):
        return NetworkError("redirects endlessly")
    if isinstance(error, requests.exceptions.SSLError) or "CA certificate" in text:
        again = "certificate" not in text.lower()
        return NetworkError(f"could not be reached securely ({_certificate_fault(text)})", again)
    if proxy := _proxy_variable(url):
        again = isinstance(error, requests.ConnectionError)
        fault = type(error).__name__ if again else text
        return NetworkError(f"could not be reached through the proxy in ${proxy} ({fault})", again)
    if isinstance(error, ValueError):  # from urllib3, Python or requests; our own addresses are valid
        return NetworkError(f"redirects to an address that cannot be used ({text})")
    return NetworkError(f"could not be reached ({type(error).__name__})", again=True)


def _certificate_fault(text: str) -> str:
    fault = found[1] if (found := re.search(r"\] ([^(\[]+) \(_ssl", text)) else text
    variable = next((name for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if os.environ.get(name)), None)
    return f"{fault}; ${variable} is {os.environ[variable]}" if variable else fault


def _proxy_variable(url: str) -> str | None:
    """The environment variable of the proxy for this address. Its value may hold a password."""
    import requests

    proxies = requests.utils.get_environ_proxies(url)
    scheme = next((scheme for scheme in (urlsplit(url).scheme, "all") if scheme in proxies), None)
    return scheme and f"{scheme.upper()}_PROXY"
