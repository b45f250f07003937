"""An exception in the batching, at each of its lines in turn: nobody is left waiting, and the next call is answered.

The clock jumps; whoever is forgotten meets his deadline of an hour.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ml_inference_server.server import batch_runner, batching, engine_rate, out_of_memory, pending, scheduler
from ml_inference_server.server import turns as turns_of_callers
from ml_inference_server.server.batching import BatchQueue
from ml_inference_server.server.health import INTERVAL_S
from ml_inference_server.utils.errors import BackendFailure, ServiceError
from tests.conftest import virtual_time
from tests.faults.planted import Planted, Planter
from tests.unit.scheduler_kit import POISON, Rig, turns

FILES = frozenset(
    Path(str(module.__file__))
    for module in (scheduler, batching, batch_runner, pending, engine_rate, out_of_memory, turns_of_callers)
)
_LEAST_LINES = 250


@contextlib.asynccontextmanager
async def looked_after(rig: Rig) -> AsyncIterator[None]:
    """As the health does it."""

    async def look() -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            rig.batcher.look_after()

    task = asyncio.create_task(look())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def outcomes_of_calls(rig: Rig) -> list[list[float] | BaseException]:
    """Of calls that wait, share a text, run together, fail, and leave."""
    rig.worker.gate.clear()
    calls = [rig.call(1)]
    await turns()
    calls += [rig.call(2), rig.call(2, 3), rig.call(POISON), rig.call(*range(4, 14))]
    leaving = rig.call(20)
    await turns()
    leaving.cancel()
    rig.worker.gate.set()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    await asyncio.gather(leaving, return_exceptions=True)
    return outcomes


def fault_of(outcome: object) -> str:
    """Empty for rows, and for the one error that a bug of the server is told as."""
    if not isinstance(outcome, BaseException):
        return ""
    told = isinstance(outcome, Planted | BackendFailure) or type(outcome) is ServiceError
    return "" if told else repr(outcome)


@virtual_time
async def test_an_exception_at_any_line_leaves_nobody_waiting_and_holds_nothing() -> None:
    met, rig = Planter(FILES), Rig(max_batch_size=4)
    with met.at_work():
        await outcomes_of_calls(rig)
    assert len(met.lines) > _LEAST_LINES
    faults = []
    for line in met.lines:
        rig = Rig(max_batch_size=4)
        planter = Planter(FILES, line)
        async with looked_after(rig):
            with planter.at_work():
                outcomes = await outcomes_of_calls(rig)
            assert planter.has_raised, line
            faults += [f"{line}: {fault}" for outcome in outcomes if (fault := fault_of(outcome))]
            if await rig.call(30) != [30.0]:
                faults.append(f"{line}: a wrong answer")
            await turns()
        if (rig.queue(), rig.admission.requests, rig.admission.reserved_tokens) != ((0, 0, 0), 0, 0):
            faults.append(f"{line}: {rig.queue()} is left, {rig.admission.reserved_tokens} tokens are held")
    assert faults == []


@virtual_time
async def test_a_policy_that_always_fails_is_counted_until_a_batch_succeeds() -> None:
    """Health goes by this count: a server whose every answer is an error must not be sent calls."""
    rig = Rig()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchQueue, "next_batch", lambda queue, *_: [][0])  # an IndexError
        for _ in range(3):
            with pytest.raises(ServiceError, match="internal error"):
                await rig.call(1)
    assert rig.batcher.failures_in_a_row == 3
    await rig.call(1)
    assert rig.batcher.failures_in_a_row == 0
