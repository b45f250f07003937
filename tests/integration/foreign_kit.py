"""Stubs of foreign gRPC services, made of their descriptors, and what tests of several of them use."""

from types import SimpleNamespace
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status


def foreign_stub(channel: grpc.aio.Channel, service: ServiceDescriptor) -> Any:
    """One callable for each method, of whatever kind."""
    made = {}
    for method in service.methods:
        kinds = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }
        made[method.name] = kinds[method.client_streaming, method.server_streaming](
            f"/{service.full_name}/{method.name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
    return SimpleNamespace(**made)


def told(error: grpc.aio.AioRpcError) -> tuple[str, list[str]]:
    """(reason, violated fields) from the rich status."""
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.code == error.code().value[0]
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    fields: list[str] = []
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
            fields = [violation.field for violation in bad.field_violations]
    return info.reason, fields
