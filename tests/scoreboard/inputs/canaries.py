"""X7: secrets and texts that must not come out again, and where they are looked for.

Each place of a request gets a word of its own, so that one that is found tells where it was put in.
"""

import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from ml_inference_server.door.rights import Right
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto.foreign import grpc_service_pb2 as triton
from tests.conftest import raw
from tests.integration.door_kit import KeysFile, keys_file
from tests.integration.otlp_receiver import otlp_receiver
from tests.integration.tls_kit import HOST, Authority, Installed, Pair
from tests.scoreboard.inputs.canary_requests import grpc_messages, http_bodies
from tests.scoreboard.inputs.case import LIMIT_S, OWN
from tests.scoreboard.inputs.grpc_triton import TRITON
from tests.scoreboard.inputs.servers import InputServer, input_server

GIVES_FIGURES = (
    *("/metrics", "/metrics/prometheus", "/info", "/healthz", "/readyz", "/api/v1/live", "/api/v1/history", "/"),
    *(
        "/docs",
        "/docs.js",
        "/app.js",
        "/openapi.json",
        "/v1/models",
        "/v2",
        "/v2/models/stats",
        "/v2/models/fake/config",
    ),
)
QUESTIONS = (
    *(f"{OWN}/GetMetrics", f"{OWN}/GetServerInfo", "tei.v1.Info/Info", "grpc.health.v1.Health/Check"),
    *(
        f"{TRITON}/{name}"
        for name in ("ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex")
    ),
)


@dataclass
class Canaries:
    """words: where each was put in. outputs: name and bytes of all that came out. echoes: answers that repeat a text
    because that is what was asked for."""

    words: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    outputs: list[tuple[str, bytes]] = field(default_factory=list)
    echoes: list[bytes] = field(default_factory=list)

    def word(self, place: str) -> str:
        made = f"canary{secrets.token_hex(8)}"
        self.words[made] = place
        return made

    def found(self) -> list[str]:
        """Sentences, one for each that came out and each output that it is in."""
        sought = self.words | self.secrets
        return [
            f"{place} came out of {name}"
            for name, output in self.outputs
            for canary, place in sought.items()
            if canary.encode() in output
        ]

    @property
    def searched_bytes(self) -> int:
        return sum(len(output) for _, output in self.outputs)


@dataclass
class _Caller:
    server: InputServer
    channel: grpc.aio.Channel
    session: aiohttp.ClientSession
    key: str
    canaries: Canaries

    async def grpc(
        self, name: str, path: str, message: bytes, *, metadata: Sequence[tuple[str, str]] = (), key: str = ""
    ) -> None:
        call = raw(self.channel).unary_unary(f"/{path}")(
            message, metadata=(("authorization", key or self.key), *metadata), timeout=LIMIT_S
        )
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            said = f"{error.code()} {error.details()}".encode()
            self.canaries.outputs.append((f"the refusal of {name}", said + _joined(error.trailing_metadata())))
        else:
            self.canaries.echoes.append(answer)
            headers = _joined(await call.initial_metadata()) + _joined(await call.trailing_metadata())
            self.canaries.outputs.append((f"the metadata of {name}", headers))

    async def http(
        self, name: str, path: str, body: bytes | None, *, headers: Mapping[str, str] | None = None, key: str = ""
    ) -> None:
        sent = {"Authorization": key or self.key, "Content-Type": "application/json"} | dict(headers or {})
        method = "GET" if body is None else "POST"
        async with self.session.request(method, path, data=body, headers=sent) as answer:
            content = await answer.read()
            self.canaries.outputs.append((f"the headers of {name}", str(answer.raw_headers).encode()))
            if answer.status < 400 and body is not None:
                self.canaries.echoes.append(content)
            else:
                self.canaries.outputs.append((f"the answer of {name}", content))


def _joined(metadata: Any) -> bytes:
    values = [value if isinstance(value, bytes) else value.encode() for _, value in metadata or ()]
    return b"\n".join(values)


async def _send_all(caller: _Caller) -> None:
    canaries, word = caller.canaries, caller.canaries.word
    for name, path, message in grpc_messages(word):
        await caller.grpc(name, path, message if isinstance(message, bytes) else message.SerializeToString())
    good = pb.EmbedRequest(texts=["a"]).SerializeToString()
    metadata = [
        (each, word(f"metadata {each}")) for each in ("x-secret", "traceparent", "x-expect-space-id", "user-agent")
    ]
    await caller.grpc("Embed with metadata", f"{OWN}/Embed", good, metadata=metadata)
    for name, path, body in http_bodies(word):
        await caller.http(name, path, body)
    headers = ("Cookie", "Referer", "X-Secret", "traceparent", "x-expect-space-id", "x-request-timeout-ms", "Accept")
    for header in (
        *headers,
        "Content-Type",
        "Content-Encoding",
        "Expect",
        "User-Agent",
        "Origin",
        "Proxy-Authorization",
    ):
        await caller.http(
            f"/embed with {header}", "/embed", b'{"inputs": "a"}', headers={header: word(f"header {header}")}
        )
    for path in (
        "/{}",
        "/v1/models/{}",
        "/v2/models/{}",
        "/v2/models/fake/versions/{}",
        "/metrics?a={}",
        "/embed?key={}",
    ):
        await caller.http(f"GET {path}", path.format(word(f"the path {path}")), None)
    for number in range(3):
        wrong = f"mlis_{word(f'wrong key {number}')}"
        await caller.http("a wrong key", "/v1/embeddings", b"{}", key=f"Bearer {wrong}")
        await caller.grpc("a wrong key", f"{OWN}/Embed", good, key=f"Bearer {wrong}")
    assert any(canary.encode() in echo for echo in canaries.echoes for canary in canaries.words), (
        "else nothing is found"
    )


