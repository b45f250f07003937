"""The clients' streams over connections that end, and with items that cannot be answered: neighbours are unharmed."""

import asyncio
import collections
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from ml_inference_server.api import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import fake_server, thread_names, until
from tests.integration.client_kit import client_of, collected, expected, odd_server, ones

Context = grpc.aio.ServicerContext[Any, Any]


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def answer_to(message: pb.EmbedStreamRequest) -> pb.EmbedStreamResponse:
    return pb.EmbedStreamResponse(id=message.id, response=ones(message.request))


def refusal_of(message: pb.EmbedStreamRequest, code: str, retry_after_ms: int = 0) -> pb.EmbedStreamResponse:
    number = grpc.StatusCode[code].value[0]
    error = pb.StreamError(code=number, reason="R", message="no", retry_after_ms=retry_after_ms)
    return pb.EmbedStreamResponse(id=message.id, error=error)


@pytest.mark.parametrize("code", ["UNAVAILABLE", "INTERNAL", "UNKNOWN", "OK"])
async def test_a_connection_that_ends_without_a_word_of_the_server_is_opened_again(kind: str, code: str) -> None:
    """As drains, proxies and resets end them, in the middle of the client's own writing."""
    opened = 0

    async def some(requests: AsyncIterator[pb.EmbedStreamRequest], context: Context) -> AsyncIterator[Any]:
        nonlocal opened
        opened += 1
        left = 3
        async for message in requests:
            yield answer_to(message)
            left -= 1
            if not left and code != "OK":
                await context.abort(grpc.StatusCode[code], "the connection ends")
            if not left:
                return

    async with odd_server(EmbedStream=some) as target, client_of(kind, target) as client:
        found = await collected(client.stream([(f"key {i}", f"text {i}") for i in range(30)], max_in_flight=8))
    assert set(found) == {f"key {i}" for i in range(30)}
    assert all(answer.error is None for answer in found.values())
    assert opened == 10


@pytest.mark.parametrize(
    ("code", "trailers"),
    [("UNAVAILABLE", (("grpc-retry-pushback-ms", "-1"),)), ("PERMISSION_DENIED", ()), ("UNIMPLEMENTED", ())],
)
async def test_a_refused_stream_is_not_opened_again(kind: str, code: str, trailers: Any) -> None:
    opened = 0

    async def refused(requests: Any, context: Context) -> AsyncIterator[Any]:
        nonlocal opened
        opened += 1
        await context.abort(grpc.StatusCode[code], "no", trailers)
        yield

    async with odd_server(EmbedStream=refused) as target, client_of(kind, target) as client:
        with pytest.raises(ServerError) as caught:
            await collected(client.stream(["a"]))
    assert (caught.value.code, opened) == (code, 1)


async def test_one_attempt_is_one_connection(kind: str) -> None:
    opened = 0

    async def ended(requests: Any, context: Context) -> AsyncIterator[Any]:
        nonlocal opened
        opened += 1
        await context.abort(grpc.StatusCode.UNAVAILABLE, "drained")
        yield

    async with odd_server(EmbedStream=ended) as target, client_of(kind, target, max_attempts=1) as client:
        with pytest.raises(UnavailableError):
            await collected(client.stream(["a"]))
    assert opened == 1


async def test_a_server_that_never_answers_is_given_up(kind: str) -> None:
    async def silent(requests: Any, context: Context) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    async with odd_server(EmbedStream=silent) as target, client_of(kind, target) as client:
        with pytest.raises(DeadlineExceededError, match=r"no answer came for 0\.2 s to any of 2 items"):
            await collected(client.stream(["a", "b"], timeout_s=0.2))


async def test_an_item_at_which_servers_end_is_given_up_and_the_others_are_answered(kind: str) -> None:
    seen: collections.Counter[str] = collections.Counter()

    async def fragile(requests: AsyncIterator[pb.EmbedStreamRequest], context: Context) -> AsyncIterator[Any]:
        async for message in requests:
            seen.update(message.request.texts)
            if message.request.texts[0] == "poison":
                yield answer_to(await anext(requests))
                await context.abort(grpc.StatusCode.UNAVAILABLE, "it crashed")
            yield answer_to(message)

    items = [("first", "a"), ("bad", "poison"), *((i, f"text {i}") for i in range(20))]
    async with odd_server(EmbedStream=fragile) as target, client_of(kind, target, max_attempts=3) as client:
        found = await collected(client.stream(items, max_in_flight=2))
    assert len(found) == 22
    assert [key for key, answer in found.items() if answer.error] == ["bad"]
    assert isinstance(found["bad"].error, UnavailableError)
    assert seen["poison"] == 3


