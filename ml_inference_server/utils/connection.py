"""How a program of ours reaches a server that has a lock: flags, certificates, key."""

import argparse
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ml_inference_server.utils.errors import ConfigError

KEY_VARIABLE = "MLIS_API_KEY"


@dataclass(frozen=True)
class Connection:
    """tls: False speaks in the clear. ca, cert, key: files in PEM form, empty where there are none.

    ca: of the authorities that the server's certificate may come from, in place of those that everybody trusts. cert
    and key: what the server asks clients for. api_key: what the server's file of keys knows.
    """

    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""
    api_key: str = field(default="", repr=False)

    @property
    def scheme(self) -> str:
        return "https" if self.tls else "http"

    def pems(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The contents of ca, key and cert, in the order in which gRPC's ssl_channel_credentials takes them."""
        ca, key, cert = (Path(path).read_bytes() if path else None for path in (self.ca, self.key, self.cert))
        return ca, key, cert

    def context(self) -> ssl.SSLContext:
        """ConfigError where the files cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--ca {self.ca}: {_why(error, 'no certificate in PEM form')}") from None
        if self.cert:
            try:
                context.load_cert_chain(self.cert, self.key, lambda: "")
            except (OSError, ValueError) as error:
                why = _why(error, "no certificate with its private key, in PEM form and without a passphrase")
                raise ConfigError(f"--cert {self.cert} --key {self.key}: {why}") from None
        return context

    def headers(self) -> dict[str, str]:
        """What each request carries, over HTTP and as gRPC's metadata alike."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


IN_THE_CLEAR = Connection()


def _why(error: OSError | ValueError, otherwise: str) -> str:
    is_about_files = isinstance(error, OSError) and not isinstance(error, ssl.SSLError)
    return f"cannot be read: {error.strerror}" if is_about_files and isinstance(error, OSError) else otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls", action="store_true", help="speak TLS to the server; each of the next three means it")
    parser.add_argument("--ca", default="", metavar="FILE", help="authorities that the server's certificate may be of")
    parser.add_argument("--cert", default="", metavar="FILE", help="a certificate to show to the server")
    parser.add_argument("--key", default="", metavar="FILE", help="its private key")
    parser.add_argument(
        "--api-key-file", default="", metavar="FILE", help=f"holds the key to send (default: ${KEY_VARIABLE}, if set)"
    )


def connection_from(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Connection:
    """ConfigError where what the flags name cannot be used."""
    ca, cert, key = arguments.ca, arguments.cert, arguments.key
    if bool(cert) != bool(key):
        raise ConfigError("--cert and --key go together: name both files")
    api_key = _key_in(arguments.api_key_file) if arguments.api_key_file else environment.get(KEY_VARIABLE, "")
    if not all("!" <= each <= "~" for each in api_key):
        source = f"--api-key-file {arguments.api_key_file}" if arguments.api_key_file else KEY_VARIABLE
        raise ConfigError(f"{source}: a key has printable ASCII characters only, and no spaces")
    made = Connection(arguments.tls or bool(ca or cert), ca, cert, key, api_key)
    if made.tls:
        made.context()
    return made


def _key_in(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise ConfigError(f"--api-key-file {path}: cannot be read: {why}") from None