async def _ask_for_figures(caller: _Caller) -> None:
    outputs = caller.canaries.outputs
    for path in GIVES_FIGURES:
        for accept in ("application/json", "text/plain", "application/openmetrics-text"):
            await caller.http(f"{path} as {accept}", path, None, headers={"Accept": accept})
    async with caller.session.get("/api/v1/stream", headers={"Authorization": caller.key}) as events:
        outputs.append(("the stream of figures", await events.content.readuntil(b"}\n\n")))
    for path in QUESTIONS:
        answer = await raw(caller.channel).unary_unary(f"/{path}")(
            triton.ModelConfigRequest(name="fake").SerializeToString() if "/Model" in path else b"",
            metadata=(("authorization", caller.key),),
            timeout=LIMIT_S,
        )
        outputs.append((path, answer))
    outputs += _command_line(caller.server.process.pid)


def _command_line(pid: int) -> list[tuple[str, bytes]]:
    """Where the system shows it."""
    path = Path(f"/proc/{pid}/cmdline")
    return [("the command line", path.read_bytes())] if path.exists() else []


def _secrets(keys: KeysFile, pairs: Sequence[Pair]) -> dict[str, str]:
    """What a file holds that must not be shown: of keys themselves and their hashes, of certificates their lines."""
    found = {token.removeprefix("mlis_"): f"the key {name}" for name, token in keys.tokens.items()}
    for line in keys.path.read_text().splitlines():
        if "sha256:" in line:
            found[line.rpartition("sha256:")[2].strip(" \"',}]")] = "the hash of a key"
    for pair in pairs:
        for path in (pair.cert, pair.key):
            lines = [line for line in path.read_text().splitlines() if not line.startswith("-----")]
            found |= {line: f"a line of {path.name}" for line in lines if len(line) > 40}
    return found


async def put_in_and_look(settings: Sequence[str], *flags: str) -> Canaries:
    """Of one server with keys, TLS, client certificates and traces, that logs all it can."""
    canaries = Canaries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority, clients, keys = Authority(folder, "servers"), Authority(folder, "clients"), keys_file(folder)
        keys.add("everything", Right)
        (folder / "live").mkdir()
        installed, pair, client = Installed(folder / "live", clients.file), authority.issue(), clients.issue("a-client")
        installed.put(pair)
        canaries.secrets = _secrets(keys, [pair, client])
        asked = [f"server.tls.{each}={path}" for each, path in installed.settings.items()]
        asked += [f"server.auth.keys_file={keys.path}", "server.enable_test_faults=true", "model.name=fake", *settings]
        async with otlp_receiver() as receiver:
            more = ["--log-level", "DEBUG", "--otlp-endpoint", receiver.endpoint, *flags]
            async with (
                input_server(folder / "server", asked, *more) as server,
                authority.channel(server.grpc_port, client) as channel,
                aiohttp.ClientSession(
                    f"https://{HOST}:{server.http_port}",
                    connector=aiohttp.TCPConnector(ssl=authority.context(client)),
                    timeout=aiohttp.ClientTimeout(total=LIMIT_S),
                    read_bufsize=1 << 20,
                ) as session,
            ):
                caller = _Caller(server, channel, session, keys.bearer("everything"), canaries)
                await _send_all(caller)
                await _ask_for_figures(caller)
                code = await server.end()
                canaries.outputs.append(("the log", server.log.read_bytes()))
            canaries.outputs.append(("the traces", receiver.raw))
    assert code == 0, f"the server ended with code {code}"
    _check_that_it_was_there(canaries)
    return canaries


def _check_that_it_was_there(canaries: Canaries) -> None:
    """AssertionError where what was searched is not what the server puts out."""
    outputs = dict(canaries.outputs)
    assert outputs["the log"].count(b"method") > 50, "no line for each request in the log"
    assert outputs["the traces"].count(b"request.id") > 50, "no span for each request"
    assert b"mlis_requests" in outputs["the answer of /metrics/prometheus as text/plain"]
    assert len(canaries.secrets) > 20
