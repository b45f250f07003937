"""The body of a request: bounded in bytes and time, and sound JSON, before anybody looks into it."""

import asyncio
import json
from typing import Any, NoReturn

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from ml_inference_server.utils.errors import BodyRefused, InvalidRequest

# From the headers to the last byte of a body, and less where its caller has less time: a slow sender must not hold a
# connection for ever.
BODY_TIMEOUT_S = 30.0
# Far more lists and objects than any request needs. Those of a large body that is made of nothing else would keep
# Python's garbage collector, and with it all other requests, busy for many seconds.
_MOST_BRACKETS = 1_000_000


async def read_body(request: web.Request, most_bytes: int, timeout_s: float) -> bytes:
    """All of it. BodyRefused for one that is too long, too slow, compressed, or broken."""
    encodings = request.headers.getall("Content-Encoding", [])
    if any(encoding.lower() != "identity" for encoding in encodings):
        raise BodyRefused("compressed bodies are not taken: send it without Content-Encoding", reason="BODY_TYPE")
    told = request.content_length
    if told is not None and told > most_bytes:
        raise _too_long(most_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            while chunk := await request.content.readany():
                size += len(chunk)
                if size > most_bytes:
                    raise _too_long(most_bytes)
                chunks.append(chunk)
    except TimeoutError:
        message = f"the body did not arrive within {round(timeout_s, 3):g} s"
        raise BodyRefused(message, reason="BODY_TOO_SLOW") from None
    except (HttpProcessingError, web.RequestPayloadError, ConnectionError):
        raise BodyRefused("the body is broken or ended too soon") from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_long(most_bytes: int) -> BodyRefused:
    return BodyRefused(
        f"the body has more than {most_bytes} bytes: send several requests, or raise server.max_message_bytes",
        reason="BODY_TOO_LONG",
    )


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. InvalidRequest for anything else, a key that stands twice, and NaN.

    Python's own parser, because it can see a key that stands twice: the second would hide the first without a word.
    """
    if body.count(b"[") + body.count(b"{") > _MOST_BRACKETS:
        raise _malformed(f"the body has more than {_MOST_BRACKETS} opening brackets: send several requests")
    try:
        parsed = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise _malformed("the body is not UTF-8") from None
    except RecursionError:
        raise _malformed("the body is nested too deeply") from None
    except ValueError as error:
        raise _malformed(f"the body is not valid JSON: {_safe(str(error))}") from None
    if not isinstance(parsed, dict):
        raise _malformed("the body must be a JSON object")
    return parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _malformed(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="MALFORMED_REQUEST")


def _safe(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:200]
