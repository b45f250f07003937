"""When a start says that strangers could come in, and what it says."""

import pytest

from ml_inference_server.door.exposure import exposure
from ml_inference_server.utils.config import Settings

TLS = {"cert": "c", "key": "k"}
KEYS = {"keys_file": "f"}


def told(*, host: str = "0.0.0.0", http_host: str = "127.0.0.1", **server: object) -> str:
    return exposure(Settings.model_validate({"server": {"host": host, **server}, "metrics": {"host": http_host}}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "::ffff:127.0.0.1"])
def test_this_machine_alone_is_no_danger(host: str) -> None:
    assert told(host=host, http_host=host) == ""


def test_each_lack_is_named() -> None:
    both = told(http_host="::")
    assert both.startswith("open to the network: gRPC on 0.0.0.0 and HTTP on ::; whoever")
    assert "server.auth.keys_file" in both
    assert "server.tls.cert" in both
    assert "can read texts and keys: set server.tls.cert" in told(auth=KEYS)
    assert "server.tls.cert" not in told(tls=TLS)
    assert "server.auth.keys_file" in told(tls=TLS)
    assert "HTTP" not in told()
    assert told(host="example.com") != ""


def test_a_lock_with_tls_is_silent() -> None:
    assert told(tls=TLS, auth=KEYS) == ""
    assert told(tls={**TLS, "client_ca": "a"}) == ""
    assert told(http_host="0.0.0.0", host="127.0.0.1", tls=TLS, auth=KEYS) == ""
