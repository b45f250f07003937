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
from ml_inference_server.server.call import Call
from ml_inference_server.server.rpc.method_handlers import MethodHandlers
from ml_inference_server.server.rpc.observation import Reply
from ml_inference_server.server.rpc.status import grpc_code
from ml_inference_server.server.state import ServerState
from ml_inference_server.utils.errors import InvalidRequest, ServiceError, Unavailable
from ml_inference_server.utils.stages import Stamps, wire_us

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
# Unanswered requests of one stream; beyond it the server stops reading, which the client feels as flow control.
MAX_STREAM_IN_FLIGHT = 64
# Bytes of an answer: a number of an embedding, a rank (its index below 65,536), and all that does not grow with it.
_FLOAT_BYTES, _RANK_BYTES, _REST_BYTES = 4, 11, 128


class NativeServicer:
    def __init__(self, state: ServerState, metrics: Metrics, handlers: MethodHandlers) -> None:
        self._state = state
        self._metrics = metrics
        self._handlers = handlers

    def handlers(self) -> grpc.GenericRpcHandler:
        """Built by hand and not by the generated code, whose deserialiser answers UNKNOWN to a broken message."""
        make = self._handlers
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Embed": make.work("Embed", pb.EmbedRequest, self.embed),
                "EmbedStream": make.stream(pb.EmbedStreamRequest, self.embed_stream),
                "Score": make.work("Score", pb.ScoreRequest, self.score),
                "Rerank": make.work("Rerank", pb.RerankRequest, self.rerank),
                "GetMetrics": make.question("GetMetrics", pb.GetMetricsRequest, self.get_metrics),
                "GetServerInfo": make.question("GetServerInfo", pb.GetServerInfoRequest, self.get_server_info),
            },
        )

    async def embed(self, request: pb.EmbedRequest, call: Call) -> Reply[pb.EmbedResponse]:
        model, count = self._state.require_model(), len(request.texts)
        self._check_reply_size("texts", count, count, model.info.dimension * _FLOAT_BYTES)
        answer = await model.service.embed(
            request.texts,
            call,
            prompt_name=request.prompt_name if request.HasField("prompt_name") else None,
            truncate=_truncate(request),
        )
        count, dimension = answer.values.shape
        message = pb.EmbedResponse(
            embeddings=np.ascontiguousarray(answer.values, "<f4").tobytes(),
            count=count,
            dimension=dimension,
            timing=_timing(answer.stamps),
            truncated=answer.truncated,
        )
        return Reply(message, texts=count, truncated=answer.truncated, stamps=answer.stamps)

    async def score(self, request: pb.ScoreRequest, call: Call) -> Reply[pb.ScoreResponse]:
        """A score is smaller than the pair that asks for it, so the answer always fits where the request did."""
        pairs = [(pair.query, pair.passage) for pair in request.pairs]
        answer = await self._state.require_model().service.score(pairs, call, truncate=_truncate(request))
        message = pb.ScoreResponse(scores=answer.values, timing=_timing(answer.stamps), truncated=answer.truncated)
        return Reply(message, pairs=len(pairs), truncated=answer.truncated, stamps=answer.stamps)

    async def rerank(self, request: pb.RerankRequest, call: Call) -> Reply[pb.RerankResponse]:
        service, count = self._state.require_model().service, len(request.documents)
        self._check_reply_size("documents", count, min(count, request.top_k or count), _RANK_BYTES)
        ranking = await service.rerank(
            request.query, request.documents, request.top_k, call, truncate=_truncate(request)
        )
        message = pb.RerankResponse(
            ranks=[pb.Rank(index=index, score=score) for index, score in ranking.ranks],
            timing=_timing(ranking.stamps),
            truncated=ranking.truncated,
        )
        return Reply(message, pairs=count, truncated=ranking.truncated, stamps=ranking.stamps)

    async def embed_stream(
        self, messages: AsyncIterator[pb.EmbedStreamRequest], write: Callable[[Message], Awaitable[None]], call: Call
    ) -> None:
        """Answers in the order of completion. When the server drains, what was read is answered, then it ends."""
        free = asyncio.Semaphore(MAX_STREAM_IN_FLIGHT)
        writing = asyncio.Lock()

        async def answer(message: pb.EmbedStreamRequest) -> None:
            outcome = pb.EmbedStreamResponse(id=message.id)
            try:
                with self._handlers.observe("EmbedStream", self._handlers.of_message(call)) as request:
                    reply = await self.embed(message.request, request.call)
                    outcome.response.CopyFrom(reply.message)
                    request.reply = reply
            except ServiceError as error:
                outcome.error.CopyFrom(_stream_error(error))
            async with writing:
                await write(outcome)

        async def answer_and_make_room(message: pb.EmbedStreamRequest) -> None:
            try:
                await answer(message)
            finally:
                free.release()

        draining = asyncio.create_task(self._state.draining.wait())
        try:
            async with asyncio.TaskGroup() as group:
                while (message := await _next_or_none(messages, draining)) is not None:
                    await free.acquire()
                    group.create_task(answer_and_make_room(message))
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

    def get_metrics(self, request: pb.GetMetricsRequest) -> pb.GetMetricsResponse:
        figures = self._metrics.snapshot()
        latency = figures["latency_ms"]
        codes: dict[str, int] = {}
        for by_code in figures["totals"]["by_method_and_code"].values():
            for code, count in by_code.items():
                codes[code] = codes.get(code, 0) + count
        return pb.GetMetricsResponse(
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

    def get_server_info(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
        info = self._state.as_dict()
        limits = self._state.settings.server
        return pb.GetServerInfoResponse(
            server_version=info["server_version"],
            experiment=info["experiment"],
            variant=info["variant"],
            requested=pb.Requested(**info["requested"]),
            resolved=pb.BackendInfo(**info["resolved"]) if info["resolved"] else None,
            fallbacks=info["fallbacks"],
            title=info["title"],
            settings_json=json.dumps(info["settings"]),
            max_texts=limits.max_texts,
            max_text_bytes=limits.max_text_bytes,
            max_message_bytes=limits.max_message_bytes,
            instance_id=info["instance_id"],
            pid=info["pid"],
            auto_choice=info["auto_choice"],
        )


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


def _timing(stamps: Stamps) -> pb.Timing:
    return pb.Timing(**wire_us(stamps))


def _stream_error(error: ServiceError) -> pb.StreamError:
    return pb.StreamError(
        code=grpc_code(error).value[0],
        reason=error.reason,
        message=str(error),
        retry_after_ms=error.retry_after_ms or 0,
    )
