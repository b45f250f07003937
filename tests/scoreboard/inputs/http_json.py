"""Nasty bodies of JSON, to the routes of every dialect."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ml_inference_server.backends.fake import fake_embedding
from tests.fuzz.http_wire import JSON_TYPE, http_request
from tests.integration.http_kit import HttpReply, float32
from tests.scoreboard.inputs.case import HttpCase
from tests.scoreboard.inputs.texts import EMPTY, NO_TEXT, SOUND

LIMIT_BYTES = 1_048_576
LONG = "word " * 300
OPENAI, TEI, COHERE, JINA, INFER = "/v1/embeddings", "/embed", "/v2/embed", "/v2/rerank", "/v2/models/fake/infer"


def ask(
    group: str,
    name: str,
    path: str,
    body: Any,
    status: int,
    says: str = "",
    *,
    headers: Sequence[str] = (JSON_TYPE,),
    method: str = "POST",
    **more: Any,
) -> HttpCase:
    """body: bytes as they are; anything else as JSON, with what JSON does not have where it holds such."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = http_request(path, sent, *headers, method=method)
    return HttpCase(group=group, name=name, request=request, status=status, says=says, **more)


def openai_vectors(*texts: str) -> Callable[[HttpReply], None]:
    def check(reply: HttpReply) -> None:
        found = float32([each["embedding"] for each in reply.json["data"]])
        np.testing.assert_array_equal(found, np.stack([fake_embedding(text) for text in texts]))

    return check


def tei_vectors(*texts: str) -> Callable[[HttpReply], None]:
    def check(reply: HttpReply) -> None:
        np.testing.assert_array_equal(float32(reply.json), np.stack([fake_embedding(text) for text in texts]))

    return check


