"""Nasty inputs to the server's own wire."""

from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from ml_inference_server.backends.fake import fake_logit
from ml_inference_server.proto import inference_pb2 as pb
from tests.scoreboard.inputs.case import OWN, GrpcCase, vectors_of
from tests.scoreboard.inputs.texts import EMPTY, NO_TEXT, SOUND

Code = grpc.StatusCode
INVALID = Code.INVALID_ARGUMENT
LONG = "word " * 300
LIMIT_BYTES = 1_048_576


def message_with(number: int, value: bytes) -> bytes:
    """A message that has one field of bytes, made by hand. number: below 16."""
    return bytes([number << 3 | 2]) + varint(len(value)) + value


def varint(number: int) -> bytes:
    """As protobuf writes a length."""
    found = b""
    while number > 0x7F:
        found += bytes([number & 0x7F | 0x80])
        number >>= 7
    return found + bytes([number])


def refused(group: str, name: str, request: Any, reason: str, *fields: str, **more: Any) -> GrpcCase:
    """By the method that takes this message. request: bytes are for Embed."""
    is_raw = isinstance(request, bytes)
    method = "Embed" if is_raw else type(request).__name__.removesuffix("Request")
    given: dict[str, Any] = {"path": f"{OWN}/{method}", "code": INVALID} | more
    sent = request if is_raw else request.SerializeToString()
    return GrpcCase(group=group, name=name, messages=(sent,), reason=reason, fields=fields, **given)


def answered(group: str, name: str, request: Any, *texts: str, **more: Any) -> GrpcCase:
    """By Embed, with the vectors of `texts`."""
    sent = request if isinstance(request, bytes) else request.SerializeToString()
    return GrpcCase(
        group=group, name=name, path=f"{OWN}/Embed", messages=(sent,), code=Code.OK, right=vectors_of(*texts), **more
    )


def unicode_cases() -> Iterator[GrpcCase]:
    for name, text in SOUND.items():
        yield answered("unicode", name, pb.EmbedRequest(texts=["a", text]), "a", text)
    for name, text in EMPTY.items():
        yield refused(
            "unicode", f"nothing to embed: {name}", pb.EmbedRequest(texts=["a", text]), "EMPTY_TEXT", "texts[1]"
        )
    for name, sent in NO_TEXT.items():
        yield refused("encodings", f"text of {name}", message_with(1, sent), "MALFORMED_REQUEST")
    for number, name in ((2, "prompt_name"), (5, "input_type"), (8, "expect_space_id"), (9, "model")):
        sent = message_with(1, b"a") + message_with(number, b"\xff")
        yield refused("encodings", f"{name} of no UTF-8", sent, "MALFORMED_REQUEST")


def wire_cases() -> Iterator[GrpcCase]:
    """Messages made by hand, byte by byte."""
    good = pb.EmbedRequest(texts=["a"]).SerializeToString()
    broken = {
        "noise": b"\xff" * 20,
        "a length beyond the end": b"\x0a\x05a",
        "a length of 2^31": b"\x0a" + varint(2**31) + b"a",
        "a length of 2^63": b"\x0a" + varint(2**63) + b"a",
        "a varint without an end": b"\x0a" + b"\x80" * 12,
        "field number 0": b"\x02\x01a",
        "wire type 7": b"\x0f",
        "a group that does not end": b"\x0b" + good,
        "a group that ends and never began": good + b"\x0c",
        "groups 200 deep": b"\x7b" * 200 + b"\x7c" * 200,
        "a tag cut off": good + b"\x92",
    }
    for name, sent in broken.items():
        yield refused("bodies", name, sent, "MALFORMED_REQUEST")
    odd = {
        "fields that nobody knows": good + message_with(15, b"later") + b"\xa0\x06\x01",
        "a field of another wire type": good + b"\x08\x07",
        "a scalar twice, the last one counts": good + b"\x20\x01\x20\x02",
        "an empty group of an unknown number": good + b"\x7b\x7c",
        "a varint longer than it has to be": b"\x0a\x81\x80\x00a",
    }
    for name, sent in odd.items():
        yield answered("bodies", name, sent, "a")
    yield refused("bodies", "no bytes at all", b"", "EMPTY_REQUEST", "texts")
    other = pb.Pair(query="a", passage="b").SerializeToString()
    yield refused("bodies", "a message of another method", other, "INVALID_FIELD", "prompt_name")
    for method, field in (("Score", "pairs"), ("Rerank", "documents")):
        yield refused("bodies", f"nothing to {method}", b"", "EMPTY_REQUEST", field, path=f"{OWN}/{method}")


