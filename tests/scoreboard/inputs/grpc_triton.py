"""Nasty inputs to Open Inference over gRPC, as clients of Triton and KServe speak it."""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto.foreign import grpc_service_pb2 as triton
from tests.scoreboard.inputs.case import GrpcCase
from tests.scoreboard.inputs.grpc_own import INVALID, message_with, varint
from tests.scoreboard.inputs.grpc_tei import asked

Code = grpc.StatusCode
TRITON = "inference.GRPCInferenceService"
_KINDS = {str: "string_param", bool: "bool_param", int: "int64_param", float: "double_param"}


def packed(*elements: bytes) -> bytes:
    """A raw tensor of BYTES."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def tensor(
    *shape: int, raw: bytes | None = None, name: str = "TEXT", datatype: str = "BYTES", **parameters: Any
) -> Any:
    """A request with one input. parameters: of the request."""
    request = triton.ModelInferRequest(model_name="fake")
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    if raw is not None:
        request.raw_input_contents.append(raw)
    for key, value in parameters.items():
        setattr(request.parameters[key], _KINDS[type(value)], value)
    return request


def with_more(request: Any, *, outputs: Sequence[str] = (), **fields: Any) -> Any:
    for name in outputs:
        request.outputs.add(name=name)
    for name, value in fields.items():
        setattr(request, name, value)
    return request


def triton_cases() -> Iterator[GrpcCase]:
    infer, one = f"{TRITON}/ModelInfer", packed(b"a")

    def wrong(name: str, request: Any, *fields: str, reason: str = "INVALID_FIELD", **more: Any) -> GrpcCase:
        given = {"code": INVALID} | more
        return asked("open inference", name, infer, request, reason=reason, fields=fields, **given)

    for name, request, field in (
        ("no inputs", triton.ModelInferRequest(model_name="fake"), "inputs"),
        ("a query alone", tensor(1, raw=one, name="QUERY"), "inputs"),
        ("an input of another name", tensor(1, raw=one, name="text"), "inputs[0].name"),
        ("an input without a name", tensor(1, raw=one, name=""), "inputs[0].name"),
        ("floats", tensor(1, raw=b"\0\0\0\0", datatype="FP32"), "inputs[0].datatype"),
        ("a datatype in small letters", tensor(1, raw=one, datatype="bytes"), "inputs[0].datatype"),
        ("no shape", tensor(raw=one), "inputs[0].shape"),
        ("a shape below 0", tensor(-1, raw=one), "inputs[0].shape"),
        ("the least shape", tensor(-(2**63), raw=one), "inputs[0].shape"),
        ("a shape of three", tensor(1, 1, 1, raw=one), "inputs[0].shape"),
        ("a thousand dimensions", tensor(*[1] * 1000, raw=one), "inputs[0].shape"),
        ("a matrix", tensor(1, 2, raw=packed(b"a", b"b")), "inputs[0].shape"),
        ("rows of 0", tensor(1, 0, raw=one), "inputs[0].shape"),
        ("fewer bytes than the shape", tensor(2, raw=one), "inputs[0].data"),
        ("more bytes than the shape", tensor(1, raw=packed(b"a", b"b")), "inputs[0].data"),
        ("a byte behind the last element", tensor(1, raw=one + b"\0"), "inputs[0].data"),
        ("a length cut off", tensor(1, raw=b"\1\0\0"), "inputs[0].data"),
        ("a length of 4 GB", tensor(1, raw=b"\xff\xff\xff\xffa"), "inputs[0].data"),
        ("a length in the other order", tensor(1, raw=b"\0\0\0\1a"), "inputs[0].data"),
        ("text without a length", tensor(1, raw=b"plain text"), "inputs[0].data"),
        ("bytes that are no UTF-8", tensor(2, raw=packed(b"a", b"\xff")), "inputs[0].data[1]"),
        ("half a surrogate pair", tensor(1, raw=packed(b"\xed\xa0\x80")), "inputs[0].data[0]"),
        ("no contents", tensor(1), "inputs[0].data"),
        ("dimensions that are true", tensor(1, raw=one, dimensions=True), "dimensions"),
        ("dimensions as a text", tensor(1, raw=one, dimensions="4"), "dimensions"),
        ("dimensions as NaN", tensor(1, raw=one, dimensions=float("nan")), "dimensions"),
        ("dimensions of 2^63 - 1", tensor(1, raw=one, dimensions=2**63 - 1), "dimensions"),
        ("dimensions of -2^63", tensor(1, raw=one, dimensions=-(2**63)), "dimensions"),
        ("an overflow that is none", tensor(1, raw=one, overflow="CUT"), "overflow"),
        ("a timeout below 0", tensor(1, raw=one, timeout=-1), "timeout"),
        ("a timeout as a text", tensor(1, raw=one, timeout="soon"), "timeout"),
        ("a parameter that nobody knows", tensor(1, raw=one, dimension=4), "parameters"),
        ("a sequence", tensor(1, raw=one, sequence_id=1), "parameters"),
        ("an unknown output", with_more(tensor(1, raw=one), outputs=["LOGITS"]), "outputs[0].name"),
        ("an output twice", with_more(tensor(1, raw=one), outputs=["EMBEDDING"] * 2), "outputs[1].name"),
        ("a score of texts", with_more(tensor(1, raw=one), outputs=["SCORE"]), "outputs[0].name"),
    ):
        yield wrong(name, request, field)
    yield wrong("a shape of 2^62", tensor(2**62, raw=one), "inputs[0].shape", reason="TOO_MANY_TEXTS")
    yield wrong("a tensor of nothing", tensor(0, raw=b""), "TEXT", reason="EMPTY_REQUEST")
    yield wrong("an element of nothing", tensor(1, raw=packed(b"")), "TEXT[0]", reason="EMPTY_TEXT")
    twice = tensor(1, raw=one)
    twice.inputs.add(name="TEXT", datatype="BYTES", shape=[1])
    twice.raw_input_contents.append(one)
    yield wrong("an input twice", twice, "inputs[1].name")
    both = tensor(1, raw=one)
    both.inputs[0].contents.bytes_contents.append(b"a")
    yield wrong("contents in both forms", both, "raw_input_contents")
    few = tensor(1, raw=one)
    few.inputs.add(name="QUERY", datatype="BYTES", shape=[1])
    yield wrong("raw contents for one of two", few, "raw_input_contents")
    numbers = tensor(1)
    numbers.inputs[0].contents.int_contents.append(7)
    yield wrong("contents as integers", numbers, "inputs[0].data")
    shared = tensor(1)
    shared.inputs[0].parameters["shared_memory_region"].string_param = "/dev/shm/a"  # noqa: S108 - a name, not a file
    yield wrong("shared memory", shared, "inputs[0].parameters")
    classes = with_more(tensor(1, raw=one), outputs=["EMBEDDING"])
    classes.outputs[0].parameters["classification"].int64_param = 3
    yield wrong("classes", classes, "outputs[0].parameters")
    for name in ("inputs", "outputs"):
        crowd = tensor(1, raw=one)
        for _ in range(1025):
            getattr(crowd, name).add()
        yield wrong(f"more than a thousand {name}", crowd, name)
    for name, model, version in (
        ("another model", "gpt-4", ""),
        ("another version", "fake", "2"),
        ("version 01", "fake", "01"),
        ("a model that is a path", "../fake", ""),
    ):
        request = with_more(tensor(1, raw=one), model_name=model, model_version=version)
        yield wrong(name, request, reason="MODEL_NOT_FOUND", code=Code.NOT_FOUND)
    yield wrong("texts to a cross-encoder", tensor(1, raw=one), "inputs", server="cross")
    yield wrong(
        "a microsecond of time", tensor(1, raw=one, timeout=1), reason="DEADLINE_EXCEEDED", code=Code.DEADLINE_EXCEEDED
    )
    yield asked(
        "open inference",
        "NUL in a tensor",
        infer,
        tensor(2, raw=packed(b"a\0b", b"\0")),
        code=Code.OK,
        right=_embedding("a\0b", "\0"),
    )
    yield asked(
        "open inference",
        "the longest timeout",
        infer,
        tensor(1, raw=one, timeout=2**63 - 1),
        code=Code.OK,
        right=_embedding("a"),
    )
    yield from _triton_question_cases()


def _embedding(*texts: str) -> Any:
    def check(answers: Sequence[bytes]) -> None:
        reply = triton.ModelInferResponse.FromString(answers[0])
        found = np.frombuffer(reply.raw_output_contents[0], "<f4").reshape(len(texts), -1)
        np.testing.assert_array_equal(found, np.stack([fake_embedding(text) for text in texts]))

    return check


def _triton_question_cases() -> Iterator[GrpcCase]:
    for method in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"):
        for name, sent in (("another model", message_with(1, b"gpt-4")), ("version of blanks", message_with(2, b" "))):
            yield asked(
                "open inference",
                f"{method} of {name}",
                f"{TRITON}/{method}",
                sent,
                code=Code.NOT_FOUND,
                reason="MODEL_NOT_FOUND",
            )
        yield asked(
            "open inference",
            f"noise to {method}",
            f"{TRITON}/{method}",
            b"\x0a" + varint(9),
            code=INVALID,
            reason="MALFORMED_REQUEST",
        )
    for method in (
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "SystemSharedMemoryRegister",
        "TraceSetting",
        "LogSettings",
    ):
        yield asked("open inference", f"{method} is not served", f"{TRITON}/{method}", b"\xff", code=Code.UNIMPLEMENTED)


def all_cases() -> list[GrpcCase]:
    """Of this service."""
    return [*triton_cases()]