def unicode_cases() -> Iterator[HttpCase]:
    """The texts of the table as UTF-8, and once more as escapes where that is another thing."""
    for name, text in SOUND.items():
        body = json.dumps({"input": ["a", text], "model": "fake"}, ensure_ascii=False).encode()
        yield ask("unicode", name, OPENAI, body, 200, right=openai_vectors("a", text))
    for name, text in EMPTY.items():
        says = "input[1]: text is empty"
        yield ask("unicode", f"nothing to embed: {name}", OPENAI, {"input": ["a", text], "model": "fake"}, 400, says)
    for name, sent in NO_TEXT.items():
        yield ask("encodings", f"text of {name}", OPENAI, b'{"model": "fake", "input": "%b"}' % sent, 400, "not UTF-8")
    surrogates = {"a half": '"\\ud800"', "the other half": '"\\udc00"', "the wrong way round": '"\\udc00\\ud800"'}
    for name, text in surrogates.items():
        body = b'{"model": "fake", "input": ["a", %b]}' % text.encode()
        yield ask("unicode", f"an escaped surrogate pair: {name}", OPENAI, body, 400, "input[1]: not valid Unicode")
        yield ask(
            "unicode",
            f"an escaped surrogate pair to tei: {name}",
            TEI,
            b'{"inputs": %b}' % text.encode(),
            422,
            "not valid Unicode",
        )
    escaped = b'{"model": "fake", "input": ["\\u0000", "\\uD83D\\uDE42", "\\/\\b\\f"]}'
    yield ask("unicode", "sound escapes", OPENAI, escaped, 200, right=openai_vectors("\0", "\U0001f642", "/\b\f"))
    odd_key = b'{"model": "fake", "input": "a", "\\ud800": 1, "": 2, "__class__": 3}'
    yield ask("unicode", "keys of odd characters", OPENAI, odd_key, 200, right=openai_vectors("a"))
    for name, document in {"key": {"text": "a", "\ud800": 1}, "value": {"text": "a", "b": "\ud800"}}.items():
        wanted = {"query": "q", "documents": [document], "return_documents": True}
        title = f"half a pair in the {name} of a document to return"
        yield ask("unicode", title, JINA, wanted, 400, "documents[0]: holds")
    half_id = {"id": "\ud800", "inputs": [{"name": "TEXT", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}
    yield ask("unicode", "half a pair as an id to return", INFER, half_id, 400, "id: not valid Unicode")


def json_cases() -> Iterator[HttpCase]:
    malformed: dict[str, tuple[bytes, str]] = {
        "no bytes": (b"", "not valid JSON"),
        "blanks": (b" \r\n\t", "not valid JSON"),
        "a word": (b"input", "not valid JSON"),
        "single quotes": (b"{'input': 'a'}", "not valid JSON"),
        "no quotes": (b"{input: a}", "not valid JSON"),
        "a comma too many": (b'{"input": "a",}', "not valid JSON"),
        "a comment": (b'{"input": "a"} // why', "not valid JSON"),
        "cut off within a key": (b'{"inp', "not valid JSON"),
        "cut off within a text": (b'{"input": "a', "not valid JSON"),
        "cut off within an escape": (b'{"input": "\\u00', "not valid JSON"),
        "cut off behind a colon": (b'{"input":', "not valid JSON"),
        "an escape that is none": (b'{"input": "\\x41"}', "not valid JSON"),
        "a line break within a text": (b'{"input": "a\nb"}', "not valid JSON"),
        "a tab within a text": (b'{"input": "a\tb"}', "not valid JSON"),
        "NUL behind the end": (b'{"input": "a"}\0', "not valid JSON"),
        "two objects": (b'{"input": "a"}{"input": "b"}', "not valid JSON"),
        "lines of JSON": (b'{"input": "a"}\n{"input": "b"}', "not valid JSON"),
        "an infinite number": (b'{"input": "a", "dimensions": Infinity}', "not valid JSON"),
        "a negative infinite number": (b'{"input": "a", "dimensions": -Infinity}', "not valid JSON"),
        "NaN": (b'{"input": NaN}', "not valid JSON"),
        "a number with a plus": (b'{"dimensions": +4}', "not valid JSON"),
        "a number with a zero before it": (b'{"dimensions": 04}', "not valid JSON"),
        "a number in hex": (b'{"dimensions": 0x4}', "not valid JSON"),
        "a number of 5,000 digits": (b'{"dimensions": ' + b"9" * 5000 + b"}", "not valid JSON"),
        "a byte order mark": (b'\xef\xbb\xbf{"input": "a"}', "not valid JSON"),
        "UTF-16": ('{"input": "a"}'.encode("utf-16"), "not UTF-8"),
        "UTF-16 without a mark": ('{"input": "a"}'.encode("utf-16-le"), "not valid JSON"),
        "UTF-32": ('{"input": "a"}'.encode("utf-32"), "not UTF-8"),
        "gzip": (b"\x1f\x8b\x08\x00" + b"\0" * 20, "not UTF-8"),
        "XML": (b"<?xml version='1.0'?><input>a</input>", "not valid JSON"),
        "YAML": (b"input: a", "not valid JSON"),
        "a form": (b"input=a&model=fake", "not valid JSON"),
        "a list": (b'["a"]', "must be a JSON object"),
        "a text": (b'"a"', "must be a JSON object"),
        "a number": (b"7", "must be a JSON object"),
        "null": (b"null", "must be a JSON object"),
        "true": (b"true", "must be a JSON object"),
        "100,000 brackets": (b"[" * 100_000, "nested too deeply"),
        "100,000 brackets that are closed": (
            b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "nested too deeply",
        ),
        "100,000 objects in each other": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        "a million brackets and one": (b"[" * 1_000_001, "opening brackets"),
    }
    for name, (body, says) in malformed.items():
        yield ask("bodies", f"JSON that is none: {name}", OPENAI, body, 400, says)
    twice = {
        "a text": b'{"model": "fake", "input": "a", "input": "b"}',
        "a key that is escaped": b'{"model": "fake", "input": "a", "\\u0069nput": "b"}',
        "deep inside": b'{"model": "fake", "input": "a", "user": {"b": 1, "b": 1}}',
    }
    for name, body in twice.items():
        yield ask("duplicates", f"a key twice: {name}", OPENAI, body, 400, "a key stands twice")
    yield ask(
        "duplicates",
        "texts and documents",
        "/rerank",
        {"query": "q", "texts": ["a"], "documents": ["a"]},
        422,
        "both are there",
    )
    yield ask("duplicates", "neither texts nor documents", "/rerank", {"query": "q"}, 422, "neither is there")


def size_cases() -> Iterator[HttpCase]:
    fits = "x" * LIMIT_BYTES
    yield ask("sizes", "a text at the limit", TEI, {"inputs": fits}, 200, right=tei_vectors(fits))
    yield ask("sizes", "a text above the limit", TEI, {"inputs": ["a", fits + "x"]}, 422, "inputs[1]: 1048577 bytes")
    yield ask(
        "sizes",
        "a text that is small as escapes",
        TEI,
        b'{"inputs": "%b"}' % (b"\\u0041" * LIMIT_BYTES),
        200,
        right=tei_vectors("A" * LIMIT_BYTES),
    )
    yield ask("sizes", "a text of 10 MB", TEI, {"inputs": "x" * 10_000_000}, 422, "10000000 bytes")
    yield ask(
        "sizes",
        "10 MB in a field that nobody reads",
        TEI,
        {"inputs": "a", "b": "x" * 10_000_000},
        200,
        right=tei_vectors("a"),
    )
    yield ask(
        "sizes",
        "10 MB of blanks round a right body",
        TEI,
        b" " * 10_000_000 + b'{"inputs": "a"}',
        200,
        right=tei_vectors("a"),
    )
    yield ask("sizes", "a key of 10 MB", TEI, {"inputs": "a", "b" * 10_000_000: 1}, 200, right=tei_vectors("a"))
    yield ask("sizes", "a body above the limit", TEI, b" " * 16_777_217, 413, "more than 16777216 bytes")
    yield ask(
        "sizes",
        "a text that may not be cut",
        TEI,
        {"inputs": ["a", LONG], "truncate": False},
        422,
        "inputs[1]: 302 tokens",
    )
    yield ask("sizes", "a model name of a megabyte", OPENAI, {"input": "a", "model": "m" * 1_000_000}, 400, "model: ")
    most = [f"text {place}" for place in range(1024)]
    yield ask("counts", "as many texts as may be", TEI, {"inputs": most}, 200, right=tei_vectors(*most))
    yield ask(
        "counts", "one text too many", TEI, {"inputs": [*most, "a"]}, 422, "1025 > maximum allowed batch size 1024"
    )
    yield ask("counts", "a million empty texts", TEI, b'{"inputs": [' + b'"",' * 1_000_000 + b'""]}', 422, "1000001 >")
    yield ask("counts", "a million numbers", TEI, b'{"inputs": ["a"' + b",1" * 1_000_000 + b"]}", 422, "token ids")
    yield ask("counts", "400,000 empty lists", TEI, b'{"inputs": [' + b"[]," * 400_000 + b"[]]}", 422, "item 0 must be")
    yield ask(
        "counts",
        "a million and more empty objects",
        TEI,
        b'{"inputs": [' + b"{}," * 1_000_000 + b"{}]}",
        400,
        "opening brackets",
    )
    keys = ", ".join(f'"key {number}": {number}' for number in range(100_000))
    yield ask(
        "counts",
        "100,000 keys that nobody knows",
        TEI,
        b'{"inputs": "a", %b}' % keys.encode(),
        200,
        right=tei_vectors("a"),
    )
    yield ask(
        "duplicates", "one text 1,024 times", TEI, {"inputs": ["same"] * 1024}, 200, right=tei_vectors(*["same"] * 1024)
    )


def all_cases() -> list[HttpCase]:
    """In bodies."""
    made = (unicode_cases, json_cases, size_cases)
    return [case for cases in made for case in cases()]
