"""Rows out of the cache: what a request gets without the model, and what it still has to wait for."""

import asyncio

import pytest

from ml_inference_server.utils.errors import Unavailable
from tests.conftest import virtual_time
from tests.unit.scheduler_kit import Rig, busy_rig, counter, text, turns


@virtual_time
async def test_a_text_that_was_computed_is_answered_out_of_the_cache_without_a_queue() -> None:
    rig = Rig(cache_bytes=10**6)
    assert await rig.call(1, 2) == [1.0, 2.0]
    rig.worker.gate.clear()
    busy = rig.call(9)
    await turns()
    now = asyncio.get_running_loop().time()
    answer = await rig.compute(text(2), text(1), text(2))
    assert answer.rows[:, 0].tolist() == [2, 1, 2]
    assert tuple(answer)[1:4] == (now, now, now)
    assert (answer.shared, answer.cached) == (0, 3)
    assert [counter(rig, f"mlis_cache_{name}_total") for name in ("hits", "misses")] == [3, 3]
    assert rig.cache is not None
    assert counter(rig, "mlis_cache_bytes") == rig.cache.held_bytes > 0
    rig.worker.gate.set()
    await busy
    rig.assert_at_rest()


@virtual_time
async def test_what_the_cache_lacks_is_computed_and_joined_with_what_it_has() -> None:
    rig, first = busy_rig(cache_bytes=10**6)
    rig.worker.gate.set()
    await first
    rig.worker.takes_s = 5.0
    other = rig.call(1)
    await turns()
    began = asyncio.get_running_loop().time()
    answer = await rig.compute(text(2), text(9), text(1))
    assert answer.rows[:, 0].tolist() == [2, 9, 1]
    assert (answer.shared, answer.cached) == (1, 1)
    assert tuple(answer)[1:4] == pytest.approx((began, began, began + 10))
    assert rig.worker.batches == [[9], [1], [2]]
    await other
    rig.assert_at_rest()


@virtual_time
async def test_what_a_caller_does_with_rows_is_no_matter_of_the_cache() -> None:
    rig = Rig(cache_bytes=10**6)
    for _ in range(3):  # computed, then twice out of the cache
        answer = await rig.compute(text(1))
        assert answer.rows.tolist() == [[1.0]]
        answer.rows[:] = -1
    assert rig.worker.batches == [[1]]


@virtual_time
async def test_texts_that_share_nothing_with_each_other_share_the_cache() -> None:
    rig = Rig(cache_bytes=10**6, enabled=False)
    assert list(await asyncio.gather(rig.call(1), rig.call(1))) == [[1.0], [1.0]]
    assert rig.worker.batches == [[1], [1]]
    assert (await rig.compute(text(1))).cached == 1
    rig.assert_at_rest()


@virtual_time
async def test_who_asks_for_a_fresh_row_makes_the_model_run() -> None:
    rig = Rig(cache_bytes=10**6)
    assert await rig.call(1) == [1.0]
    assert (await rig.compute(text(1), fresh=True)).cached == 0
    assert rig.worker.batches == [[1], [1]]
    assert [counter(rig, f"mlis_cache_{name}_total") for name in ("hits", "misses")] == [0, 1]
    assert (await rig.compute(text(1))).cached == 1
    rig.assert_at_rest()


@virtual_time
async def test_an_answer_that_the_cache_has_is_given_by_a_server_that_closes_no_more_than_others() -> None:
    rig = Rig(cache_bytes=10**6)
    await rig.call(1)
    rig.batcher.close()
    with pytest.raises(Unavailable):
        await rig.call(1)
