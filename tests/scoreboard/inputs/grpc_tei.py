"""Nasty inputs to tei.v1, the gRPC interface of Text Embeddings Inference."""

from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto.foreign import tei_pb2 as tei
from tests.scoreboard.inputs.case import GrpcCase
from tests.scoreboard.inputs.grpc_own import INVALID, LIMIT_BYTES, LONG, message_with

Code = grpc.StatusCode


def asked(
    group: str,
    name: str,
    method: str,
    *messages: Any,
    code: grpc.StatusCode,
    reason: str = "",
    fields: Sequence[str] = (),
    **more: Any,
) -> GrpcCase:
    """messages: of protobuf, or bytes."""
    sent = tuple(each if isinstance(each, bytes) else each.SerializeToString() for each in messages)
    return GrpcCase(
        group=group, name=name, path=method, messages=sent, code=code, reason=reason, fields=tuple(fields), **more
    )


def _tei_vector(text: str) -> Any:
    def check(answers: Sequence[bytes]) -> None:
        found = tei.EmbedResponse.FromString(answers[0]).embeddings
        np.testing.assert_array_equal(np.array(found, np.float32), fake_embedding(text))

    return check


def tei_cases() -> Iterator[GrpcCase]:
    def embed(name: str, reason: str, field: str, **given: Any) -> GrpcCase:
        return asked(
            "tei", name, "tei.v1.Embed/Embed", tei.EmbedRequest(**given), code=INVALID, reason=reason, fields=[field]
        )

    yield embed("no text", "EMPTY_TEXT", "inputs[0]")
    yield embed("an invisible text", "EMPTY_TEXT", "inputs[0]", inputs="\ufeff")
    yield embed("a text of too many tokens", "TEXT_TOO_LONG", "inputs[0]", inputs=LONG)
    yield embed("a text of too many bytes", "TEXT_TOO_LONG", "inputs[0]", inputs="x" * (LIMIT_BYTES + 1), truncate=True)
    yield embed("a prompt that is none", "INVALID_FIELD", "prompt_name", inputs="a", prompt_name="")
    yield embed("a direction that is none", "INVALID_FIELD", "truncation_direction", inputs="a", truncation_direction=2)
    yield embed("a direction below 0", "INVALID_FIELD", "truncation_direction", inputs="a", truncation_direction=-1)
    yield embed("no dimensions", "INVALID_FIELD", "dimensions", inputs="a", dimensions=0)
    yield embed("4 billion dimensions", "INVALID_FIELD", "dimensions", inputs="a", dimensions=2**32 - 1)
    yield asked(
        "tei",
        "NUL is a text",
        "tei.v1.Embed/Embed",
        tei.EmbedRequest(inputs="\0"),
        code=Code.OK,
        right=_tei_vector("\0"),
    )
    for name, sent in {"no UTF-8": message_with(1, b"\xff"), "noise": b"\xff" * 9}.items():
        for method in ("tei.v1.Embed/Embed", "tei.v1.Rerank/Rerank", "tei.v1.Tokenize/Tokenize"):
            yield asked("tei", f"{name} to {method}", method, sent, code=INVALID, reason="MALFORMED_REQUEST")
    for method in ("Embed/EmbedAll", "Embed/EmbedSparse"):
        yield asked("tei", f"{method} is not served", f"tei.v1.{method}", b"", code=Code.UNIMPLEMENTED)
    for method in ("Predict", "PredictPair"):
        yield asked(
            "tei",
            f"{method} of an embedding model",
            f"tei.v1.Predict/{method}",
            b"",
            code=Code.FAILED_PRECONDITION,
            reason="WRONG_TASK",
        )
    for count, code, reason in (
        (0, INVALID, "INVALID_FIELD"),
        (1, Code.FAILED_PRECONDITION, "WRONG_TASK"),
        (3, INVALID, "INVALID_FIELD"),
        (5000, INVALID, "INVALID_FIELD"),
    ):
        pair = tei.PredictPairRequest(inputs=["a"] * count)
        fields = ["inputs"] if code is INVALID else []
        yield asked(
            "tei",
            f"a pair of {count}",
            "tei.v1.Predict/PredictPair",
            pair,
            code=code,
            reason=reason,
            fields=fields,
            server="cross",
        )
    yield from _tei_rerank_cases()
    yield from _tei_token_cases()


