"""Nasty requests, whatever their body asks: heads, paths, methods, framing, types, encodings, deadlines."""

import gzip
import zlib
from collections.abc import Iterator
from typing import Any

from tests.fuzz.http_wire import JSON_TYPE
from tests.scoreboard.inputs.case import HANGS_UP, HttpCase
from tests.scoreboard.inputs.http_json import OPENAI, TEI, ask, tei_vectors

_GOOD = b'{"inputs": "a"}'
_CHUNKED = "Transfer-Encoding: chunked"
_SOON = "x-request-timeout-ms: 300"


def raw(group: str, name: str, request: bytes, status: int, says: str = "", **more: Any) -> HttpCase:
    return HttpCase(group=group, name=name, request=request, status=status, says=says, **more)


def head(*headers: str, line: str = f"POST {TEI} HTTP/1.1", host: str = "Host: localhost") -> bytes:
    """Whole lines, and the empty one behind them."""
    return "\r\n".join([line, *filter(None, [host]), *headers]).encode("latin-1") + b"\r\n\r\n"


def encoding_cases() -> Iterator[HttpCase]:
    packed = gzip.compress(_GOOD)
    bomb = gzip.compress(b" " * 50_000_000 + _GOOD)
    for name, encoding, body in (
        ("gzip", "gzip", packed),
        ("gzip that is none", "gzip", _GOOD),
        ("deflate", "deflate", zlib.compress(_GOOD)),
        ("brotli", "br", b"\x0b\x02\x80" + _GOOD),
        ("an encoding that is none", "rot13", _GOOD),
        ("two encodings", "gzip, gzip", packed),
        ("50 MB in gzip", "gzip", bomb),
        ("no name", "", _GOOD),
    ):
        yield ask(
            "compressions",
            f"a body in {name}",
            TEI,
            body,
            415,
            "compressed bodies are not taken",
            headers=[JSON_TYPE, f"Content-Encoding: {encoding}"],
        )
    yield ask(
        "compressions",
        "a body as it is",
        TEI,
        _GOOD,
        200,
        headers=[JSON_TYPE, "Content-Encoding: IDENTITY"],
        right=tei_vectors("a"),
    )
    for name, kind in {
        "text": "text/plain",
        "a form": "application/x-www-form-urlencoded",
        "parts": "multipart/form-data; boundary=a",
        "XML": "application/xml",
        "JSON of another kind": "application/vnd.api+json",
        "JSON lines": "application/jsonl",
        "noise": "\xff\xfe;;=,",
        "nothing": "",
        "two types": "application/json, text/plain",
        "a wildcard": "*/*",
    }.items():
        yield ask(
            "encodings",
            f"a body called {name}",
            TEI,
            _GOOD,
            415,
            "Content-Type: application/json",
            headers=[f"Content-Type: {kind}"],
        )
    yield ask("encodings", "a body without a type", TEI, _GOOD, 415, "Content-Type", headers=[])
    for name, kind in {
        "a character set": "application/json; charset=utf-16",
        "capitals": "APPLICATION/JSON",
        "parameters of noise": 'application/json; a="b; charset',
    }.items():
        yield ask(
            "encodings", f"JSON with {name}", TEI, _GOOD, 200, headers=[f"Content-Type: {kind}"], right=tei_vectors("a")
        )


def header_cases() -> Iterator[HttpCase]:
    for name, value in {
        "0": "0",
        "below 0": "-1",
        "a fraction": "1.5",
        "with a unit": "5s",
        "other digits": "\xb2",
        "a day and more": "86400001",
        "400 digits": "9" * 400,
        "nothing": "",
        "hex": "0x10",
        "an exponent": "1e3",
    }.items():
        yield ask(
            "deadlines",
            f"a timeout of {name}",
            TEI,
            _GOOD,
            422,
            "x-request-timeout-ms: expected milliseconds",
            headers=[JSON_TYPE, f"x-request-timeout-ms: {value}"],
        )
    yield ask("deadlines", "a timeout of a day", TEI, _GOOD, 200, headers=[JSON_TYPE, "x-request-timeout-ms: 86400000"])
    yield ask(
        "deadlines",
        "a timeout within the batch",
        TEI,
        {"inputs": "!slow:2000 a"},
        504,
        "deadline",
        headers=[JSON_TYPE, _SOON],
        server="faults",
    )
    fine = {
        "a request id of noise": "x-request-id: \xff\x80",
        "a request id of HTML": "x-request-id: <b>",
        "a traceparent of noise": "traceparent: \xff",
        "an accept of noise": "accept: \xff;q=x",
        "an origin": "Origin: a",
        "a cookie of 5,000 characters": f"Cookie: {'a' * 5000}",
        "an empty name of a proxy": "X-Forwarded-For:",
        "another host of a proxy": "X-Forwarded-Host: evil.example",
        "a path of a proxy": "X-Original-URL: /metrics",
        "a method in place of this one": "X-HTTP-Method-Override: DELETE",
        "a range": "Range: bytes=0-0",
        "a condition": "If-Match: a",
        "an upgrade": "Upgrade: h2c",
        "a websocket": "Upgrade: websocket",
    }
    for name, header in fine.items():
        yield ask("headers", name, TEI, _GOOD, 200, headers=[JSON_TYPE, header], right=tei_vectors("a"))
    many = [f"x-{number}: a" for number in range(100)]
    yield ask("headers", "a hundred headers", TEI, _GOOD, 200, headers=[JSON_TYPE, *many], right=tei_vectors("a"))
    yield ask(
        "headers",
        "another space to expect",
        TEI,
        _GOOD,
        412,
        "another than expected",
        headers=[JSON_TYPE, "x-expect-space-id: 0"],
    )
    yield ask(
        "headers", "it expects the best", TEI, _GOOD, 417, "100-continue", headers=[JSON_TYPE, "Expect: the best"]
    )
    for name, header in {
        "a header of 10 kB": f"x-a: {'a' * 10_000}",
        "a name of 10 kB": f"{'a' * 10_000}: a",
        "NUL in a header": "x-a: \0",
        "a name with a blank": "x a: b",
        "a name of nothing": ": a",
        "no colon": "x-a",
        "a line that goes on": "x-a: a\r\n b",
        "a line feed alone": "x-a: a\nx-b: b",
        "a return alone": "x-a: a\rx-b: b",
        "a blank before the colon": "x-a : a",
        "20,000 headers": "\r\n".join(["x-a: a"] * 20_000),
        "a name of other letters": "x-\xe9: a",
    }.items():
        length = f"Content-Length: {len(_GOOD)}"
        yield raw("headers", name, head(JSON_TYPE, length, header) + _GOOD, 400)


