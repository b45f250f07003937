"""gRPC as bytes: the methods that reflection lists, right messages for each, and calls that send what they get."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_database import DescriptorDatabase
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.conftest import FakeServer, fake_server, raw

GUARD_S = 30
_LONG = "word " * 300
_TENSOR = {"name": "TEXT", "datatype": "BYTES", "shape": [2], "contents": {"bytes_contents": ["YQ==", "Yg=="]}}
_RAW_TENSOR = {"name": "TEXT", "datatype": "BYTES", "shape": [1]}

# Messages to begin with, by method; each method gets one more, made of its descriptor.
_RIGHT: dict[str, list[dict[str, Any]]] = {
    "ml_inference_server.v1.InferenceService/Embed": [
        {"texts": ["a", "two words"], "dimensions": 4, "overflow": "OVERFLOW_CHUNK", "encoding": "ENCODING_INT8"},
        {"texts": ["a", _LONG], "input_type": "query", "model": "fake", "truncate": True},
    ],
    "ml_inference_server.v1.InferenceService/EmbedStream": [{"id": 7, "request": {"texts": ["a", _LONG]}}],
    "ml_inference_server.v1.InferenceService/Score": [
        {"pairs": [{"query": "a", "passage": "b"}], "overflow": "OVERFLOW_CUT", "model": "fake"}
    ],
    "ml_inference_server.v1.InferenceService/Rerank": [
        {"query": "a", "documents": ["b", _LONG], "top_k": 1, "max_document_tokens": 5, "truncate": True}
    ],
    "inference.GRPCInferenceService/ModelReady": [{"name": "fake"}],
    "inference.GRPCInferenceService/ModelMetadata": [{"name": "fake", "version": "1"}],
    "inference.GRPCInferenceService/ModelConfig": [{"name": "fake"}],
    "inference.GRPCInferenceService/ModelStatistics": [{"name": "fake"}],
    "inference.GRPCInferenceService/ModelInfer": [
        {
            "model_name": "fake",
            "id": "7",
            "inputs": [_TENSOR],
            "outputs": [{"name": "EMBEDDING"}],
            "parameters": {"dimensions": {"int64_param": 4}, "overflow": {"string_param": "chunk"}},
        },
        {"model_name": "fake", "inputs": [_RAW_TENSOR], "raw_input_contents": ["AQAAAGE="]},
    ],
    "tei.v1.Embed/Embed": [{"inputs": _LONG, "truncate": True, "normalize": True, "dimensions": 4}],
    "tei.v1.Embed/EmbedStream": [{"inputs": "a", "truncate": True}],
    "tei.v1.Predict/PredictPair": [{"inputs": ["a", "b"], "truncate": True}],
    "tei.v1.Predict/PredictPairStream": [{"inputs": ["a", "b"], "truncate": True}],
    "tei.v1.Rerank/Rerank": [{"query": "a", "texts": ["b", "c"], "return_text": True, "truncate": True}],
    "tei.v1.Rerank/RerankStream": [{"query": "a", "text": "b", "raw_scores": True, "truncate": True}],
    "tei.v1.Tokenize/Tokenize": [{"inputs": "a text", "add_special_tokens": True}],
    "tei.v1.Tokenize/TokenizeStream": [{"inputs": "a text"}],
    "tei.v1.Tokenize/Decode": [{"ids": [1, 2]}],
    "tei.v1.Tokenize/DecodeStream": [{"ids": [1, 2]}],
    "grpc.health.v1.Health/Check": [{"service": ""}],
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": [
        {"list_services": "*"},
        {"file_containing_symbol": "tei.v1.Embed"},
    ],
}


@dataclass(frozen=True)
class Method:
    """path: service/method. right: messages that are well-formed."""

    path: str
    descriptor: MethodDescriptor
    right: Sequence[Message]


@dataclass(frozen=True)
class Outcome:
    """error: None where all was well. answers: the messages that came before it."""

    error: Any
    answers: list[bytes]

    @property
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK if self.error is None else self.error.code()


async def listed_methods(server: FakeServer) -> list[Method]:
    """Of every service that reflection lists, as reflection describes them."""
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    request = reflection_pb2.ServerReflectionRequest
    names: list[str] = []
    async for reply in stub.ServerReflectionInfo(iter([request(list_services="")])):
        names = [service.name for service in reply.list_services_response.service]
    for name in names:
        async for reply in stub.ServerReflectionInfo(iter([request(file_containing_symbol=name)])):
            for serialized in reply.file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(serialized)
                files[file.name] = file
    database = DescriptorDatabase()
    for file in files.values():
        database.Add(file)
    pool = DescriptorPool(database)
    services = [pool.FindServiceByName(name) for name in names]
    return [_method(f"{service.full_name}/{each.name}", each) for service in services for each in service.methods]


def _method(path: str, descriptor: MethodDescriptor) -> Method:
    request = GetMessageClass(descriptor.input_type)
    right = [ParseDict(each, request()) for each in _RIGHT.get(path, [])]
    return Method(path, descriptor, [*right, _filled(request(), depth=3)])


def _filled(message: Message, depth: int) -> Message:
    """With something in each field."""
    values: dict[int, Any] = {
        FieldDescriptor.CPPTYPE_STRING: "fake",
        FieldDescriptor.CPPTYPE_BOOL: True,
        FieldDescriptor.CPPTYPE_FLOAT: 0.5,
        FieldDescriptor.CPPTYPE_DOUBLE: 0.5,
    }
    for field in message.DESCRIPTOR.fields:
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if field.message_type is not None:
            if depth and not is_map:
                found = getattr(message, field.name)
                _filled(found.add() if field.is_repeated else found, depth - 1)
            continue
        value = values.get(field.cpp_type, 1)
        if field.type == FieldDescriptor.TYPE_BYTES:
            value = b"fake"
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    return message


@dataclass(frozen=True)
class GrpcWire:
    """blocking: a channel for streams. grpc.aio's client loses the status of a server that refuses a stream before all
    of it is sent, and puts an INTERNAL of its own in its place."""

    server: FakeServer
    blocking: grpc.Channel

    async def call(self, method: Method, messages: Sequence[bytes]) -> Outcome:
        """The first of `messages` where the method takes one. TimeoutError where no end comes."""
        channel, path = raw(self.server.channel), f"/{method.path}"
        async with asyncio.timeout(GUARD_S):
            if method.descriptor.client_streaming:
                return await asyncio.to_thread(self._stream, method, messages)
            try:
                if not method.descriptor.server_streaming:
                    return Outcome(None, [await channel.unary_unary(path)(messages[0])])
                call = channel.unary_stream(path)(messages[0])  # a watch, which has no end
                answer = await call.read()
                call.cancel()
            except grpc.RpcError as error:
                return Outcome(error, [])
            return Outcome(None, [answer])

    def _stream(self, method: Method, messages: Sequence[bytes]) -> Outcome:
        channel: Any = self.blocking
        path = f"/{method.path}"
        answers: list[bytes] = []
        try:
            if method.descriptor.server_streaming:
                answers += channel.stream_stream(path)(iter(messages), timeout=GUARD_S)
            else:
                answers.append(channel.stream_unary(path)(iter(messages), timeout=GUARD_S))
        except grpc.RpcError as error:
            return Outcome(error, answers)
        return Outcome(None, answers)


@contextlib.asynccontextmanager
async def grpc_wire(**sections: dict[str, Any]) -> AsyncIterator[GrpcWire]:
    async with fake_server(**sections) as server:
        with grpc.insecure_channel(server.address) as blocking:
            yield GrpcWire(server, blocking)