async def test_a_refusal_is_repeated_only_when_the_server_names_a_time(kind: str) -> None:
    seen: collections.Counter[str] = collections.Counter()

    async def busy(requests: AsyncIterator[pb.EmbedStreamRequest], context: Context) -> AsyncIterator[Any]:
        async for message in requests:
            text = message.request.texts[0]
            seen[text] += 1
            if text == "later":
                again = seen[text] < 3
                yield refusal_of(message, "RESOURCE_EXHAUSTED", retry_after_ms=1) if again else answer_to(message)
            elif text == "always":
                yield refusal_of(message, "UNAVAILABLE", retry_after_ms=1)
            else:
                yield refusal_of(message, text, retry_after_ms=3_600_000 if text == "RESOURCE_EXHAUSTED" else 0)

    texts = ["later", "always", "UNAVAILABLE", "INTERNAL", "RESOURCE_EXHAUSTED"]
    async with odd_server(EmbedStream=busy) as target, client_of(kind, target, max_attempts=4) as client:
        found = await collected(client.stream([(text, text) for text in texts]))
    assert seen == {"later": 3, "always": 4, "UNAVAILABLE": 1, "INTERNAL": 1, "RESOURCE_EXHAUSTED": 1}
    assert [key for key, answer in found.items() if answer.error is None] == ["later"]


async def test_answers_that_nobody_asked_for_or_that_are_none_are_told_apart(kind: str) -> None:
    async def odd(requests: AsyncIterator[pb.EmbedStreamRequest], context: Context) -> AsyncIterator[Any]:
        async for message in requests:
            yield pb.EmbedStreamResponse(id=999, response=ones(message.request))
            if message.request.texts[0] == "short":
                yield pb.EmbedStreamResponse(id=message.id, response=ones(message.request, missing=1))
            elif message.request.texts[0] == "empty":
                yield pb.EmbedStreamResponse(id=message.id)
            else:
                yield answer_to(message)
                yield answer_to(message)

    async with odd_server(EmbedStream=odd) as target, client_of(kind, target) as client:
        found = await collected(client.stream([(text, text) for text in ("short", "fine", "empty", "well")]))
    reasons = {key: answer.error and answer.error.reason for key, answer in found.items()}
    assert reasons == {"short": "MALFORMED_ANSWER", "fine": None, "empty": "MALFORMED_ANSWER", "well": None}


async def test_an_item_that_cannot_be_sent_is_answered_with_its_error(kind: str) -> None:
    """Half a character, and more bytes than the server takes: that ends the connection of all."""
    texts: dict[str, Any] = {"a": "fine", "half": "\ud83d", "large": ["x" * 40_000] * 3, "b": "well"}
    limits = {"max_text_bytes": 65536, "max_message_bytes": 65536}
    async with fake_server(server=limits) as server, client_of(kind, server.address) as client:
        found = await collected(client.stream(texts.items()))
        assert isinstance(found["half"].error, InvalidRequestError)
        assert isinstance(found["large"].error, OverloadedError)
        for key in ("a", "b"):
            np.testing.assert_array_equal(found[key].embeddings, expected([texts[key]]))
        assert set(found) == set(texts)


async def test_nonsense_is_refused_when_it_is_given(kind: str) -> None:
    async with client_of(kind, "127.0.0.1:1") as client:
        with pytest.raises(ValueError, match="max_in_flight: expected 1 or more, not 0"):
            client.client.stream(["a"], max_in_flight=0)
        with pytest.raises(ValueError, match="timeout_s"):
            client.client.stream(["a"], timeout_s=float("nan"))
        with pytest.raises(TypeError, match=r"texts\[0\]: expected a str, not int"):
            await collected(client.stream([[1]]))


async def test_a_connection_that_ends_while_nothing_is_asked_is_no_failure(kind: str) -> None:
    """Servers and proxies close idle connections; the next item opens another one, even with a single attempt."""
    closed = asyncio.Event()

    async def short(requests: AsyncIterator[pb.EmbedStreamRequest], context: Context) -> AsyncIterator[Any]:
        yield answer_to(await anext(requests))
        asyncio.get_running_loop().call_soon(closed.set)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "idle")

    loop = asyncio.get_running_loop()

    def items() -> Iterator[str]:
        for i in range(3):
            if i:
                asyncio.run_coroutine_threadsafe(closed.wait(), loop).result()
                closed.clear()
            yield f"text {i}"

    async def awaited() -> AsyncIterator[str]:
        for i in range(3):
            if i:
                await closed.wait()
                closed.clear()
            yield f"text {i}"

    async with odd_server(EmbedStream=short) as target, client_of(kind, target) as client:
        assert set(await collected(client.stream(items() if client.is_sync else awaited()))) == {0, 1, 2}


async def test_leaving_early_leaves_nothing_behind(kind: str) -> None:
    async with fake_server() as server, client_of(kind, server.address) as client:
        answers = client.stream((f"text {i}" for i in range(10_000)), max_in_flight=4)
        async for _ in answers:
            break
        await answers.aclose()
        await until(lambda: not any(name.startswith("client-") for name in thread_names()))
        assert not any("AsyncAnswerStream" in str(task.get_coro()) for task in asyncio.all_tasks())
