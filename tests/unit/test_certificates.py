"""What is refused of certificates, keys and authorities, and that a broken change leaves the old ones in force."""

import datetime
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ml_inference_server.door.certificates import TlsFiles
from ml_inference_server.utils.door_settings import TlsSettings
from ml_inference_server.utils.errors import ConfigError
from tests.integration.tls_kit import Authority, Installed, Pair

PEM = serialization.Encoding.PEM


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def of_pair(pair: Pair, client_ca: Path | str = "") -> TlsSettings:
    return TlsSettings(cert=str(pair.cert), key=str(pair.key), client_ca=str(client_ca))


def refused(settings: TlsSettings) -> str:
    with pytest.raises(ConfigError) as caught:
        TlsFiles(settings)
    message = str(caught.value)
    assert "\n" not in message
    assert "-----" not in message
    return message


@pytest.mark.parametrize("kind", list(trustme.KeyType))
def test_a_sound_pair_is_taken_and_its_end_is_known(authority: Authority, kind: trustme.KeyType) -> None:
    end = datetime.datetime(2037, 5, 6, 7, 8, tzinfo=datetime.UTC)
    tls = TlsFiles(of_pair(authority.issue(not_after=end, key_type=kind)))
    assert tls.current.ends_at == end.timestamp()
    assert tls.describe().endswith("valid until 2037-05-06 07:08 UTC")
    assert not tls.asks_clients


def test_a_chain_and_authorities_of_clients_are_taken(authority: Authority) -> None:
    tls = TlsFiles(of_pair(authority.issue(), authority.file))
    assert tls.asks_clients
    assert tls.current.client_ca == authority.pem


def test_a_self_signed_certificate_is_taken(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .sign(key, hashes.SHA256())
    )
    pair = Pair(tmp_path / "own.crt", tmp_path / "own.key")
    pair.cert.write_bytes(made.public_bytes(PEM))
    pair.key.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    assert TlsFiles(of_pair(pair)).current.cert == pair.cert.read_bytes()


def test_a_pair_that_does_not_match_is_refused(authority: Authority) -> None:
    one, other = authority.issue(), authority.issue()
    message = refused(of_pair(Pair(one.cert, other.key)))
    assert message == f"server.tls.key {other.key} is not the key of {one.cert}"


def test_an_expired_certificate_and_one_of_the_future_are_refused(authority: Authority) -> None:
    assert refused(of_pair(authority.expired())).endswith("has expired")
    begin = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    assert "is not valid yet" in refused(of_pair(authority.issue(not_before=begin)))


def test_what_is_no_certificate_is_refused(authority: Authority, tmp_path: Path) -> None:
    good = authority.issue()
    junk = tmp_path / "junk"
    for content in (b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"\xff\x00"):
        junk.write_bytes(content)
        assert "no certificate and private key" in refused(of_pair(Pair(junk, good.key)))
        assert "no certificate and private key" in refused(of_pair(Pair(good.cert, junk)))
        assert "holds no certificate" in refused(of_pair(good, junk))
    assert "cannot be read: No such file" in refused(of_pair(Pair(good.cert, tmp_path / "none")))
    assert "cannot be read: Is a directory" in refused(of_pair(Pair(tmp_path, good.key)))
    assert "server.tls.client_ca" in refused(of_pair(good, tmp_path / "none"))


def test_a_key_with_a_passphrase_is_refused_and_asks_nobody(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue()
    locked = tmp_path / "locked.key"
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption))
    assert "locked with a passphrase" in refused(of_pair(Pair(pair.cert, locked)))


def test_a_certificate_of_a_client_is_no_authority(authority: Authority) -> None:
    pair = authority.issue()
    assert "holds no certificate of an authority" in refused(of_pair(pair, pair.cert))


async def test_a_change_is_read_and_a_broken_one_is_not(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "live").mkdir()
    installed = Installed(tmp_path / "live")
    installed.put(authority.issue())
    tls = TlsFiles(installed.checked)
    told: list[bytes] = []

    async def tell() -> None:
        told.append(tls.current.cert)

    tls.watch.after.append(tell)
    first, second = tls.current, authority.issue()
    installed.put(authority.expired())
    await tls.watch.look()
    await tls.watch.look()
    installed.put(Pair(second.cert, authority.issue().key))
    await tls.watch.look()
    assert tls.current is first
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2
    assert "has expired; what was read before stays in force" in errors[0]
    installed.put(second)
    await tls.watch.look()
    assert told == [second.cert.read_bytes()]


def test_an_end_that_is_near_is_said(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=30, minutes=10)
    TlsFiles(of_pair(authority.issue(not_after=end)))
    assert "ends in 30 hours" in caplog.text
