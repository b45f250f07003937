"""Nasty calls, whatever they ask: metadata, deadlines, compression, methods that do not exist."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from ml_inference_server.proto import inference_pb2 as pb
from tests.scoreboard.inputs.case import OWN, GrpcCase, vectors_of

Code = grpc.StatusCode
_GOOD = pb.EmbedRequest(texts=["a"]).SerializeToString()


def call(group: str, name: str, code: grpc.StatusCode = Code.OK, **more: Any) -> GrpcCase:
    """A right message to Embed, or what `more` says."""
    given: dict[str, Any] = {"path": f"{OWN}/Embed", "messages": (_GOOD,)} | more
    if code is Code.OK and "right" not in given:
        given["right"] = vectors_of("a")
    return GrpcCase(group=group, name=name, code=code, **given)


def metadata_cases() -> Iterator[GrpcCase]:
    fine: dict[str, Sequence[tuple[str, str | bytes]]] = {
        "a request id of blanks": [("x-request-id", "   ")],
        "a request id too long": [("x-request-id", "a" * 5000)],
        "a request id with a path": [("x-request-id", "../../etc/passwd")],
        "a request id of HTML": [("x-request-id", "<script>alert(1)</script>")],
        "two request ids": [("x-request-id", "a"), ("x-request-id", "b")],
        "a traceparent of noise": [("traceparent", "00-zz-zz-zz")],
        "a traceparent of zeros": [("traceparent", f"00-{'0' * 32}-{'0' * 16}-01")],
        "a traceparent of 5,000 characters": [("traceparent", "0" * 5000)],
        "two traceparents": [("traceparent", "00-a"), ("traceparent", "00-b")],
        "an authorization where there are no keys": [("authorization", "Bearer nothing")],
        "a hundred keys": [(f"x-key-{number}", "a") for number in range(100)],
        "one key a hundred times": [("x-key", "a") for _ in range(100)],
        "noise in binary metadata": [("x-noise-bin", bytes(range(256)))],
        "7 kB of metadata": [("x-long", "a" * 7000)],
        "an empty value": [("x-empty", "")],
        "a key of 500 characters": [("k" * 500, "a")],
        "an empty space to expect": [("x-expect-space-id", "")],
    }
    for name, metadata in fine.items():
        yield call("metadata", name, metadata=tuple(metadata))
    yield call("metadata", "20 kB of metadata", Code.RESOURCE_EXHAUSTED, metadata=(("x-long", "a" * 20_000),))
    for name, space in {"another space": "0" * 16, "a space of HTML": "<b>", "a long space": "f" * 5000}.items():
        yield call(
            "metadata",
            f"{name} to expect",
            Code.FAILED_PRECONDITION,
            reason="SPACE_MISMATCH",
            metadata=(("x-expect-space-id", space),),
        )


def deadline_cases() -> Iterator[GrpcCase]:
    yield call("deadlines", "no time at all", Code.DEADLINE_EXCEEDED, timeout_s=0.0)
    yield call("deadlines", "a deadline in the past", Code.DEADLINE_EXCEEDED, timeout_s=-10.0)
    yield call("deadlines", "a deadline in 100 years", timeout_s=100 * 365 * 86_400.0)
    slow = pb.EmbedRequest(texts=["!slow:2000 a"]).SerializeToString()
    for name, timeout_s in {"a deadline within the batch": 0.2, "a deadline of a millisecond": 0.001}.items():
        yield call("deadlines", name, Code.DEADLINE_EXCEEDED, messages=(slow,), timeout_s=timeout_s, server="faults")


def fault_cases() -> Iterator[GrpcCase]:
    """Texts that make the engine fail, as some text may do to any model."""
    for word, reason in (
        ("!raise", "BACKEND_ERROR"),
        ("!nan", "NON_FINITE_OUTPUT"),
        ("!inf", "NON_FINITE_OUTPUT"),
        ("!short", "BACKEND_ERROR"),
        ("!oom:0", "OUT_OF_MEMORY"),
    ):
        sent = pb.EmbedRequest(texts=["a", f"{word} b"]).SerializeToString()
        yield call(
            "poison",
            f"a text on which the engine fails: {word}",
            Code.INTERNAL,
            messages=(sent,),
            reason=reason,
            server="faults",
        )
        named = (b"\x0a" + bytes([len(word)]) + word.encode(),)
        yield call(
            "poison",
            f"the same over tei: {word}",
            Code.FAILED_PRECONDITION,
            path="tei.v1.Embed/Embed",
            messages=named,
            reason=reason,
            server="faults",
        )
    once = pb.EmbedRequest(texts=["!raise-once c"]).SerializeToString()
    yield call(
        "poison", "a text on which it fails once", messages=(once,), right=vectors_of("!raise-once c"), server="faults"
    )


def compression_cases() -> Iterator[GrpcCase]:
    for kind in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        yield call("compressions", f"{kind.name}", compression=kind)
        bomb = pb.EmbedRequest(texts=["x" * 1_000_000] * 64).SerializeToString()
        assert len(zlib.compress(bomb)) < 100_000
        yield call("compressions", f"64 MB in {kind.name}", Code.RESOURCE_EXHAUSTED, messages=(bomb,), compression=kind)
    noise = b"\xff" * 100_000
    yield call(
        "compressions",
        "noise in Gzip",
        Code.INVALID_ARGUMENT,
        messages=(noise,),
        reason="MALFORMED_REQUEST",
        compression=grpc.Compression.Gzip,
    )


def method_cases() -> Iterator[GrpcCase]:
    unknown = {
        "a method that is none": f"{OWN}/Nothing",
        "a method in small letters": f"{OWN}/embed",
        "a service that is none": "no.Such/Embed",
        "a method without a service": "Embed",
        "a method behind a slash more": f"{OWN}//Embed",
        "a method with a question": f"{OWN}/Embed?a=b",
        "a method with a path": f"{OWN}/../{OWN}/Embed",
        "a method that is encoded": f"{OWN}/%45mbed",
        "a method of 5,000 characters": f"{OWN}/{'E' * 5000}",
        "an earlier version": "ml_inference_server.v0.InferenceService/Embed",
    }
    for name, path in unknown.items():
        yield call("methods", name, Code.UNIMPLEMENTED, path=path)
    yield call("methods", "two messages to a method that takes one", is_stream=True, messages=(_GOOD, _GOOD))
    health = "grpc.health.v1.Health/Check"
    yield call(
        "methods",
        "the health of no such service",
        Code.NOT_FOUND,
        path=health,
        messages=(b"\x0a\x01x",),
        has_sentence=False,
    )
    yield call(
        "methods",
        "noise to health",
        Code.INVALID_ARGUMENT,
        path=health,
        messages=(b"\x0a\x05x",),
        reason="MALFORMED_REQUEST",
    )
    reflection = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    yield call(
        "methods",
        "noise to reflection",
        Code.INVALID_ARGUMENT,
        path=reflection,
        messages=(b"\x0a\x05x",),
        reason="MALFORMED_REQUEST",
        is_stream=True,
    )


def all_cases() -> list[GrpcCase]:
    """Over the server's own wire, most of them to Embed."""
    made = (metadata_cases, deadline_cases, fault_cases, compression_cases, method_cases)
    return [case for cases in made for case in cases()]
