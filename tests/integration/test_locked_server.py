"""A server process with TLS, client certificates and keys: our commands and clients get in, and no key comes out."""

import asyncio
import http.client
import json
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ml_inference_server import AsyncClient, Client, cli
from ml_inference_server.api import NotAllowedError, UnavailableError, tls_credentials
from ml_inference_server.door.rights import Right
from ml_inference_server.utils.connection import KEY_VARIABLE
from tests.integration.benchmark_kit import ENVIRONMENT, write_pairs
from tests.integration.door_kit import KeysFile, keys_file
from tests.integration.server_process import ROOT, ServerProcess, server_process
from tests.integration.tls_kit import HOST, Authority, Installed, Pair

pytestmark = pytest.mark.slow

READ = (
    *("/metrics", "/metrics/prometheus", "/info", "/v1/models", "/v1/models/x", "/api/v1/live", "/api/v1/history"),
    *("/", "/docs", "/openapi.json", "/none", "/v2"),
)
WORK = ("/v1/embeddings", "/embed", "/v2/rerank", "/v2/models/x/infer", "/api/v1/benchmark")


@dataclass
class Locked:
    server: ServerProcess
    keys: KeysFile
    authority: Authority
    client: Pair
    ports: dict[str, int]

    @property
    def target(self) -> str:
        return f"{HOST}:{self.ports['grpc_port']}"

    @property
    def files(self) -> list[str]:
        return [
            *("--ca", str(self.authority.file)),
            *("--cert", str(self.client.cert), "--key", str(self.client.key)),
        ]

    def get(self, path: str, token: str | None, *, body: bytes | None = None) -> bytes:
        """Everything that comes back, headers included."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        request = urllib.request.Request(f"https://{HOST}:{self.ports['http_port']}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, context=self.authority.context(self.client), timeout=20) as answer:  # noqa: S310 - https
                return str(answer.headers).encode() + answer.read()  # type: ignore[no-any-return]
        except urllib.error.HTTPError as error:
            return str(error.headers).encode() + error.read()


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Locked]:
    authority, clients, keys = Authority(tmp_path), Authority(tmp_path, "clients"), keys_file(tmp_path)
    keys.add("everything", Right)
    pair = authority.issue()
    settings = {
        "server.tls.cert": pair.cert,
        "server.tls.key": pair.key,
        "server.tls.client_ca": clients.file,
        "server.auth.keys_file": keys.path,
    }
    flags = [flag for name, value in settings.items() for flag in ("--set", f"{name}={value}")]
    with server_process(tmp_path, *flags, "--log-level", "DEBUG") as server:
        yield Locked(server, keys, authority, clients.issue("a-client"), server.ready())


def key_in_file(locked: Locked, name: str, folder: Path) -> list[str]:
    path = folder / f"{name}.token"
    path.write_text(locked.keys.tokens[name] + "\n")
    return ["--api-key-file", str(path)]


def test_the_commands_get_in(
    locked: Locked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--target", locked.target, *locked.files]
    monkeypatch.setenv(KEY_VARIABLE, locked.keys.tokens["infer"])
    assert cli.main(["embed", "a text", *where]) == 0
    assert len(json.loads(capsys.readouterr().out)) > 1
    assert cli.main(["rerank", "a query", "a document", *where]) == 0
    assert cli.main(["info", *where]) == 0
    monkeypatch.delenv(KEY_VARIABLE)
    assert cli.main(["health", *where]) == 0  # which takes no key
    assert cli.main(["health", "--target", locked.target, "--tls", "--timeout-s", "3"]) == 5
    capsys.readouterr()
    assert cli.main(["embed", "a text", *where, *key_in_file(locked, "metrics", tmp_path)]) == 5
    assert "this key has no right to this: it takes one with the right infer" in capsys.readouterr().err
    assert cli.main(["embed", "a text", *where]) == 5
    assert "UNAUTHENTICATED: a valid key is needed" in capsys.readouterr().err
    assert cli.main(["embed", "a text", "--target", locked.target, "--tls", "--timeout-s", "3"]) == 5
    assert "by TLS" in capsys.readouterr().err
    assert cli.main(["embed", "a text", "--target", locked.target, "--timeout-s", "3"]) == 5
    assert "--tls if it speaks that" in capsys.readouterr().err


def test_the_benchmark_gets_in(locked: Locked, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.tsv")
    command = [
        *(sys.executable, "-m", "ml_inference_server.client", *locked.files),
        *("--host", HOST, "--port", str(locked.ports["grpc_port"]), "--http-port", str(locked.ports["http_port"])),
        *("--dataset", str(pairs), "--requests", "40", "--warmup", "2", "--concurrency", "4"),
        *("--output", str(tmp_path / "out.md"), "--json", str(tmp_path / "out.json")),
    ]
    environment = ENVIRONMENT | {KEY_VARIABLE: locked.keys.tokens["everything"]}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out.json").read_text())
    row = document["runs"][0]
    assert row["status"] == "valid", row
    # Of the sidecar's counters, which take a key as well.
    assert row["batches"] is not None, row
    assert locked.keys.tokens["everything"] not in (tmp_path / "out.json").read_text() + done.stdout + done.stderr


async def test_the_clients_get_in(locked: Locked) -> None:
    credentials = tls_credentials(locked.authority.file, locked.client.cert, locked.client.key)
    token = locked.keys.tokens["infer"]

    def ask() -> None:
        with Client(locked.target, credentials=credentials, api_key=token) as client:
            assert client.embed(["a"]).shape[0] == 1
            assert [answer.key for answer in client.stream(["a", "b"])]
            assert client.embed([]).shape[0] == 0
        with Client(locked.target, credentials=credentials) as client, pytest.raises(NotAllowedError):
            client.embed(["a"])
        nothing_to_show = tls_credentials(locked.authority.file)
        with (
            Client(locked.target, credentials=nothing_to_show, api_key=token, timeout_s=3) as client,
            pytest.raises(UnavailableError),
        ):
            client.embed(["a"])

    await asyncio.to_thread(ask)
    async with AsyncClient(locked.target, credentials=credentials, api_key=token) as client:
        assert (await client.embed(["a"])).shape[0] == 1
    async with AsyncClient(locked.target, credentials=credentials, api_key=token + "x") as client:
        with pytest.raises(NotAllowedError):
            await client.embed(["a"])


def test_no_key_comes_out(locked: Locked, tmp_path: Path) -> None:
    """Used over both protocols, rightly and wrongly, by the commands and by hand; then everything is searched."""
    tokens = list(locked.keys.tokens.values())
    wrong = "mlis_" + "CANARY" * 7
    environment = ENVIRONMENT | {KEY_VARIABLE: tokens[0]}
    seen: list[bytes] = []
    for command in (["info"], ["embed", "a"]):
        for variable in (*tokens, wrong):
            done = subprocess.run(
                [sys.executable, "-m", "ml_inference_server", *command, "--target", locked.target, *locked.files],
                env=environment | {KEY_VARIABLE: variable},
                cwd=ROOT,
                capture_output=True,
                timeout=60,
                check=False,
            )
            seen += [done.stdout, done.stderr]
    for token in (*tokens, wrong, None):
        for path in (
            "/metrics",
            "/metrics/prometheus",
            "/info",
            "/v1/models",
            "/v1/models/x",
            "/api/v1/live",
            "/",
            "/docs",
            "/none",
        ):
            seen.append(locked.get(path, token))
        for path in ("/v1/embeddings", "/embed", "/v2/rerank", "/v2/models/x/infer"):
            for body in (
                b'{"input": "a", "inputs": "a"}',
                b"{",
                json.dumps({"input": token, "inputs": 1}).encode()[:9],
            ):
                seen.append(locked.get(path, token, body=body))
    hashes = [line.split()[-1].split(":")[1] for line in locked.keys.path.read_text().splitlines() if "sha256" in line]
    assert len(hashes) == len(tokens)
    pid = locked.server.process.pid
    command_line = Path(f"/proc/{pid}/cmdline")
    if command_line.exists():
        seen.append(command_line.read_bytes())
    locked.server.signal(signal.SIGTERM)
    _, log = locked.server.end()
    assert "request" in log
    everything = b"\n".join(seen) + log.encode()
    assert b"mlis_requests" in everything
    for secret in (*tokens, wrong):
        assert secret.encode() not in everything
        assert secret[5:].encode() not in everything
    assert not [each for each in hashes if each.encode() in everything]


def test_a_start_that_is_open_to_the_network_says_so_in_one_line(tmp_path: Path) -> None:
    with server_process(tmp_path, "--host", "0.0.0.0") as server:
        server.ready()
        server.signal(signal.SIGTERM)
        _, log = server.end()
    warnings = [line for line in log.splitlines() if " WARNING " in line]
    assert len(warnings) == 1, log
    assert "open to the network: gRPC on 0.0.0.0 and HTTP on 0.0.0.0; whoever reaches that can use it" in warnings[0]


def test_a_certificate_changes_under_open_connections_of_a_process(tmp_path: Path) -> None:
    """On the event loop that servers run on."""
    before, after = Authority(tmp_path, "before"), Authority(tmp_path, "after")
    (tmp_path / "live").mkdir()
    installed = Installed(tmp_path / "live")
    installed.put(before.issue())
    flags = [flag for name, path in installed.settings.items() for flag in ("--set", f"server.tls.{name}={path}")]
    with server_process(tmp_path, *flags) as server:
        port = server.ready()["http_port"]
        old = http.client.HTTPSConnection(HOST, port, context=before.context(), timeout=20)
        assert _status(old) == 200
        installed.put(after.issue())
        while True:  # the server looks once a second
            try:
                new = http.client.HTTPSConnection(HOST, port, context=after.context(), timeout=20)
                assert _status(new) == 200
                break
            except ssl.SSLCertVerificationError:
                new.close()
        assert _status(old) == 200
        assert _status(new) == 200
        old.close()
        new.close()


def _status(connection: http.client.HTTPConnection) -> int:
    connection.request("GET", "/readyz")
    answer = connection.getresponse()
    answer.read()
    return answer.status
