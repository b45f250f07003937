"""Questions and words between two processes' ends: both of them here, over a real pair of sockets."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ml_inference_server.utils.errors import Unavailable
from ml_inference_server.worker_processes.link import Link
from tests.conftest import until


class End:
    """answers: awaited before the next one is given. heard: its words, and the answers that `then` got."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.held = asyncio.Event()
        self.held.set()
        self.link = Link(self.answer, self.heard.append)

    async def answer(self, question: Any) -> Any:
        await self.held.wait()
        if question == "refused":
            raise ValueError("no such thing")
        if question == "broken":
            raise KeyError(question)
        return question * 2


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[tuple[End, End]]:
    ends = End(), End()
    pair = socket.socketpair()
    for each in pair:
        each.setblocking(False)
    running = [asyncio.create_task(end.link.run(its)) for end, its in zip(ends, pair, strict=True)]
    await ends[0].link.ready()
    await ends[1].link.ready()
    try:
        yield ends
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_both_ask_at_once_and_each_gets_its_own_answers() -> None:
    async with linked() as (mine, other):
        asked = [end.link.ask(number, 10) for number in range(200) for end in (mine, other)]
        assert await asyncio.gather(*asked) == [2 * number for number in range(200) for _ in range(2)]
        assert (mine.link.waiting, other.link.waiting) == (0, 0)


async def test_a_large_answer_arrives_whole() -> None:
    async with linked() as (mine, _):
        assert len(await mine.link.ask(b"x" * 3_000_000, 10)) == 6_000_000


async def test_a_refusal_is_told_and_a_fault_is_not_shown() -> None:
    async with linked() as (mine, _):
        with pytest.raises(ValueError, match="no such thing"):
            await mine.link.ask("refused", 10)
        with pytest.raises(RuntimeError, match="its log has the cause"):
            await mine.link.ask("broken", 10)
        assert await mine.link.ask("a", 10) == "aa"


async def test_who_takes_too_long_is_not_waited_for_and_its_answer_counts_when_it_comes() -> None:
    async with linked() as (mine, other):
        other.held.clear()
        with pytest.raises(Unavailable, match="has not answered for 0.01 s"):
            await mine.link.ask("a", 0.01, mine.heard.append)
        assert mine.link.waiting == 1
        other.held.set()
        other.link.tell("word")
        await until(lambda: len(mine.heard) == 2)
        assert sorted(mine.heard) == ["aa", "word"]
        assert mine.link.waiting == 0


async def test_an_end_that_closes_is_told_to_all_who_wait_and_to_who_asks_later() -> None:
    ends = End(), End()
    pair = socket.socketpair()
    pair[0].setblocking(False)
    running = asyncio.create_task(ends[0].link.run(pair[0]))
    await ends[0].link.ready()
    asked = asyncio.create_task(ends[0].link.ask("a", 60))
    await until(lambda: ends[0].link.waiting == 1)
    pair[1].close()
    with pytest.raises(Unavailable, match="has ended"):
        await asked
    await running
    with pytest.raises(Unavailable):
        await ends[0].link.ask("a", 60)
    with pytest.raises(Unavailable):
        ends[0].link.tell("a")
