"""numpy_gpt.io.network: errors name the environment's unusable proxies and certificates."""

import socket
import subprocess
import sys

import pytest

from numpy_gpt.io.network import NetworkError, ask
from parity_tests.judge.web import PROXIES

URL = "https://first.example/thing"
BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (*PROXIES, *BUNDLES, "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def fail(url=URL):
    with pytest.raises(NetworkError) as error:
        ask(url)
    return error.value


@pytest.mark.parametrize("proxy", ["http://", "http://[", "ftp://a:1", "http://a:99999", "a b", "http://a..b", "//"])
@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_invalid_proxy_is_named(monkeypatch, variable, proxy):
    """requests does not wrap all of urllib3's errors."""
    monkeypatch.setenv(variable, proxy)
    error = fail()
    assert str(error).startswith(f"could not be reached through the proxy in ${variable.upper()} (")
    assert not error.again


def test_unreachable_proxy_is_named_without_password(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@127.0.0.1:1")
    error = fail()
    assert str(error) == "could not be reached through the proxy in $HTTPS_PROXY (ProxyError)"
    assert error.again


def test_proxy_for_other_hosts_is_not_named(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert "proxy" not in str(fail("https://127.0.0.1:1/thing"))


@pytest.mark.parametrize("variable", BUNDLES)
@pytest.mark.parametrize("kind", ["missing", "no certificate"])
def test_invalid_certificate_bundle_is_named(tmp_path, monkeypatch, variable, kind):
    """A missing bundle raises a plain OSError, like a disk error."""
    bundle = tmp_path / "bundle.pem"
    if kind == "no certificate":
        bundle.write_text("x")
    monkeypatch.setenv(variable, str(bundle))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        error = fail(f"https://127.0.0.1:{listening.getsockname()[1]}/thing")
    assert str(error).startswith("could not be reached securely (")
    assert str(error).endswith(f"; ${variable} is {bundle})")
    assert not error.again


@pytest.mark.parametrize(
    "variables",
    [{"HTTPS_PROXY": "http://a:99999"}, {"HTTPS_PROXY": "ftp://a"}, {"REQUESTS_CA_BUNDLE": "/nope"}],
    ids=lambda variables: next(iter(variables.values())),
)
def test_command_ends_with_a_one_line_error(tmp_path, monkeypatch, variables):
    for name, value in (variables | {"XDG_CACHE_HOME": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "numpy_gpt", "download", "124M", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: hparams.json could not be fetched: https://openaipublic.blob")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
