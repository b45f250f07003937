"""How the benchmark asks a server for answers: gRPC alone. Counters and progress go through `sidecar`, over HTTP."""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ml_inference_server.proto import inference_pb2, inference_pb2_grpc
from ml_inference_server.utils.connection import IN_THE_CLEAR, Connection
from ml_inference_server.utils.errors import EXIT_FAILED_RUN, StartError

# Longer than a busy event loop needs to answer a health check, shorter than anybody likes to wait for a dead server.
PROBE_TIMEOUT_S = 3.0
INFO_TIMEOUT_S = 5.0
_PROBE_PAUSE_S = 0.1

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # The replies' limit is the server's business; this is the largest that its settings allow.
    ("grpc.max_receive_message_length", 1 << 30),
    ("grpc.max_send_message_length", 1 << 30),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # else gRPC's own minute holds
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A silent second attempt would count as a success that the server did not give.
    ("grpc.enable_retries", 0),
    # A proxy from the environment would stand between the clock and the server.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

Item = str | tuple[str, str]


class ServerUnreachable(StartError):
    """No usable server answers at the address."""

    exit_code = EXIT_FAILED_RUN


class TimedReply(NamedTuple):
    """How one request ended; `code` is OK, a gRPC status name, INVALID_RESPONSE or CLIENT_ERROR."""

    code: str
    message: str


OK = TimedReply("OK", "")


class RequestFailed(Exception):
    """One request ended with a status that no AioRpcError carries."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Address(NamedTuple):
    """Where a server is, and how it is reached there."""

    host: str
    port: int
    connection: Connection = IN_THE_CLEAR


class Target:
    """One server. Not safe to share between event loops."""

    def __init__(self, host: str, port: int, connection: Connection = IN_THE_CLEAR) -> None:
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._is_tls = connection.tls
        self._metadata = tuple(connection.headers().items())
        if connection.tls:
            credentials = grpc.ssl_channel_credentials(*connection.pems())
            self._channel = grpc.aio.secure_channel(self.address, credentials, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> "Target":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def wait_until_serving(self, timeout_s: float) -> None:
        """Return when health says SERVING. ServerUnreachable after `timeout_s`, saying what was seen instead."""
        seen = ""
        try:
            watch = self._health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=timeout_s)
            async for update in watch:
                if update.status == health_pb2.HealthCheckResponse.SERVING:
                    watch.cancel()
                    return
                seen = health_pb2.HealthCheckResponse.ServingStatus.Name(update.status)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise ServerUnreachable(
                    f"{self.address} speaks gRPC but has no health service: not our server"
                ) from None
            if not seen:
                raise ServerUnreachable(
                    f"no server answers at {self.address}{' by TLS' if self._is_tls else ''} (waited {timeout_s:g} s):"
                    " start one with ./run_server.sh --experiment FILE, or name its address with --host and --port,"
                    " and how it is reached with --tls and --ca"
                ) from None
        raise ServerUnreachable(
            f"the server at {self.address} did not become ready within {timeout_s:g} s (health says {seen}):"
            " give it longer with --connect-timeout-s, or read its log"
        )

    async def server_info(self) -> dict[str, Any]:
        """GetServerInfo as a dict, with `settings` read from its JSON. ServerUnreachable if it cannot be had."""
        try:
            info = await self._stub.GetServerInfo(
                inference_pb2.GetServerInfoRequest(), timeout=INFO_TIMEOUT_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise ServerUnreachable(
                f"the server at {self.address} does not answer GetServerInfo: {error.code().name} {error.details()}"
            ) from None
        answer: dict[str, Any] = MessageToDict(
            info, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        for part, key in ((answer, "pid"), (answer.get("resolved", {}), "parameters")):
            if key in part:  # JSON's own mapping writes 64-bit integers as strings
                part[key] = int(part[key])
        answer["settings"] = json.loads(answer.pop("settings_json") or "{}")
        return answer

    async def is_alive(self) -> bool:
        """Whether anything answers within PROBE_TIMEOUT_S; an error that a server sent is an answer too."""
        request = health_pb2.HealthCheckRequest()
        give_up_s = time.monotonic() + PROBE_TIMEOUT_S
        while (left_s := give_up_s - time.monotonic()) > 0:
            try:
                # Waiting for a connection lets a server come back that only lost its connection.
                await self._health.Check(request, wait_for_ready=True, timeout=left_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:  # the probe itself was on the connection that broke
                    await asyncio.sleep(_PROBE_PAUSE_S)
                    continue
                return error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
            return True
        return False

    async def embed(self, texts: Sequence[str], timeout_s: float, *, priority: str = "", **options: Any) -> Any:
        """priority: told as x-priority, if any. options: further fields of the EmbedRequest."""
        request = inference_pb2.EmbedRequest(texts=texts, **options)
        metadata = (*self._metadata, ("x-priority", priority)) if priority else self._metadata
        return await self._stub.Embed(request, timeout=timeout_s, metadata=metadata)

    async def rerank(self, query: str, documents: Sequence[str], timeout_s: float) -> Any:
        request = inference_pb2.RerankRequest(query=query, documents=documents)
        return await self._stub.Rerank(request, timeout=timeout_s, metadata=self._metadata)

    def embed_stream(self) -> Any:
        """A new bidirectional call, without a deadline of its own."""
        return self._stub.EmbedStream(metadata=self._metadata)

    async def score(self, pairs: Sequence[tuple[str, str]], timeout_s: float) -> Any:
        request = inference_pb2.ScoreRequest(pairs=[inference_pb2.Pair(query=q, passage=p) for q, p in pairs])
        return await self._stub.Score(request, timeout=timeout_s, metadata=self._metadata)


def check_embeddings(response: Any, texts: int) -> TimedReply:
    """Whether an EmbedResponse holds `texts` finite rows; the values themselves are not judged here."""
    if response.count != texts:
        return TimedReply("INVALID_RESPONSE", f"{response.count} rows for {texts} texts")
    expected_bytes = texts * response.dimension * 4
    if response.dimension == 0 or len(response.embeddings) != expected_bytes:
        return TimedReply("INVALID_RESPONSE", f"{len(response.embeddings)} bytes where {expected_bytes} were expected")
    if not np.isfinite(np.frombuffer(response.embeddings, dtype="<f4")).all():
        return TimedReply("INVALID_RESPONSE", "an embedding is not finite")
    return OK


def check_scores(response: Any, pairs: int) -> TimedReply:
    """Whether a ScoreResponse holds `pairs` finite scores."""
    if len(response.scores) != pairs:
        return TimedReply("INVALID_RESPONSE", f"{len(response.scores)} scores for {pairs} pairs")
    if not np.isfinite(np.fromiter(response.scores, dtype=np.float32, count=pairs)).all():
        return TimedReply("INVALID_RESPONSE", "a score is not finite")
    return OK
