"""Certificates for tests, and clients that use them."""

import datetime
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import trustme

from ml_inference_server.utils.door_settings import TlsSettings

HOST = "localhost"


@dataclass
class Pair:
    """Files of a certificate and its key."""

    cert: Path
    key: Path

    def read(self) -> tuple[bytes, bytes]:
        return self.cert.read_bytes(), self.key.read_bytes()


class Authority:
    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = name
        self._ca = trustme.CA()
        self._count = 0
        self.file = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    @property
    def pem(self) -> bytes:
        return self._ca.cert_pem.bytes()

    def issue(self, host: str = HOST, **options: Any) -> Pair:
        """options: of trustme's issue_cert."""
        made = self._ca.issue_cert(host, "127.0.0.1", **options)
        self._count += 1
        stem = self._folder / f"{self._name}{self._count}"
        cert, key = stem.with_suffix(".crt"), stem.with_suffix(".key")
        cert.write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
        key.write_bytes(made.private_key_pem.bytes())
        return Pair(cert, key)

    def expired(self) -> Pair:
        return self.issue(not_after=datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1))

    def context(self, client: Pair | None = None) -> ssl.SSLContext:
        """Of a client that trusts this authority."""
        context = ssl.create_default_context(cadata=self.pem.decode())
        if client is not None:
            context.load_cert_chain(client.cert, client.key)
        return context

    def channel(self, port: int, client: Pair | None = None, host: str = HOST) -> grpc.aio.Channel:
        cert, key = client.read() if client is not None else (None, None)
        credentials = grpc.ssl_channel_credentials(self.pem, key, cert)
        return grpc.aio.secure_channel(f"{host}:{port}", credentials, [("grpc.use_local_subchannel_pool", 1)])


@dataclass
class Installed:
    """The files that a server is told of; `put` has them replaced, each as a whole."""

    folder: Path
    client_ca: Path | None = None

    @property
    def settings(self) -> dict[str, str]:
        found = {"cert": str(self.folder / "server.crt"), "key": str(self.folder / "server.key")}
        return found | ({"client_ca": str(self.client_ca)} if self.client_ca else {})

    @property
    def checked(self) -> TlsSettings:
        return TlsSettings.model_validate(self.settings)

    def put(self, pair: Pair) -> None:
        for content, name in zip(pair.read(), ("server.crt", "server.key"), strict=True):
            new = self.folder / f"{name}.new"
            new.write_bytes(content)
            os.replace(new, self.folder / name)  # noqa: PTH105 - what is tested is the replacing