def size_cases() -> Iterator[GrpcCase]:
    fits, above = "x" * LIMIT_BYTES, "x" * (LIMIT_BYTES + 1)
    yield answered("sizes", "a text at the limit", pb.EmbedRequest(texts=[fits]), fits)
    yield refused("sizes", "a text above the limit", pb.EmbedRequest(texts=["a", above]), "TEXT_TOO_LONG", "texts[1]")
    wide = "\u00e9" * (LIMIT_BYTES // 2)
    yield answered("sizes", "a text at the limit of bytes", pb.EmbedRequest(texts=[wide]), wide)
    wider = pb.EmbedRequest(texts=[wide + "\u00e9"])
    yield refused("sizes", "a text above the limit of bytes, not of characters", wider, "TEXT_TOO_LONG", "texts[0]")
    yield refused("sizes", "a text of 10 MB", pb.EmbedRequest(texts=["x" * 10_000_000]), "TEXT_TOO_LONG", "texts[0]")
    all_long = pb.EmbedRequest(texts=[above] * 10)
    fields = [f"texts[{place}]" for place in range(10)]
    yield refused("sizes", "ten texts above the limit", all_long, "TEXT_TOO_LONG", *fields)
    for name, reason, texts in (
        ("a text above the limit of a message", "", ["x" * 17_000_000]),
        ("many texts above the limit of a message", "", ["x" * 1_000_000] * 18),
    ):
        case = pb.EmbedRequest(texts=texts)
        yield refused("sizes", name, case, reason, code=Code.RESOURCE_EXHAUSTED)
    yield refused(
        "sizes",
        "a model name of a megabyte",
        pb.EmbedRequest(texts=["a"], model="m" * 1_000_000),
        "MODEL_NOT_FOUND",
        code=Code.NOT_FOUND,
    )
    yield refused(
        "sizes",
        "a prompt name of a megabyte",
        pb.EmbedRequest(texts=["a"], prompt_name="p" * 1_000_000),
        "INVALID_FIELD",
        "prompt_name",
    )
    long_query = pb.RerankRequest(query=above, documents=["a"])
    yield refused("sizes", "a query above the limit", long_query, "TEXT_TOO_LONG", "query")
    long_pair = pb.ScoreRequest(pairs=[pb.Pair(query="a", passage=above)])
    yield refused("sizes", "a passage above the limit", long_pair, "TEXT_TOO_LONG", "pairs[0].passage")


def count_cases() -> Iterator[GrpcCase]:
    most = [f"text {place}" for place in range(1024)]
    yield answered("counts", "as many texts as may be", pb.EmbedRequest(texts=most), *most)
    yield refused("counts", "one text too many", pb.EmbedRequest(texts=[*most, "a"]), "TOO_MANY_TEXTS", "texts")
    yield refused("counts", "a million empty texts", b"\x0a\x00" * 1_000_000, "TOO_MANY_TEXTS", "texts")
    pairs = pb.ScoreRequest(pairs=[pb.Pair(query="a", passage="b")] * 1025)
    yield refused("counts", "one pair too many", pairs, "TOO_MANY_TEXTS", "pairs")
    empty_pairs = b"\x0a\x00" * 1_000_000
    yield refused("counts", "a million empty pairs", empty_pairs, "TOO_MANY_TEXTS", "pairs", path=f"{OWN}/Score")
    documents = pb.RerankRequest(query="a", documents=["b"] * 1025)
    yield refused("counts", "one document too many", documents, "TOO_MANY_TEXTS", "documents")
    wrong = pb.EmbedRequest(texts=[""] * 1024)
    fields = [f"texts[{place}]" for place in range(16)]
    yield refused("counts", "all texts empty, sixteen are told", wrong, "EMPTY_TEXT", *fields)
    same = pb.EmbedRequest(texts=["same"] * 1024)
    yield answered("duplicates", "one text 1,024 times", same, *["same"] * 1024)
    near = ["a b", "a  b", " a b ", "a\tb", "A b"]
    yield answered("duplicates", "texts that differ in blanks and case", pb.EmbedRequest(texts=near), *near)
    mixed = pb.EmbedRequest(texts=["", "x" * (LIMIT_BYTES + 1)])
    yield refused("counts", "two texts with different faults", mixed, "INVALID_FIELD", "texts[0]", "texts[1]")


def number_cases() -> Iterator[GrpcCase]:
    for value in (0, 9, 2**31 - 1, 2**32 - 1):
        asked = pb.EmbedRequest(texts=["a"], dimensions=value)
        yield refused("numbers", f"{value} dimensions", asked, "INVALID_FIELD", "dimensions")
    for value in (6, -1, 2**31 - 1, -(2**31)):
        sent = pb.EmbedRequest(texts=["a"]).SerializeToString()
        number = varint(value % 2**64)
        yield refused("numbers", f"overflow {value}", sent + b"\x20" + number, "INVALID_FIELD", "overflow")
        yield refused("numbers", f"encoding {value}", sent + b"\x38" + number, "INVALID_FIELD", "encoding")
    for value in (1, 2, 2**32 - 1):
        best = pb.RerankRequest(query="a", documents=["b", "a"], top_k=value)
        yield ranked("numbers", f"the best {value} of two documents", best, [1, 0][:value])
    most_tokens = pb.RerankRequest(query="a", documents=["b", "a"], max_document_tokens=2**32 - 1)
    yield ranked("numbers", "at most 2^32 - 1 tokens of a document", most_tokens, [1, 0])
    beyond = pb.EmbedRequest(texts=["a"]).SerializeToString() + b"\x30" + varint(2**32 + 8)
    yield answered("numbers", "a number of 33 bits is cut as protobuf cuts it", beyond, "a")


def ranked(group: str, name: str, request: pb.RerankRequest, order: Sequence[int], **more: Any) -> GrpcCase:
    def check(answers: Sequence[bytes]) -> None:
        found = [rank.index for rank in pb.RerankResponse.FromString(answers[0]).ranks]
        assert found == order, found

    sent = request.SerializeToString()
    return GrpcCase(group=group, name=name, path=f"{OWN}/Rerank", messages=(sent,), code=Code.OK, right=check, **more)


def option_cases() -> Iterator[GrpcCase]:
    def ask(**fields: Any) -> pb.EmbedRequest:
        return pb.EmbedRequest(texts=["a"], **fields)

    contradictions = {
        "truncate and refuse": (ask(truncate=True, overflow=pb.OVERFLOW_REFUSE), "truncate"),
        "do not truncate and cut": (ask(truncate=False, overflow=pb.OVERFLOW_CUT), "truncate"),
        "a prompt and a role": (ask(prompt_name="", input_type="query"), "prompt_name"),
        "a role that is none": (ask(input_type="Query"), "input_type"),
        "a role of blanks": (ask(input_type="  "), "input_type"),
        "a prompt that is none": (ask(prompt_name="query"), "prompt_name"),
        "a prompt name with NUL": (ask(prompt_name="\0"), "prompt_name"),
    }
    for name, (request, field) in contradictions.items():
        yield refused("options", name, request, "INVALID_FIELD", field)
    long = pb.EmbedRequest(texts=["a", LONG], overflow=pb.OVERFLOW_REFUSE)
    yield refused("options", "a text of too many tokens that may not be cut", long, "TEXT_TOO_LONG", "texts[1]")
    for name, space in {"another space": "0" * 16, "a space of a megabyte": "f" * 1_000_000, "no space": " "}.items():
        yield refused("options", name, ask(expect_space_id=space), "SPACE_MISMATCH", code=Code.FAILED_PRECONDITION)
    for name, model in {
        "another model": "gpt-4",
        "a path": "../../etc/passwd",
        "a line break": "fake\nfake",
        "a blank behind": "fake ",
        "NUL behind": "fake\0",
        "a role that is none": "fake:nothing",
        "two roles": "fake:query:query",
        "colons": ":::::",
        "look-alikes": "f\u0430ke",
    }.items():
        yield refused("models", f"a model named {name}", ask(model=model), "MODEL_NOT_FOUND", code=Code.NOT_FOUND)
    yield answered("models", "a model named in capitals", ask(model="FAKE"), "a")
    yield answered("models", "a model with a role", ask(model="fake:query"), "a")


def pair_cases() -> Iterator[GrpcCase]:
    """Of a cross-encoder, and of pairs."""
    wrong = {"server": "cross", "code": Code.FAILED_PRECONDITION}
    yield refused("tasks", "vectors of a cross-encoder", pb.EmbedRequest(texts=["a"]), "WRONG_TASK", **wrong)
    yield refused("tasks", "wrong vectors of a cross-encoder", pb.EmbedRequest(), "WRONG_TASK", **wrong)
    for overflow in (pb.OVERFLOW_CHUNK, pb.OVERFLOW_CUT_LEFT):
        request = pb.RerankRequest(query="a", documents=["b"], overflow=overflow)
        name = f"overflow {pb.Overflow.Name(overflow)} of a pair"
        yield refused("tasks", name, request, "INVALID_FIELD", "overflow", server="cross")
    half = pb.ScoreRequest(pairs=[pb.Pair(query="a", passage="b"), pb.Pair(query="a"), pb.Pair(passage="b")])
    orders = {"plain": ("pairs[2].query", "pairs[1].passage"), "cross": ("pairs[1].passage", "pairs[2].query")}
    for server, fields in orders.items():
        yield refused("types", f"half of a pair, {server}", half, "EMPTY_TEXT", *fields, server=server)
        empty = pb.RerankRequest(query=" ", documents=["a", "\u200b"])
        yield refused(
            "types", f"a rerank of nothing, {server}", empty, "EMPTY_TEXT", "query", "documents[1]", server=server
        )

    def scores(answers: Sequence[bytes]) -> None:
        found = list(pb.ScoreResponse.FromString(answers[0]).scores)
        assert len(found) == 2
        assert all(
            abs(a - b) < 1e-6 for a, b in zip(found, [fake_logit("a", "\0"), fake_logit("\0", "a")], strict=True)
        )

    pairs = pb.ScoreRequest(pairs=[pb.Pair(query="a", passage="\0"), pb.Pair(query="\0", passage="a")])
    yield GrpcCase(
        group="unicode",
        name="NUL in a pair, both ways",
        server="cross",
        path=f"{OWN}/Score",
        messages=(pairs.SerializeToString(),),
        code=Code.OK,
        right=scores,
    )


def stream_cases() -> Iterator[GrpcCase]:
    """On EmbedStream a message that fails is answered, and one that is no message ends the stream."""

    def item(number: int, *texts: str) -> bytes:
        return pb.EmbedStreamRequest(id=number, request=pb.EmbedRequest(texts=texts)).SerializeToString()

    def outcomes(*expected: tuple[int, str]) -> Any:
        def check(answers: Sequence[bytes]) -> None:
            replies = map(pb.EmbedStreamResponse.FromString, answers)
            assert sorted((reply.id, reply.error.reason) for reply in replies) == sorted(expected)

        return check

    def stream(
        name: str, *messages: bytes, code: grpc.StatusCode = Code.OK, right: Any = None, **more: Any
    ) -> GrpcCase:
        path = f"{OWN}/EmbedStream"
        return GrpcCase(
            group="streams", name=name, path=path, is_stream=True, messages=messages, code=code, right=right, **more
        )

    yield stream("no messages", right=outcomes())
    yield stream("an empty message", b"", right=outcomes((0, "EMPTY_REQUEST")))
    yield stream("one id twice", item(7, "a"), item(7, "b"), right=outcomes((7, ""), (7, "")))
    yield stream("the largest id", item(2**64 - 1, "a"), right=outcomes((2**64 - 1, "")))
    yield stream(
        "a bad message among good ones",
        item(1, "a"),
        item(2, ""),
        item(3, "b"),
        right=outcomes((1, ""), (2, "EMPTY_TEXT"), (3, "")),
    )
    many = [item(number, f"text {number}") for number in range(1000)]
    yield stream("a thousand messages at once", *many, right=outcomes(*((number, "") for number in range(1000))))
    for name, noise in {"noise": b"\xff" * 9, "no UTF-8": message_with(2, message_with(1, b"\xff"))}.items():
        yield stream(f"{name} as the first message", noise, code=INVALID, reason="MALFORMED_REQUEST")
        yield stream(f"{name} as the last message", item(1, "a"), noise, code=INVALID, reason="MALFORMED_REQUEST")
    yield stream("a message above the limit", item(1, "x" * 17_000_000), code=Code.RESOURCE_EXHAUSTED)
    yield stream(
        "another model on a stream",
        pb.EmbedStreamRequest(id=1, request=pb.EmbedRequest(texts=["a"], model="gpt-4")).SerializeToString(),
        right=outcomes((1, "MODEL_NOT_FOUND")),
    )


def all_cases() -> list[GrpcCase]:
    """Of the server's own wire."""
    made = (unicode_cases, wire_cases, size_cases, count_cases, number_cases, option_cases, pair_cases, stream_cases)
    return [case for cases in made for case in cases()]
