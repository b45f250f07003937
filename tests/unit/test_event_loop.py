"""The server's event loop is what its measurements stand on."""

import asyncio
import time

from ml_inference_server.main import _EventLoop


def test_the_loops_clock_goes_on_within_a_turn() -> None:
    """uvloop's own does not: stage times would be whole milliseconds, and stale by up to a turn."""

    async def busy_turn() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        before, end = loop.time(), time.monotonic() + 0.0005
        while time.monotonic() < end:
            pass
        return before, loop.time()

    with asyncio.Runner(loop_factory=_EventLoop) as runner:
        before, after = runner.run(busy_turn())
    assert after - before >= 0.0005
    assert before <= after <= time.monotonic()
