"""inference.GRPCInferenceService, which clients of Triton and of KServe call: messages to plain arguments and back."""

from collections.abc import Sized
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict

from ml_inference_server.proto.foreign import grpc_service_pb2 as pb
from ml_inference_server.server.call import Call
from ml_inference_server.server.calls import Calls
from ml_inference_server.server.observation import Reply
from ml_inference_server.server.open_inference import Inference, OpenInference
from ml_inference_server.server.rpc.method_handlers import MethodHandlers
from ml_inference_server.server.rpc.services import service_handlers
from ml_inference_server.server.rpc.status import RpcDialect
from ml_inference_server.server.tensors import InputTensor, RequestedOutput
from ml_inference_server.utils.errors import InvalidRequest

_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_DIALECT = RpcDialect(fields={"texts": "TEXT"})

# Bytes of an answer that do not grow with the number of its texts.
_REST_BYTES = 4096
# Of inputs, outputs and parameters: far more than any request needs. A message has room for millions of empty ones, and
# a Python object for each would take all memory and minutes of the event loop.
_MOST_ITEMS = 1024
_NO_SHARED_MEMORY = "this server has no shared memory: send tensors in ModelInfer, and receive them in its answer"
_ONE_MODEL = "this server has one model, which it loads at its start"
_MISSING = {
    "ModelStreamInfer": "this model gives one answer to each request: use ModelInfer",
    "RepositoryModelLoad": _ONE_MODEL,
    "RepositoryModelUnload": _ONE_MODEL,
    **{
        f"{kind}SharedMemory{action}": _NO_SHARED_MEMORY
        for kind in ("System", "Cuda")
        for action in ("Status", "Register", "Unregister")
    },
    "TraceSetting": "traces are set up in the server's settings (metrics.otlp_endpoint)",
    "LogSettings": "the level of the log is set where the server is started",
}


class OpenInferenceServicer:
    """max_message_bytes: what gRPC sends at most."""

    def __init__(self, open_inference: OpenInference, calls: Calls, max_message_bytes: int) -> None:
        self._open_inference = open_inference
        self._handlers = MethodHandlers(calls, _DIALECT)
        self._max_answer_bytes = max_message_bytes - _REST_BYTES

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        make = self._handlers
        served = {
            "ServerLive": make.question("ServerLive", pb.ServerLiveRequest, self.server_live),
            "ServerReady": make.question("ServerReady", pb.ServerReadyRequest, self.server_ready),
            "ModelReady": make.question("ModelReady", pb.ModelReadyRequest, self.model_ready),
            "ServerMetadata": make.question("ServerMetadata", pb.ServerMetadataRequest, self.server_metadata),
            "ModelMetadata": make.question("ModelMetadata", pb.ModelMetadataRequest, self.model_metadata),
            "ModelConfig": make.question("ModelConfig", pb.ModelConfigRequest, self.model_config),
            "ModelStatistics": make.question("ModelStatistics", pb.ModelStatisticsRequest, self.model_statistics),
            "RepositoryIndex": make.question("RepositoryIndex", pb.RepositoryIndexRequest, self.repository_index),
            "ModelInfer": make.work("kserve.infer", pb.ModelInferRequest, self.model_infer),
        }
        return [service_handlers(_SERVICE, served, _MISSING)]

    def services(self) -> dict[str, bool]:
        return {_SERVICE.full_name: True}

    def server_live(self, request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def server_ready(self, request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._open_inference.is_ready())

    def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=self._open_inference.is_model_ready(request.name, request.version))

    def server_metadata(self, request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(**self._open_inference.server_metadata())

    def model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        found = self._open_inference.model_metadata(request.name, request.version)
        return ParseDict(found, pb.ModelMetadataResponse())

    def model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        found = self._open_inference.model_config(request.name, request.version)
        return ParseDict({"config": found}, pb.ModelConfigResponse())

    async def model_statistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        found = await self._open_inference.statistics(request.name, request.version)
        return ParseDict(found, pb.ModelStatisticsResponse())

    def repository_index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        return ParseDict(self._open_inference.index(only_ready=request.ready), pb.RepositoryIndexResponse())

    async def model_infer(self, request: pb.ModelInferRequest, call: Call) -> Reply[pb.ModelInferResponse]:
        _check_count("inputs", request.inputs)
        _check_count("outputs", request.outputs)
        inference = Inference(
            model_name=request.model_name,
            model_version=request.model_version,
            id=request.id,
            parameters=_values(request.parameters),
            inputs=_inputs(request),
            outputs=[RequestedOutput(output.name, _values(output.parameters)) for output in request.outputs],
        )
        reply = await self._open_inference.infer(inference, call, max_answer_bytes=self._max_answer_bytes)
        answer = reply.message
        message = pb.ModelInferResponse(
            model_name=answer.model_name,
            model_version=answer.model_version,
            id=answer.id,
            parameters={name: _parameter(value) for name, value in answer.parameters.items()},
            outputs=[
                pb.ModelInferResponse.InferOutputTensor(name=each.name, datatype=each.datatype, shape=each.shape)
                for each in answer.outputs
            ],
            raw_output_contents=[each.raw() for each in answer.outputs],
        )
        return Reply(message, reply.texts, reply.pairs, reply.truncated, reply.stamps)


def _inputs(request: pb.ModelInferRequest) -> list[InputTensor]:
    """Contents are raw for all inputs, or for none: what belongs to which could not be told otherwise."""
    raw = request.raw_input_contents
    if raw and (len(raw) != len(request.inputs) or any(each.HasField("contents") for each in request.inputs)):
        message = f"{len(raw)} for {len(request.inputs)} inputs: send raw contents for each input, and no others"
        raise InvalidRequest(f"raw_input_contents: {message}", violations=[("raw_input_contents", message)])
    return [
        InputTensor(
            each.name,
            each.datatype,
            tuple(each.shape),
            raw[place] if raw else each.contents.bytes_contents,
            _values(each.parameters),
        )
        for place, each in enumerate(request.inputs)
    ]


def _check_count(name: str, items: Sized) -> None:
    if len(items) > _MOST_ITEMS:
        message = f"{len(items)} of them, the limit is {_MOST_ITEMS}"
        raise InvalidRequest(f"{name}: {message}", violations=[(name, message)])


def _values(parameters: Any) -> dict[str, object]:
    """A parameter without a value is None."""
    _check_count("parameters", parameters)
    values: dict[str, object] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        values[name] = None if kind is None else getattr(parameter, kind)
    return values


def _parameter(value: str | int) -> pb.InferParameter:
    return pb.InferParameter(string_param=value) if isinstance(value, str) else pb.InferParameter(int64_param=value)
