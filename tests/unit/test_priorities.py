"""Priorities and callers through the batcher: what runs beside what, and who is let in, on the virtual clock."""

import asyncio
import math

import pytest

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.server.options import Priority
from ml_inference_server.server.workers import Output
from ml_inference_server.utils.errors import Overloaded
from tests.conftest import virtual_time
from tests.unit.scheduler_kit import Rig, StubWorker, turns

BULK, INTERACTIVE = Priority.BULK, Priority.INTERACTIVE


class ExpressWorker(StubWorker):
    """May run one batch more than it has slots. A batch takes a second, a bulk one (first ids from 100 on) ten."""

    express_slots = 1

    async def run(self, batch: TokenBatch, limit_s: float = math.inf, *, is_bulk: bool = False) -> Output:
        ids = batch.ids[batch.starts[:-1]]
        self.takes_s = 10.0 if ids[0] >= 100 else 1.0
        return await super().run(batch, limit_s, is_bulk=is_bulk)


@virtual_time
async def test_an_interactive_batch_runs_beside_bulk_ones_that_hold_every_slot() -> None:
    rig = Rig(slots=2, worker=ExpressWorker)
    loop = asyncio.get_running_loop()
    jobs = [rig.call(*range(100 + 100 * n, 108 + 100 * n), asked=BULK) for n in range(4)]
    await turns()
    assert [len(batch) for batch in rig.worker.batches] == [8, 8]
    began_at = loop.time()
    assert await rig.call(1) == [1.0]
    assert loop.time() - began_at == 1.0
    assert await rig.call(2) == [2.0]  # the slot is free again
    assert loop.time() - began_at == 2.0
    await asyncio.gather(*jobs)
    assert loop.time() - began_at == 20.0  # bulk batches never hold it
    rig.assert_at_rest()


@virtual_time
async def test_the_worker_is_told_which_batches_are_bulk_also_of_those_that_are_tried_again() -> None:
    rig = Rig(slots=1, worker=ExpressWorker)
    rig.worker.raises = lambda ids: len(ids) > 1
    await asyncio.gather(rig.call(100, 101, asked=BULK), rig.call(1, 2, asked=INTERACTIVE))
    told = list(zip(rig.worker.batches, rig.worker.bulk, strict=True))
    assert sorted(told) == [
        ([1], False),
        ([1, 2], False),
        ([2], False),
        ([100], True),
        ([100, 101], True),
        ([101], True),
    ]


@virtual_time
async def test_only_one_batch_runs_beside_them() -> None:
    rig = Rig(slots=1, worker=ExpressWorker)
    rig.call(*range(100, 108), asked=BULK)
    await turns()
    first = rig.call(1)
    await turns()
    second, third = rig.call(2), rig.call(3)
    await turns()
    assert rig.worker.batches[1:] == [[1]]
    await asyncio.gather(first, second, third)
    assert rig.worker.batches[1:] == [[1], [2, 3]]


@virtual_time
async def test_nothing_runs_beside_an_interactive_batch() -> None:
    """Without bulk, the slots are what they always were."""
    rig = Rig(slots=1, worker=ExpressWorker)
    first = rig.call(1)
    await turns()
    second = rig.call(2)
    await turns()
    assert rig.worker.batches == [[1]]
    await asyncio.gather(first, second)


@virtual_time
async def test_an_express_batch_that_fails_gives_its_slot_back() -> None:
    rig = Rig(slots=1, worker=ExpressWorker)
    rig.call(*range(100, 108), asked=BULK)
    await turns()
    rig.worker.raises = lambda ids: 1 in ids
    with pytest.raises(Exception, match="twice"):
        await rig.call(1)
    assert await rig.call(2) == [2.0]
    rig.worker.raises = lambda ids: False


@virtual_time
async def test_a_request_of_more_than_a_batch_is_bulk_by_itself() -> None:
    rig = Rig(slots=1, worker=ExpressWorker)
    job = rig.call(*range(100, 140), tokens=5000)
    await turns()
    assert await rig.call(1) == [1.0]
    assert rig.worker.batches[1] == [1]
    await job


@virtual_time
async def test_a_caller_who_floods_costs_another_neither_his_place_nor_his_turn() -> None:
    rig = Rig(slots=1, worker=ExpressWorker, max_queue_requests=40)
    loop = asyncio.get_running_loop()
    flood = []
    for number in range(200):
        flood.append(rig.call(*range(100 + 8 * number, 108 + 8 * number), length=50, caller="flood"))
        await turns(1)
    await asyncio.sleep(115)  # a batch of it waited as interactive: 10 requests of 400 tokens
    for _ in range(20):
        began_at = loop.time()
        assert await rig.call(1, 2, 3, caller="other") == [1.0, 2.0, 3.0]
        assert loop.time() - began_at == 1.0
        await asyncio.sleep(3)
    outcomes = await asyncio.gather(*flood, return_exceptions=True)
    assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 160
    rig.assert_at_rest()
