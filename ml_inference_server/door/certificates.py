"""The certificate of the server: read, tried out, and only then taken into use."""

import logging
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from ml_inference_server.door.watch import FileWatch
from ml_inference_server.utils.door_settings import TlsSettings
from ml_inference_server.utils.errors import ConfigError

log = logging.getLogger(__name__)

_SOON_S = 14 * 86_400
# OpenSSL's numbers for why a certificate is refused.
_NOT_YET_VALID, _EXPIRED = 9, 10


@dataclass(frozen=True)
class Certificates:
    """What a port needs to speak TLS, in both forms that ports take it: PEM for gRPC, a context for HTTP.

    client_ca: authorities of the clients' certificates; None: clients show none. ends_at: seconds since 1970.
    """

    cert: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext
    ends_at: float


class TlsFiles:
    """The files of `server.tls`, and what was last found good in them."""

    def __init__(self, settings: TlsSettings) -> None:
        """ConfigError where they cannot be used."""
        self._settings = settings
        paths = [settings.cert, settings.key, settings.client_ca]
        self.watch = FileWatch([Path(path) for path in paths if path], self._reload)
        self.current = _read(settings)
        self._say_if_soon()

    @property
    def asks_clients(self) -> bool:
        """Whether clients must show a certificate."""
        return bool(self._settings.client_ca)

    def _reload(self) -> str:
        self.current = _read(self._settings)
        self._say_if_soon()
        return f"certificate read anew: {self.describe()}"

    def describe(self) -> str:
        day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(self.current.ends_at))
        clients = ", clients must show one" if self.asks_clients else ""
        return f"{self._settings.cert}, valid until {day} UTC{clients}"

    def _say_if_soon(self) -> None:
        left_s = self.current.ends_at - time.time()
        if left_s < _SOON_S:
            log.warning("server.tls.cert %s ends in %.0f hours", self._settings.cert, left_s / 3600)


def open_tls(settings: TlsSettings) -> TlsFiles | None:
    """None where the ports speak in the clear. ConfigError."""
    return TlsFiles(settings) if settings.cert else None


def _read(settings: TlsSettings) -> Certificates:
    before = _contents(settings)
    context = _context(settings)
    ends_at = _try_out(settings)
    # gRPC takes bytes, and Python's ssl takes paths: both must have got the same.
    if _contents(settings) != before:
        raise ConfigError(f"server.tls.cert {settings.cert}: the files changed while they were read")
    cert, key, client_ca = before
    return Certificates(cert, key, client_ca, context, ends_at)


def _contents(settings: TlsSettings) -> tuple[bytes, bytes, bytes | None]:
    cert, key = _content("cert", settings.cert), _content("key", settings.key)
    return cert, key, _content("client_ca", settings.client_ca) if settings.client_ca else None


def _content(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"server.tls.{name} {path}: cannot be read: {error.strerror}") from None


def _context(settings: TlsSettings) -> ssl.SSLContext:
    context = _with_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), settings)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if settings.client_ca:
        try:
            context.load_verify_locations(settings.client_ca)
        except (ssl.SSLError, ValueError):
            raise ConfigError(f"server.tls.client_ca {settings.client_ca}: holds no certificate in PEM form") from None
        ends = [ssl.cert_time_to_seconds(str(each["notAfter"])) for each in context.get_ca_certs()]
        if not any(end > time.time() for end in ends):
            state = "every authority in it has expired" if ends else "holds no certificate of an authority"
            raise ConfigError(f"server.tls.client_ca {settings.client_ca}: {state}")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _with_pair(context: ssl.SSLContext, settings: TlsSettings) -> ssl.SSLContext:
    """The context, with the certificate and its key."""

    def passphrase() -> str:
        raise ConfigError(f"server.tls.key {settings.key}: is locked with a passphrase: store it without one")

    try:
        context.load_cert_chain(settings.cert, settings.key, passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"server.tls.key {settings.key} is not the key of {settings.cert}") from None
        raise ConfigError(
            f"server.tls.cert {settings.cert} or server.tls.key {settings.key}: no certificate and private key in PEM "
            f"form ({error.reason or 'not readable'})"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"server.tls.cert {settings.cert}: cannot be used: {error}") from None
    return context


def _try_out(settings: TlsSettings) -> float:
    """Shake hands with a client that trusts this very certificate, in memory; when the certificate ends.

    That it is expired, not valid yet, or not made for a server, shows here as it would to a client.
    """
    server_context = _with_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), settings)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client_context.load_verify_locations(settings.cert)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    try:
        while not all([_step(client), _step(server)]):
            pass
    except ssl.SSLCertVerificationError as error:
        why = {_EXPIRED: "has expired", _NOT_YET_VALID: "is not valid yet: see the clock of this machine"}
        wrong = why.get(error.verify_code, f"would be refused by clients: {error.verify_message}")
        raise ConfigError(f"server.tls.cert {settings.cert}: {wrong}") from None
    except ssl.SSLError as error:
        raise ConfigError(f"server.tls.cert {settings.cert}: cannot be used: {error.reason}") from None
    shown = client.getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))


def _step(side: ssl.SSLObject) -> bool:
    """Whether its part is done."""
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
