"""Reading and answering streams of messages; which RPC they belong to is none of its business."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from google.protobuf.message import Message

from ml_inference_server.utils.errors import InvalidRequest, ServiceError, Unavailable

# Unanswered messages of one stream; beyond it the server stops reading, which the client feels as flow control.
MAX_STREAM_IN_FLIGHT = 64


async def next_or_none(messages: AsyncIterator[Any], draining: asyncio.Task[Any]) -> Any:
    """The next message; None at the end of the stream or when the server drains."""
    following = asyncio.ensure_future(anext(messages, None))
    try:
        await asyncio.wait({following, draining}, return_when=asyncio.FIRST_COMPLETED)
        return following.result() if following.done() else None
    finally:
        following.cancel()


async def answer_in_order(
    messages: AsyncIterator[Any],
    answer: Callable[[Any], Awaitable[Message]],
    write: Callable[[Message], Awaitable[None]],
    draining: asyncio.Event,
) -> None:
    """One answer for each message, in their order, while later ones are worked on.

    The first message that fails ends it: its error is raised once all before it are answered, and those behind it are
    given up. When the server drains, what was read is answered, then it ends with Unavailable.
    """
    pending: asyncio.Queue[asyncio.Task[Message | ServiceError] | ServiceError | None]
    pending = asyncio.Queue(MAX_STREAM_IN_FLIGHT)

    async def outcome(message: Any) -> Message | ServiceError:
        try:
            return await answer(message)
        except ServiceError as error:
            return error

    async def read() -> None:
        drained = asyncio.create_task(draining.wait())
        try:
            while (message := await next_or_none(messages, drained)) is not None:
                await pending.put(group.create_task(outcome(message)))
        except ServiceError as error:  # a message that is none
            await pending.put(error)
        finally:
            drained.cancel()
        await pending.put(None)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            while (item := await pending.get()) is not None:
                result = await item if isinstance(item, asyncio.Task) else item
                if isinstance(result, ServiceError):
                    raise result
                await write(result)
    except BaseExceptionGroup as errors:
        refused = errors.subgroup(ServiceError)
        if refused is None:
            raise
        raise refused.exceptions[0] from None
    if draining.is_set():
        raise Unavailable("the server is shutting down; open the stream to another one")


async def collect(messages: AsyncIterator[Any], *, max_messages: int, max_bytes: int) -> list[Any]:
    """All messages of a stream that is answered once. InvalidRequest where they are more than one request may hold."""
    found: list[Any] = []
    size = 0
    async for message in messages:
        found.append(message)
        size += message.ByteSize()
        if len(found) > max_messages:
            raise InvalidRequest(f"more than {max_messages} messages: open several streams", reason="TOO_MANY_TEXTS")
        if size > max_bytes:
            raise InvalidRequest(
                f"the messages have more than {max_bytes} bytes together: open several streams", reason="TOO_MANY_TEXTS"
            )
    return found
