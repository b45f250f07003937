"""When a refusal is told: at once, until there are too many."""

import asyncio
from itertools import pairwise

import pytest

from ml_inference_server.server.admission import Admission
from ml_inference_server.server.engine_rate import EngineRate
from ml_inference_server.server.refusals import RefusalPace
from ml_inference_server.utils.config import BatchingSettings
from ml_inference_server.utils.errors import InvalidRequest, Overloaded
from tests.conftest import virtual_time


@pytest.mark.parametrize(("cpus", "per_s"), [(1, 250), (2, 500), (4, 1000), (64, 1000)])
def test_up_to_a_rate_none_is_held(cpus: int, per_s: int) -> None:
    pace = RefusalPace(cpus)
    assert all(pace.wait_s(i / per_s, 60) == 0 for i in range(10 * per_s))


def test_a_burst_is_told_at_once() -> None:
    pace = RefusalPace(2)
    waits = [pace.wait_s(7.0, 60) for _ in range(60)]
    assert waits[:50] == [0.0] * 50
    assert waits[50:] == pytest.approx([0.002 * i for i in range(1, 11)])


def test_beyond_the_rate_they_are_told_one_after_the_other() -> None:
    pace = RefusalPace(2)
    told_at = [now + pace.wait_s(now, 60) for now in (0.001 * i for i in range(900))]
    gaps_s = [after - before for before, after in pairwise(told_at[200:])]
    assert gaps_s == pytest.approx([0.002] * len(gaps_s))


def test_callers_who_come_back_at_once_do_so_at_the_rate() -> None:
    pace, told = RefusalPace(2), 0
    due = [0.0] * 200
    while min(due) < 10:
        caller = due.index(min(due))
        due[caller] += pace.wait_s(due[caller], 60) + 0.001
        told += 1
    assert told == pytest.approx(10 * 500, rel=0.05)


def test_none_is_held_longer_than_a_second_or_half_of_its_time() -> None:
    pace = RefusalPace(1)
    waits = [pace.wait_s(0.0, 60) for _ in range(10_000)]
    assert max(waits) == waits[-1] == pytest.approx(1.0)
    assert pace.wait_s(0.0, 0.5) == 0.25


def test_a_flood_is_forgotten_a_second_after_it() -> None:
    pace = RefusalPace(1)
    for _ in range(10_000):
        pace.wait_s(0.0, 60)
    assert pace.wait_s(1.2, 60) == 0


@virtual_time
async def test_admission_holds_refusals_and_nothing_else() -> None:
    loop = asyncio.get_running_loop()
    settings = BatchingSettings(max_queue_requests=1, max_queue_tokens=256)
    admission = Admission(settings, EngineRate(), batch_tokens=64)
    began = loop.time()
    first = await admission.enter(10, began + 60)

    async def refused() -> float:
        with pytest.raises(Overloaded, match="retry in"):
            await admission.enter(10, began + 60)
        return loop.time() - began

    told_s = await asyncio.gather(*(refused() for _ in range(1000)))
    at_once = sum(told == 0 for told in told_s)
    assert 25 <= at_once <= 100
    assert max(told_s) <= 1
    with pytest.raises(InvalidRequest):
        await admission.enter(257, loop.time() + 60)
    admission.release(first)
    before = loop.time()
    await admission.enter(10, before + 60)
    assert loop.time() == before


@virtual_time
async def test_who_leaves_while_a_refusal_is_held_is_gone_at_once() -> None:
    loop = asyncio.get_running_loop()
    admission = Admission(BatchingSettings(max_queue_requests=1), EngineRate(), batch_tokens=64)
    await admission.enter(10, loop.time() + 60)
    calls = [asyncio.ensure_future(admission.enter(10, loop.time() + 60)) for _ in range(1000)]
    await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(each, asyncio.CancelledError) for each in ended) >= 900
    assert admission.requests == 1
