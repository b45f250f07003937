"""gRPC services: what each servicer brings, and the answer to methods of a foreign service that this server lacks."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor


class Servicer(Protocol):
    def handlers(self) -> Sequence[grpc.GenericRpcHandler]: ...

    def services(self) -> Mapping[str, bool]:
        """Full names of its services, and whether the loaded model can do what each is for."""
        ...


def service_handlers(
    service: ServiceDescriptor,
    served: Mapping[str, "grpc.RpcMethodHandler[Any, Any]"],
    missing: Mapping[str, str],
) -> grpc.GenericRpcHandler:
    """Of all methods of `service`: `served`, and of the others the sentence that says why not. KeyError without one."""
    return grpc.method_handlers_generic_handler(
        service.full_name,
        {
            method.name: served.get(method.name) or _unimplemented(method, missing[method.name])
            for method in service.methods
        },
    )


def _unimplemented(method: MethodDescriptor, why: str) -> "grpc.RpcMethodHandler[Any, Any]":
    async def refuse(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, why)

    async def refuse_stream(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncIterator[bytes]:
        yield await refuse(request, context)

    if method.client_streaming:
        if method.server_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse_stream)
        return grpc.stream_unary_rpc_method_handler(refuse)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse_stream)
    return grpc.unary_unary_rpc_method_handler(refuse)
