"""The end of calls: what a stop waits for before the process ends."""

import asyncio

from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.calls import Calls
from tests.conftest import virtual_time


def calls() -> Calls:
    return Calls(Metrics(window_s=30), default_timeout_s=60, prefix="test")


@virtual_time
async def test_a_stop_waits_for_the_answers_to_calls_that_are_open_and_not_for_later_ones() -> None:
    known = calls()
    sent = [known.opened() for _ in range(2)]
    waiting = asyncio.create_task(known.until_sent(60))
    await asyncio.sleep(1)
    later = known.opened()
    sent[0](None)
    await asyncio.sleep(1)
    assert not waiting.done()
    sent[1](None)
    await asyncio.sleep(1)
    assert waiting.done()
    later(None)


@virtual_time
async def test_a_stop_does_not_wait_for_ever_for_a_client_that_does_not_read() -> None:
    known = calls()
    known.opened()
    loop = asyncio.get_running_loop()
    before = loop.time()
    await known.until_sent(3)
    assert 3 <= loop.time() - before < 3.1


@virtual_time
async def test_a_stop_of_an_idle_server_waits_for_nothing() -> None:
    loop = asyncio.get_running_loop()
    before = loop.time()
    await calls().until_sent(3)
    assert loop.time() == before
