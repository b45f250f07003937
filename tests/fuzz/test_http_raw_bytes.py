"""However the bytes of a right HTTP request are damaged, its head included: never a 5xx, never a hang, no noise."""

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.budget import BATCH, FACTOR, RAW_REQUESTS, fuzzing
from tests.fuzz.byte_damage import damaged
from tests.fuzz.http_bodies import dumped
from tests.fuzz.http_wire import GUARD_S, JSON_TYPE, Wire, http_request, quiet_wire
from tests.fuzz.on_loop import entered

# For an answer to what may not be a whole request; then the sender closes its side.
PATIENCE_S = 0.3
CLOSES = "Connection: close"
QUESTIONS = (
    "/",
    "/metrics",
    "/info",
    "/readyz",
    "/v1/models",
    "/openapi.json",
    "/api/v1/live",
    "/v2/models/fake/stats",
)
# Pieces that mean something to whoever parses HTTP.
PIECES = (
    *(b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b"chunked", b"Transfer-Encoding: chunked\r\n"),
    *(b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Host: evil.example\r\n", b"Expect: 100-continue\r\n"),
    *(
        b"Connection: keep-alive\r\n",
        b"Upgrade: h2c\r\n",
        b"HTTP/0.9",
        b"HTTP/2.0",
        b"%00",
        b"../",
        b"0\r\n\r\n",
        b"ffffffff\r\n",
    ),
    *(b"Content-Encoding: gzip\r\n", b"x-request-timeout-ms: 0\r\n", b"Content-Type: text/html\r\n", b"\xff\xfe"),
)


def right_requests(wire: Wire) -> list[bytes]:
    """To every route, in one piece and in chunks, and some of them one after another in one go."""
    asked = [http_request(path, b"", CLOSES, method=method) for path in QUESTIONS for method in ("GET", "HEAD")]
    for route in wire.routes:
        body = dumped({**route.examples[0], "model": wire.model} if route.examples else {})
        asked.append(http_request(route.path, body, JSON_TYPE, CLOSES))
        head = http_request(route.path, b"", JSON_TYPE, CLOSES).replace(
            b"Content-Length: 0", b"Transfer-Encoding: chunked"
        )
        asked.append(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        asked.append(http_request(route.path, body, JSON_TYPE) + http_request("/readyz", b"", CLOSES, method="GET"))
    return asked


@st.composite
def damaged_requests(draw: st.DrawFn, right: list[bytes]) -> bytes:
    raw = draw(st.sampled_from(right))
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            # Most of what can go wrong is in the head.
            place = draw(st.integers(0, min(len(raw), 250)))
            raw = raw[:place] + draw(st.sampled_from(PIECES)) + raw[place + draw(st.sampled_from([0, 0, 1, 10])) :]
        else:
            raw = draw(damaged(raw))
    return raw


async def exchange(port: int, request: bytes) -> bytes:
    """All that comes back. TimeoutError where the server does not end what the sender has ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(request)
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    while chunk := await reader.read(65_536):
                        received += chunk
            writer.write_eof()
            async with asyncio.timeout(GUARD_S):
                received += await reader.read()
    finally:
        writer.close()
    return received


def statuses(received: bytes) -> list[int]:
    """Of the answers in it, one behind another; those behind a stream without an end are not looked for."""
    found = []
    while answer := re.match(rb"HTTP/\d\.\d (\d{3}) .*?\r\n\r\n", received, re.DOTALL):
        found.append(int(answer[1]))
        length = re.search(rb"\r\ncontent-length: (\d+)\r\n", answer[0].lower())
        received = received[answer.end() + int(length[1] if length else 0) :]
    return found


def test_damaged_bytes(caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None]) -> None:
    seen: Counter[int] = Counter()
    sent = 0
    with asyncio.Runner() as runner, entered(runner, quiet_wire(caplog)) as wire:
        right = right_requests(wire)
        assert all(statuses(runner.run(exchange(wire.port, request))) for request in right), "else nothing is damaged"

        async def all_at_once(batch: list[bytes]) -> list[bytes]:
            return list(await asyncio.gather(*(exchange(wire.port, request) for request in batch)))

        @fuzzing(RAW_REQUESTS, 4 * BATCH)
        @given(st.lists(damaged_requests(right), min_size=4 * BATCH, max_size=4 * BATCH))
        def property_(batch: list[bytes]) -> None:
            nonlocal sent
            for request, received in zip(batch, runner.run(all_at_once(batch)), strict=True):
                found = statuses(received)
                assert b"Traceback" not in received, (request, received)
                assert all(status < 500 for status in found), (request, received)
                assert found or not received, (request, received)
                seen.update(found)
                sent += 1
            wire.server.backend.log.clear()

        property_()
    record_property("requests", sent)
    record_property("server_errors", sum(count for status, count in seen.items() if status >= 500))
    assert sent >= RAW_REQUESTS * FACTOR
    assert {200, 400, 404} <= set(seen)