def framing_cases() -> Iterator[HttpCase]:
    body = _GOOD
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    length = f"Content-Length: {len(body)}"
    broken: dict[str, bytes] = {
        "a length below 0": head(JSON_TYPE, "Content-Length: -1") + body,
        "a length of words": head(JSON_TYPE, "Content-Length: many") + body,
        "a length with a plus": head(JSON_TYPE, f"Content-Length: +{len(body)}") + body,
        "a length in hex": head(JSON_TYPE, "Content-Length: 0xf") + body,
        "a length of nothing": head(JSON_TYPE, "Content-Length:") + body,
        "two lengths in one": head(JSON_TYPE, f"Content-Length: {len(body)}, {len(body)}") + body,
        "two lengths": head(JSON_TYPE, length, "Content-Length: 1") + body,
        "a length and chunks": head(JSON_TYPE, length, _CHUNKED) + chunks,
        "a coding that is none": head(JSON_TYPE, "Transfer-Encoding: rot13") + body,
        "chunks that are not the last coding": head(JSON_TYPE, "Transfer-Encoding: chunked, gzip") + chunks,
        "chunks twice": head(JSON_TYPE, "Transfer-Encoding: chunked, chunked") + chunks,
        "a chunk of no size": head(JSON_TYPE, _CHUNKED) + b"zz\r\n" + body,
        "a chunk below 0": head(JSON_TYPE, _CHUNKED) + b"-1\r\n" + body,
        "a chunk of 84 bits": head(JSON_TYPE, _CHUNKED) + b"f" * 21 + b"\r\n" + body,
        "a chunk longer than it says": head(JSON_TYPE, _CHUNKED) + b"3\r\n" + body + b"\r\n0\r\n\r\n",
    }
    for name, request in broken.items():
        yield raw("bodies", name, request, 400)
    fine: dict[str, bytes] = {
        "chunks of a byte": b"".join(b"1\r\n%c\r\n" % each for each in body) + b"0\r\n\r\n",
        "chunks with extensions": b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        "chunks with a trailer": b"%x\r\n%b\r\n0\r\nx-a: b\r\n\r\n" % (len(body), body),
        "a size with zeros": b"0000000%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
    }
    for name, sent in fine.items():
        yield raw("bodies", name, head(JSON_TYPE, _CHUNKED) + sent, 200, right=tei_vectors("a"))
    slow = {
        "a body that does not come": head(JSON_TYPE, "Content-Length: 100", _SOON),
        "half a body": head(JSON_TYPE, "Content-Length: 100", _SOON) + body,
        "a chunk without an end": head(JSON_TYPE, _CHUNKED, _SOON) + b"ffff\r\n" + body,
        "chunks without an end": head(JSON_TYPE, _CHUNKED, _SOON) + b"1\r\n \r\n" * 500,
    }
    for name, request in slow.items():
        yield raw("deadlines", name, request, 408, "within 0.3 s")
    yield raw(
        "sizes", "a length above the limit", head(JSON_TYPE, "Content-Length: 99999999999"), 413, "16777216 bytes"
    )
    big = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    yield raw("sizes", "chunks above the limit", head(JSON_TYPE, _CHUNKED) + big * 257, 413, "16777216 bytes")
    yield raw("bodies", "a body that ends too soon", head(JSON_TYPE, "Content-Length: 100") + body, HANGS_UP, ends=True)
    yield raw("bodies", "chunks that end too soon", head(JSON_TYPE, _CHUNKED) + b"5\r\n{", HANGS_UP, ends=True)
    yield raw("bodies", "a head that ends too soon", b"POST /embed HTTP/1.1\r\nHost: loc", HANGS_UP, ends=True)
    yield raw("bodies", "nothing at all", b"", HANGS_UP, ends=True)
    yield raw(
        "bodies",
        "a body of a question",
        head("Content-Length: 2", line="GET /metrics HTTP/1.1") + b"{}",
        413,
        "takes no body",
    )
    asks = head("Expect: 100-continue", JSON_TYPE, length)
    yield raw("headers", "it asks whether to go on", asks + body, 100)


def poison_cases() -> Iterator[HttpCase]:
    for path, field, status in ((TEI, "inputs", 424), (OPENAI, "input", 500), ("/v2/embed", "texts", 500)):
        for word in ("!raise", "!nan"):
            body = {field: ["a", f"{word} {path}"], "model": "fake"}
            yield ask(
                "poison", f"a text on which the engine fails, to {path}: {word}", path, body, status, server="faults"
            )


def all_cases() -> list[HttpCase]:
    """Most of them to /embed."""
    made = (encoding_cases, header_cases, framing_cases, poison_cases)
    return [case for cases in made for case in cases()]