def _tei_rerank_cases() -> Iterator[GrpcCase]:
    rerank, stream = "tei.v1.Rerank/Rerank", "tei.v1.Rerank/RerankStream"
    for name, given, reason, field in (
        ("no texts", {"query": "q"}, "EMPTY_REQUEST", "texts"),
        ("no query", {"texts": ["a"]}, "EMPTY_TEXT", "query"),
        ("an empty text", {"query": "q", "texts": ["a", ""]}, "EMPTY_TEXT", "texts[1]"),
        ("too many texts", {"query": "q", "texts": ["a"] * 1025}, "TOO_MANY_TEXTS", "texts"),
        ("a query of too many tokens", {"query": LONG, "texts": ["a"]}, "TEXT_TOO_LONG", "query"),
    ):
        yield asked(
            "tei",
            f"a rerank of {name}",
            rerank,
            tei.RerankRequest(**given),
            code=INVALID,
            reason=reason,
            fields=[field],
        )
    one = tei.RerankStreamRequest(query="q", text="a")
    differs = [one, tei.RerankStreamRequest(query="r", text="b")]
    for name, messages, reason, fields in (
        ("no messages", [], "EMPTY_REQUEST", ["texts"]),
        ("two queries", differs, "INVALID_FIELD", ["query"]),
        ("a thousand and more messages", [one] * 1025, "TOO_MANY_TEXTS", []),
        ("noise behind a message", [one, b"\xff\xff"], "MALFORMED_REQUEST", []),
    ):
        yield asked(
            "streams",
            f"a rerank stream of {name}",
            stream,
            *messages,
            code=INVALID,
            reason=reason,
            fields=fields,
            is_stream=True,
        )
    embeds = [tei.EmbedRequest(inputs="a"), tei.EmbedRequest(), tei.EmbedRequest(inputs="b")]
    yield asked(
        "streams",
        "an embed stream ends with its first bad message",
        "tei.v1.Embed/EmbedStream",
        *embeds,
        code=INVALID,
        reason="EMPTY_TEXT",
        fields=["inputs[0]"],
        is_stream=True,
    )


def _tei_token_cases() -> Iterator[GrpcCase]:
    decode = "tei.v1.Tokenize/Decode"
    yield asked("tei", "no ids", decode, tei.DecodeRequest(), code=Code.OK, right=_decoded(""))
    for name, ids in {"an unknown id": [2**31 - 1], "the largest id": [2**32 - 1], "0": [0]}.items():
        yield asked(
            "tei",
            f"decode {name}",
            decode,
            tei.DecodeRequest(ids=ids),
            code=INVALID,
            reason="INVALID_FIELD",
            fields=["ids[0]"],
        )
    million = tei.DecodeRequest(ids=[1] * 1_000_000)
    yield asked("tei", "a million ids", decode, million, code=INVALID, reason="TOO_MANY_TEXTS")
    tokenize = "tei.v1.Tokenize/Tokenize"
    yield asked(
        "tei",
        "tokens of nothing",
        tokenize,
        tei.EncodeRequest(inputs=""),
        code=INVALID,
        reason="EMPTY_TEXT",
        fields=["inputs[0]"],
    )
    yield asked(
        "tei",
        "tokens under a prompt that is none",
        tokenize,
        tei.EncodeRequest(inputs="a", prompt_name="p"),
        code=INVALID,
        reason="INVALID_FIELD",
        fields=["prompt_name"],
    )
    yield asked(
        "tei",
        "tokens of a text of too many bytes",
        tokenize,
        tei.EncodeRequest(inputs="x" * (LIMIT_BYTES + 1)),
        code=INVALID,
        reason="TEXT_TOO_LONG",
        fields=["inputs[0]"],
    )


def _decoded(text: str) -> Any:
    def check(answers: Sequence[bytes]) -> None:
        assert tei.DecodeResponse.FromString(answers[0]).text == text

    return check


def all_cases() -> list[GrpcCase]:
    """Of this service."""
    return [*tei_cases()]
