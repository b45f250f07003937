"""What each RPC asks of a key, and the interceptor that asks it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from ml_inference_server.door.door import Door
from ml_inference_server.door.rights import ADMIN, ANY_KEY, INFER, METRICS, MODEL_FACTS, OPEN, Needs
from ml_inference_server.proto import inference_pb2
from ml_inference_server.proto.foreign import grpc_service_pb2, tei_pb2
from ml_inference_server.server.rpc.method_handlers import refuse
from ml_inference_server.utils.errors import Forbidden, ServiceError

_OWN = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
_OPEN_INFERENCE = grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_TEI_INFO = tei_pb2.DESCRIPTOR.services_by_name["Info"].full_name
_REFLECTION = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"

# Methods that this server answers with UNIMPLEMENTED stand here too: whether it has them is nobody's business.
NEEDS: dict[str, Needs] = {
    f"/{health.SERVICE_NAME}/Check": OPEN,
    f"/{health.SERVICE_NAME}/Watch": OPEN,
    _REFLECTION: OPEN,
    **{f"/{_OWN}/{name}": INFER for name in ("Embed", "EmbedStream", "Score", "Rerank")},
    f"/{_OWN}/GetMetrics": METRICS,
    f"/{_OWN}/GetServerInfo": MODEL_FACTS,
    f"/{_TEI_INFO}/Info": MODEL_FACTS,
    **{
        f"/{service.full_name}/{method.name}": INFER
        for service in tei_pb2.DESCRIPTOR.services_by_name.values()
        if service.full_name != _TEI_INFO
        for method in service.methods
    },
    f"/{_OPEN_INFERENCE}/ServerLive": OPEN,
    f"/{_OPEN_INFERENCE}/ServerReady": OPEN,
    **{
        f"/{_OPEN_INFERENCE}/{name}": MODEL_FACTS
        for name in ("ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "RepositoryIndex")
    },
    f"/{_OPEN_INFERENCE}/ModelStatistics": METRICS,
    f"/{_OPEN_INFERENCE}/ModelInfer": INFER,
    f"/{_OPEN_INFERENCE}/ModelStreamInfer": INFER,
    **{
        f"/{_OPEN_INFERENCE}/{kind}SharedMemory{action}": INFER
        for kind in ("System", "Cuda")
        for action in ("Status", "Register", "Unregister")
    },
    **{
        f"/{_OPEN_INFERENCE}/{name}": ADMIN
        for name in ("RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings")
    },
}


class Doorkeeper(grpc.aio.ServerInterceptor):
    """Refuses a call before anything of it is read.

    A method that is not in NEEDS takes a key as any other; with one, its caller learns that there is none, and gets
    nothing where there is one.
    """

    def __init__(self, door: Door) -> None:
        self._door = door
        self._needs = dict(NEEDS) if door.open_reflection else {**NEEDS, _REFLECTION: ANY_KEY}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        needs = self._needs.get(handler_call_details.method)
        if needs == OPEN:
            return await continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata or ()
        try:
            self._door.check([value for name, value in metadata if name == "authorization"], needs or ANY_KEY)
            handler = await continuation(handler_call_details)
            if needs is None and handler is not None:
                raise Forbidden("no key has a right to this method")
        except ServiceError as error:
            return _refusing(error)
        return handler


def _refusing(error: ServiceError) -> Any:
    """The handler of a call of any kind: on the wire all are streams, and this one ends it before it reads."""

    async def end(_: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        await refuse(context, error)

    return grpc.stream_stream_rpc_method_handler(end)
