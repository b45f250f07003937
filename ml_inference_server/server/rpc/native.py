"""The server's own wire (proto/inference.proto): message to plain arguments and back, one short method for each RPC."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message

from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.server.rpc.method_handlers import Call, Reply, Shell
from ml_inference_server.server.rpc.status import grpc_code
from ml_inference_server.server.service import Timing
from ml_inference_server.server.state import ServerState
from ml_inference_server.utils.errors import InvalidRequest, ServiceError, Unavailable

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
# Unanswered requests of one stream; beyond it the server stops reading, which the client feels as flow control.
MAX_STREAM_IN_FLIGHT = 64
# Bytes of an answer: a number of an embedding, a rank (its index below 65,536), and all that does not grow with it.
_FLOAT_BYTES, _RANK_BYTES, _REST_BYTES = 4, 11, 128


class NativeServicer:
    def __init__(self, state: ServerState, metrics: Metrics, shell: Shell) -> None:
        self._state = state
        self._metrics = metrics
        self._shell = shell

    def handlers(self) -> grpc.GenericRpcHandler:
        """Built by hand and not by the generated code, whose deserialiser answers UNKNOWN to a broken message."""
        shell = self._shell
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Embed": shell.unary("Embed", pb.EmbedRequest, self.embed),
                "EmbedStream": shell.stream(pb.EmbedStreamRequest, self.embed_stream),
                "Score": shell.unary("Score", pb.ScoreRequest, self.score),
                "Rerank": shell.unary("Rerank", pb.RerankRequest, self.rerank),
                "GetMetrics": shell.unary("GetMetrics", pb.GetMetricsRequest, self.get_metrics, counted=False),
                "GetServerInfo": shell.unary(
                    "GetServerInfo", pb.GetServerInfoRequest, self.get_server_info, counted=False
                ),
            },
        )

    async def embed(self, request: pb.EmbedRequest, call: Call) -> Reply:
        service, info = self._state.require_service(), self._state.info
        if info is not None:
            self._check_reply_size("texts", len(request.texts), len(request.texts), info.dimension * _FLOAT_BYTES)
        answer = await service.embed(
            request.texts,
            call.deadline,
            prompt_name=request.prompt_name if request.HasField("prompt_name") else None,
            truncate=_truncate(request),
        )
        count, dimension = answer.values.shape
        message = pb.EmbedResponse(
            embeddings=np.ascontiguousarray(answer.values, "<f4").tobytes(),
            count=count,
            dimension=dimension,
            timing=_timing(answer.timing),
            truncated=answer.truncated,
        )
        return Reply(message, texts=count, truncated=answer.truncated, timing=answer.timing)

    async def score(self, request: pb.ScoreRequest, call: Call) -> Reply:
        """A score is smaller than the pair that asks for it, so the answer always fits where the request did."""
        pairs = [(pair.query, pair.passage) for pair in request.pairs]
        answer = await self._state.require_service().score(pairs, call.deadline, truncate=_truncate(request))
        message = pb.ScoreResponse(scores=answer.values, timing=_timing(answer.timing), truncated=answer.truncated)
        return Reply(message, pairs=len(pairs), truncated=answer.truncated, timing=answer.timing)

    async def rerank(self, request: pb.RerankRequest, call: Call) -> Reply:
        service, count = self._state.require_service(), len(request.documents)
        self._check_reply_size("documents", count, min(count, request.top_k or count), _RANK_BYTES)
        ranking = await service.rerank(
            request.query, request.documents, request.top_k, call.deadline, truncate=_truncate(request)
        )
        message = pb.RerankResponse(
            ranks=[pb.Rank(index=index, score=score) for index, score in ranking.ranks],
            timing=_timing(ranking.timing),
            truncated=ranking.truncated,
        )
        return Reply(message, pairs=count, truncated=ranking.truncated, timing=ranking.timing)

    async def embed_stream(
        self, messages: AsyncIterator[pb.EmbedStreamRequest], write: Callable[[Message], Awaitable[None]], call: Call
    ) -> None:
        """Answers in the order of completion. When the server drains, what was read is answered, then it ends."""
        free = asyncio.Semaphore(MAX_STREAM_IN_FLIGHT)
        writing = asyncio.Lock()

        async def answer(message: pb.EmbedStreamRequest) -> None:
            try:
                reply, error = await self._shell.observe("EmbedStream", call, lambda: self.embed(message.request, call))
                outcome = pb.EmbedStreamResponse(id=message.id)
                if reply is not None:
                    outcome.response.CopyFrom(reply.message)  # type: ignore[arg-type]
                else:
                    outcome.error.CopyFrom(_stream_error(error or ServiceError("internal error")))
                async with writing:
                    await write(outcome)
            finally:
                free.release()

        draining = asyncio.create_task(self._state.draining.wait())
        try:
            async with asyncio.TaskGroup() as group:
                while (message := await _next_or_none(messages, draining)) is not None:
                    await free.acquire()
                    group.create_task(answer(message))
        except BaseExceptionGroup as errors:
            refused = errors.subgroup(ServiceError)
            if refused is None:
                raise
            raise refused.exceptions[0] from None
        finally:
            draining.cancel()
        if self._state.draining.is_set():
            raise Unavailable("the server is shutting down; open the stream to another one")

    def _check_reply_size(self, field: str, items: int, rows: int, row_bytes: int) -> None:
        """InvalidRequest where gRPC could not send the answer: before it is computed and not afterwards."""
        limits = self._state.settings.server
        most = (limits.max_message_bytes - _REST_BYTES) // row_bytes
        if rows <= most or items > limits.max_texts:  # too many items are refused for that
            return
        split = f"send at most {most} at once, or " if most else ""
        message = (
            f"the answer would have {rows * row_bytes} bytes, the limit is {limits.max_message_bytes}: "
            f"{split}raise server.max_message_bytes"
        )
        raise InvalidRequest(f"{field}: {message}", reason="REPLY_TOO_LARGE", violations=[(field, message)])

    async def get_metrics(self, request: pb.GetMetricsRequest, call: Call) -> Reply:
        figures = self._metrics.snapshot()
        latency = figures["latency_ms"]
        codes: dict[str, int] = {}
        for by_code in figures["totals"]["by_method_and_code"].values():
            for code, count in by_code.items():
                codes[code] = codes.get(code, 0) + count
        message = pb.GetMetricsResponse(
            window_s=figures["window_s"],
            uptime_s=figures["uptime_s"],
            requests_per_s=figures["requests_per_s"],
            texts_per_s=figures["texts_per_s"],
            pairs_per_s=figures["pairs_per_s"],
            latency_ms=pb.LatencyMs(**latency) if latency else None,
            mean_batch_size=figures["batch"]["mean_size"] or 0.0,
            padding_share=figures["batch"]["padding_share"] or 0.0,
            queue_texts=figures["queue"]["texts"],
            queue_tokens=figures["queue"]["tokens"],
            cpu_percent=figures["cpu_percent"],
            rss_bytes=figures["rss_bytes"],
            gpu_memory_bytes=(figures["gpu"] or {}).get("memory_bytes", 0),
            requests_total=figures["totals"]["requests"],
            errors_total=figures["totals"]["errors"],
            requests_by_code={code: count for code, count in codes.items() if count},
        )
        return Reply(message)

    async def get_server_info(self, request: pb.GetServerInfoRequest, call: Call) -> Reply:
        told = self._state.as_dict()
        limits = self._state.settings.server
        message = pb.GetServerInfoResponse(
            server_version=told["server_version"],
            experiment=told["experiment"],
            variant=told["variant"],
            requested=pb.Requested(**told["requested"]),
            resolved=pb.BackendInfo(**told["resolved"]) if told["resolved"] else None,
            fallbacks=told["fallbacks"],
            title=told["title"],
            settings_json=json.dumps(told["settings"]),
            max_texts=limits.max_texts,
            max_text_bytes=limits.max_text_bytes,
            max_message_bytes=limits.max_message_bytes,
            instance_id=told["instance_id"],
            pid=told["pid"],
            auto_choice=told["auto_choice"],
        )
        return Reply(message)


async def _next_or_none(messages: AsyncIterator[Any], draining: asyncio.Task[Any]) -> Any:
    """The next message; None at the end of the stream or when the server drains."""
    following = asyncio.ensure_future(anext(messages, None))
    try:
        await asyncio.wait({following, draining}, return_when=asyncio.FIRST_COMPLETED)
        return following.result() if following.done() else None
    finally:
        following.cancel()


def _truncate(request: Any) -> bool:
    return bool(request.truncate) if request.HasField("truncate") else True


def _timing(timing: Timing) -> pb.Timing:
    return pb.Timing(
        tokenize_us=_us(timing.tokenize_s),
        queue_us=_us(timing.queue_s),
        compute_us=_us(timing.compute_s),
        total_us=_us(timing.total_s),
    )


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


def _stream_error(error: ServiceError) -> pb.StreamError:
    return pb.StreamError(
        code=grpc_code(error).value[0],
        reason=error.reason,
        message=str(error),
        retry_after_ms=error.retry_after_ms or 0,
    )
