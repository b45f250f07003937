"""The flags that say how a server with a lock is reached, and what is refused of them."""

import argparse
from pathlib import Path

import pytest

from ml_inference_server.api import Client, tls_credentials
from ml_inference_server.utils.connection import KEY_VARIABLE, Connection, add_arguments, connection_from
from ml_inference_server.utils.errors import ConfigError
from tests.integration.tls_kit import Authority

TOKEN = "mlis_abc"  # noqa: S105


def given(*flags: str, environment: dict[str, str] | None = None) -> Connection:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return connection_from(parser.parse_args(flags), environment or {})


def test_nothing_given_speaks_in_the_clear_and_shows_no_key() -> None:
    plain = given()
    assert plain == Connection()
    assert plain.scheme == "http"
    assert plain.headers() == {}


def test_each_file_means_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue()
    assert given("--tls").pems() == (None, None, None)
    assert given("--ca", str(authority.file)).pems() == (authority.pem, None, None)
    both = given("--cert", str(pair.cert), "--key", str(pair.key))
    assert both.tls
    assert both.pems() == (None, pair.key.read_bytes(), pair.cert.read_bytes())
    assert both.scheme == "https"


def test_a_key_comes_from_its_file_or_the_environment_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    from_file = given("--api-key-file", str(file), environment={KEY_VARIABLE: "other"})
    assert from_file.headers() == {"authorization": f"Bearer {TOKEN}"}
    assert given(environment={KEY_VARIABLE: TOKEN}) == from_file
    assert TOKEN not in repr(from_file)


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, other = authority.issue(), authority.issue()
    junk = tmp_path / "junk"
    junk.write_text("a key")
    cases = [
        (["--cert", str(pair.cert)], "--cert and --key go together"),
        (["--ca", str(tmp_path / "none")], "--ca .*none: cannot be read: No such file"),
        (["--ca", str(junk)], "--ca .*junk: no certificate in PEM form"),
        (["--cert", str(pair.cert), "--key", str(other.key)], "--cert .* no certificate with its private key"),
        (["--api-key-file", str(tmp_path / "none")], "--api-key-file .*none: cannot be read: No such file"),
        (["--api-key-file", str(junk)], "--api-key-file .*junk: a key has printable ASCII"),
    ]
    for flags, told in cases:
        with pytest.raises(ConfigError, match=told):
            given(*flags)
    with pytest.raises(ConfigError, match=f"^{KEY_VARIABLE}: a key has") as caught:
        given(environment={KEY_VARIABLE: "se\ncret"})
    assert "cret" not in str(caught.value)


def test_the_client_refuses_what_no_header_can_hold(tmp_path: Path) -> None:
    for key in ("", "a b", "\u00e9", "a\n"):
        with pytest.raises(ValueError, match="^api_key: printable ASCII characters are needed, without spaces$"):
            Client(api_key=key)
    with pytest.raises(ValueError, match="cert and key go together"):
        tls_credentials(cert=tmp_path)
    with pytest.raises(FileNotFoundError):
        tls_credentials(tmp_path / "none")
