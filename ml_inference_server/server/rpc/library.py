"""Health and reflection as handlers, in which a broken message is answered as in our own RPCs.

Left to gRPC, it would be answered with UNKNOWN, and a traceback would go to the log.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from ml_inference_server.server.rpc.health_servicer import HealthServicer
from ml_inference_server.server.rpc.method_handlers import decoded, refuse
from ml_inference_server.utils.errors import InvalidRequest


def health_handlers(servicer: HealthServicer) -> grpc.GenericRpcHandler:
    check = _decoding(health_pb2.HealthCheckRequest, servicer.Check)
    watch = _decoding(health_pb2.HealthCheckRequest, servicer.Watch)
    return grpc.method_handlers_generic_handler(
        health.SERVICE_NAME,
        {
            "Check": grpc.unary_unary_rpc_method_handler(check, response_serializer=_encoded),
            "Watch": grpc.unary_stream_rpc_method_handler(watch, response_serializer=_encoded),
        },
    )


def reflection_handlers(servicer: Any) -> grpc.GenericRpcHandler:
    """servicer: grpc_reflection's, for asyncio."""
    info = _decoding_each(reflection_pb2.ServerReflectionRequest, servicer.ServerReflectionInfo)
    return grpc.method_handlers_generic_handler(
        reflection.SERVICE_NAME,
        {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(info, response_serializer=_encoded)},
    )


def _decoding(request: type[Message], run: Callable[[Any, Any], Awaitable[Any]]) -> Callable[..., Any]:
    async def handle(raw: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        try:
            message = decoded(request, raw)
        except InvalidRequest as error:
            await refuse(context, error)
        return await run(message, context)

    return handle


def _decoding_each(
    request: type[Message], run: Callable[[AsyncIterator[Any], Any], AsyncIterator[Any]]
) -> Callable[..., Any]:
    async def handle(
        messages: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[Any]:
        async def each() -> AsyncIterator[Any]:
            async for raw in messages:
                yield decoded(request, raw)

        try:
            async for answer in run(each(), context):
                yield answer
        except InvalidRequest as error:
            await refuse(context, error)

    return handle


def _encoded(answer: Message) -> bytes:
    return answer.SerializeToString()
