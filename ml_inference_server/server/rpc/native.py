"""The server's own wire (proto/inference.proto): message to plain arguments and back, one short method for each RPC."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from ml_inference_server.metrics.view import View
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.server.call import Call
from ml_inference_server.server.encodings import Encoding, bytes_per_vector, encode_rows
from ml_inference_server.server.observation import Reply
from ml_inference_server.server.options import EmbedOptions, Overflow, Priority, RerankOptions, ScoreOptions
from ml_inference_server.server.rpc.method_handlers import MethodHandlers
from ml_inference_server.server.rpc.status import grpc_code
from ml_inference_server.server.rpc.streams import MAX_STREAM_IN_FLIGHT, next_or_none
from ml_inference_server.server.service import Answered
from ml_inference_server.server.state import ServerState
from ml_inference_server.utils.errors import InvalidRequest, ServiceError, Unavailable
from ml_inference_server.utils.stages import wire_us

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
# Bytes of an answer: a rank (its index below 65,536), what is told of the length of a text, and all that does not grow
# with it.
_RANK_BYTES, _LENGTHS_BYTES, _REST_BYTES = 11, 9, 1024


_OVERFLOWS: dict[int, Overflow] = {
    pb.OVERFLOW_UNSPECIFIED: Overflow.CUT,
    pb.OVERFLOW_CUT: Overflow.CUT,
    pb.OVERFLOW_CUT_LEFT: Overflow.CUT_LEFT,
    pb.OVERFLOW_REFUSE: Overflow.REFUSE,
    pb.OVERFLOW_CHUNK: Overflow.CHUNK,
}
_PRIORITIES: dict[int, Priority | None] = {
    pb.PRIORITY_UNSPECIFIED: None,
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    pb.PRIORITY_BULK: Priority.BULK,
}
_ENCODING_NUMBERS: dict[Encoding, pb.Encoding] = {
    Encoding.FLOAT32: pb.ENCODING_FLOAT32,
    Encoding.FLOAT16: pb.ENCODING_FLOAT16,
    Encoding.INT8: pb.ENCODING_INT8,
    Encoding.BINARY: pb.ENCODING_BINARY,
    Encoding.UBINARY: pb.ENCODING_UBINARY,
}
_ENCODINGS: dict[int, Encoding] = {
    pb.ENCODING_UNSPECIFIED: Encoding.FLOAT32,
    **{number: encoding for encoding, number in _ENCODING_NUMBERS.items()},
}


class NativeServicer:
    def __init__(self, state: ServerState, view: View, handlers: MethodHandlers) -> None:
        self._state = state
        self._view = view
        self._handlers = handlers

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """Built by hand and not by the generated code, whose deserialiser answers UNKNOWN to a broken message."""
        make = self._handlers
        methods = {
            "Embed": make.work("Embed", pb.EmbedRequest, self.embed),
            "EmbedStream": make.stream(pb.EmbedStreamRequest, self.embed_stream),
            "Score": make.work("Score", pb.ScoreRequest, self.score),
            "Rerank": make.work("Rerank", pb.RerankRequest, self.rerank),
            "GetMetrics": make.question("GetMetrics", pb.GetMetricsRequest, self.get_metrics),
            "GetServerInfo": make.question("GetServerInfo", pb.GetServerInfoRequest, self.get_server_info),
        }
        return [grpc.method_handlers_generic_handler(SERVICE, methods)]

    def services(self) -> dict[str, bool]:
        return {SERVICE: True}

    async def embed(self, request: pb.EmbedRequest, call: Call) -> Reply[pb.EmbedResponse]:
        model, count = self._state.require_model(), len(request.texts)
        encoding = encoding_of(request)
        dimensions = request.dimensions if request.HasField("dimensions") else None
        own = model.info.dimension
        self._check_reply_size("texts", count, bytes_per_vector(min(dimensions or own, own), encoding))
        answer = await model.service.embed(
            request.texts,
            call,
            EmbedOptions(
                prompt_name=request.prompt_name if request.HasField("prompt_name") else None,
                role=request.input_type,
                overflow=overflow_of(request),
                dimensions=dimensions,
                expect_space_id=request.expect_space_id,
                model=request.model,
                priority=_priority(request),
            ),
        )
        count, dimension = answer.values.shape
        encoded = encode_rows(answer.values, encoding)
        message = pb.EmbedResponse(
            embeddings=encoded.tobytes(),
            count=count,
            dimension=dimension,
            space_id=answer.space_id,
            prompt_name=answer.prompt_name,
            encoding=_ENCODING_NUMBERS[encoding],
            scales=encoded.scales,
            **_told(answer),
        )
        return Reply(message, texts=count, truncated=answer.truncated, stamps=answer.stamps)

    async def score(self, request: pb.ScoreRequest, call: Call) -> Reply[pb.ScoreResponse]:
        """A score is smaller than the pair that asks for it, so the answer always fits where the request did."""
        service = self._state.require_model().service
        service.check_count("pairs", len(request.pairs))
        pairs = [(pair.query, pair.passage) for pair in request.pairs]
        options = ScoreOptions(overflow=overflow_of(request), model=request.model, priority=_priority(request))
        answer = await service.score(pairs, call, options)
        message = pb.ScoreResponse(scores=answer.values, **_told(answer))
        return Reply(message, pairs=len(pairs), truncated=answer.truncated, stamps=answer.stamps)

    async def rerank(self, request: pb.RerankRequest, call: Call) -> Reply[pb.RerankResponse]:
        service, count = self._state.require_model().service, len(request.documents)
        self._check_reply_size("documents", count, _RANK_BYTES, request.top_k)
        options = RerankOptions(
            overflow=overflow_of(request),
            model=request.model,
            max_document_tokens=request.max_document_tokens or None,
            priority=_priority(request),
        )
        ranking = await service.rerank(request.query, request.documents, request.top_k, call, options)
        ranks = [pb.Rank(index=index, score=score) for index, score in ranking.ranks]
        message = pb.RerankResponse(ranks=ranks, **_told(ranking))
        return Reply(message, pairs=count, truncated=ranking.truncated, stamps=ranking.stamps)

    async def embed_stream(
        self, messages: AsyncIterator[pb.EmbedStreamRequest], write: Callable[[Message], Awaitable[None]], call: Call
    ) -> None:
        """Answers in the order of completion. When the server drains, what was read is answered, then it ends.

        So it is with a message that is none. Answers that are cancelled while they are written leave gRPC with a stream
        that has no end.
        """
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
        malformed: InvalidRequest | None = None
        try:
            async with asyncio.TaskGroup() as group:
                try:
                    while (message := await next_or_none(messages, draining)) is not None:
                        await free.acquire()
                        group.create_task(answer_and_make_room(message))
                except InvalidRequest as error:
                    malformed = error  # ends the stream once what came before it is answered
        finally:
            draining.cancel()
        if malformed is not None:
            raise malformed
        if self._state.draining.is_set():
            raise Unavailable("the server is shutting down; open the stream to another one")

    def _check_reply_size(self, field: str, items: int, row_bytes: int, most_rows: int = 0) -> None:
        """InvalidRequest where gRPC could not send the answer: before it is computed and not afterwards.

        most_rows: how many rows it has at most; 0: one for each item.
        """
        limits = self._state.settings.server
        needed = items * _LENGTHS_BYTES + min(items, most_rows or items) * row_bytes + _REST_BYTES
        if needed <= limits.max_message_bytes or items > limits.max_texts:  # too many items are refused for that
            return
        most = (limits.max_message_bytes - _REST_BYTES) // (row_bytes + _LENGTHS_BYTES)
        split = f"send at most {most} at once, or " if most > 0 else ""
        message = (
            f"the answer could have {needed} bytes, the limit is {limits.max_message_bytes}: "
            f"{split}raise server.max_message_bytes"
        )
        raise InvalidRequest(f"{field}: {message}", reason="REPLY_TOO_LARGE", violations=[(field, message)])

    async def get_metrics(self, request: pb.GetMetricsRequest) -> pb.GetMetricsResponse:
        figures = await self._view.figures()
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

    async def get_server_info(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
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
            space_ids=info["space_ids"],
            models=info["models"],
            workers=[pb.Worker(**worker) for worker in await self._view.workers()],
        )


def overflow_of(request: Any) -> Overflow:
    """InvalidRequest for a number that is none, and for two answers to one question."""
    overflow = _OVERFLOWS.get(request.overflow)
    if overflow is None:
        message = f"expected 0 to {max(_OVERFLOWS)}"
        raise InvalidRequest(f"overflow: {message}", violations=[("overflow", message)])
    if not request.HasField("truncate"):
        return overflow
    if request.overflow and request.truncate == (overflow is Overflow.REFUSE):
        message = "says another thing than overflow: send one of them"
        raise InvalidRequest(f"truncate: {message}", violations=[("truncate", message)])
    return overflow if request.truncate else Overflow.REFUSE


def _priority(request: Any) -> Priority | None:
    if request.priority not in _PRIORITIES:
        message = f"expected 0 to {max(_PRIORITIES)}"
        raise InvalidRequest(f"priority: {message}", violations=[("priority", message)])
    return _PRIORITIES[request.priority]


def encoding_of(request: pb.EmbedRequest) -> Encoding:
    """InvalidRequest for a number that is none."""
    encoding = _ENCODINGS.get(request.encoding)
    if encoding is None:
        message = f"expected 0 to {max(_ENCODINGS)}"
        raise InvalidRequest(f"encoding: {message}", violations=[("encoding", message)])
    return encoding


def _told(answer: Answered) -> dict[str, Any]:
    """The fields that every answer has."""
    lengths = answer.lengths
    return {
        "timing": pb.Timing(**wire_us(answer.stamps), shared_texts=answer.shared, cached_texts=answer.cached),
        "truncated": lengths.truncated,
        "token_counts": lengths.total,
        "truncated_rows": lengths.truncated_rows,
        "used_token_counts": lengths.used,
        "warnings": answer.warnings,
    }


def _stream_error(error: ServiceError) -> pb.StreamError:
    return pb.StreamError(
        code=grpc_code(error).value[0],
        reason=error.reason,
        message=str(error),
        retry_after_ms=error.retry_after_ms or 0,
    )
