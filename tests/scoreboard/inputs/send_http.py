"""Sends a case over HTTP and holds what comes back against what is written down."""

import asyncio
import contextlib
import itertools
import json

from tests.fuzz.http_wire import JSON_TYPE, Connection, http_request, read_reply
from tests.integration.http_kit import HttpReply
from tests.scoreboard.inputs.case import HANGS_UP, LIMIT_S, HttpCase
from tests.scoreboard.inputs.http_json import tei_vectors
from tests.scoreboard.inputs.send_grpc import check_sentence

_NOTHING = HttpReply(HANGS_UP, {}, b"")
# The HTTP library repeats the line that it cannot read, which is no longer than a line may be.
_MOST_OF_LIBRARY = 9000


class HttpSender:
    """Each case over a connection of its own; the question whether all is well over one that stays."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._well = Connection(port)
        self._numbers = itertools.count()

    async def close(self) -> None:
        await self._well.close()

    async def send(self, case: HttpCase) -> HttpReply:
        """TimeoutError where no end comes. Its status is HANGS_UP where the server says nothing before it closes."""
        async with asyncio.timeout(LIMIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                with contextlib.suppress(ConnectionError):  # refused before it was all sent: the answer says why
                    writer.write(case.request)
                    if case.ends:
                        writer.write_eof()
                    await writer.drain()
                if case.request.startswith(b"HEAD "):
                    status_line = await reader.readline()
                    return HttpReply(int(status_line.split()[1]), {}, b"")
                try:
                    return await read_reply(reader)
                except asyncio.IncompleteReadError as error:
                    if error.partial:
                        raise AssertionError(f"half an answer: {error.partial[:100]!r}") from None
                    return _NOTHING
                except ConnectionError:
                    return _NOTHING
            finally:
                writer.close()

    async def check_well(self, is_cross_encoder: bool) -> None:
        """AssertionError unless a right request is answered rightly."""
        text = f"are you well {next(self._numbers)}"
        if is_cross_encoder:
            body = json.dumps({"query": "q", "texts": [text]}).encode()
            reply = await self._well.ask(http_request("/rerank", body, JSON_TYPE))
            assert reply.status == 200, reply
            return
        body = json.dumps({"inputs": text}).encode()
        reply = await self._well.ask(http_request("/embed", body, JSON_TYPE))
        assert reply.status == 200, reply
        tei_vectors(text)(reply)


def check(case: HttpCase, reply: HttpReply) -> None:
    """AssertionError unless it is what the case says."""
    sentence = "" if reply.status < 400 or not reply.body else sentence_of(reply)
    assert reply.status == case.status, f"{reply.status} ({sentence}), {case.status} expected"
    if reply.status >= 400 and not case.request.startswith(b"HEAD "):
        check_sentence(sentence, *(() if _is_json(reply) else (_MOST_OF_LIBRARY,)))
        assert case.says in sentence, f"{sentence!r}, expected {case.says!r} in it"
    if case.right is not None:
        case.right(reply)


def sentence_of(reply: HttpReply) -> str:
    """Of a refusal, in whichever form its dialect writes it; what the HTTP library refuses is plain text."""
    if not _is_json(reply):
        return " ".join(reply.body.decode().split())
    content = reply.json
    told = content.get("error", content)
    message = told.get("message") if isinstance(told, dict) else told
    assert isinstance(message, str), f"no sentence in {content}"
    return message


def _is_json(reply: HttpReply) -> bool:
    return reply.headers.get("content-type", "").startswith("application/json")
