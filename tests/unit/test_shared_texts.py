"""Equal texts in flight are computed once, and nobody is worse off for it: one test for each way to be.

The clock jumps instead of ticking, see scheduler_kit.
"""

import asyncio
from typing import Any

import numpy as np
import pytest

from ml_inference_server.server.batching import BatchQueue
from ml_inference_server.utils.errors import (
    BackendFailure,
    DeadlinePassed,
    NonFiniteOutput,
    Overloaded,
    ServiceError,
    Unavailable,
)
from tests.conftest import virtual_time
from tests.unit.scheduler_kit import POISON, Rig, busy_rig, counter, text, turns

# Computed once


@virtual_time
async def test_equal_texts_that_wait_are_computed_once_and_each_request_gets_rows_of_its_own() -> None:
    rig, first = busy_rig()
    await turns()
    calls = [rig.compute(text(1), text(2)), rig.compute(text(2), text(3)), rig.compute(text(2))]
    await turns()
    assert rig.queue() == (3, 9, 1)
    rig.worker.gate.set()
    answers = await asyncio.gather(*calls)
    assert [answer.rows[:, 0].tolist() for answer in answers] == [[1, 2], [2, 3], [2]]
    answers[0].rows[:] = -1  # what one does with its rows is no matter of the others
    assert [answer.rows[:, 0].tolist() for answer in answers[1:]] == [[2, 3], [2]]
    assert rig.worker.batches == [[9], [1, 2, 3]]
    assert [answer.shared for answer in answers] == [0, 1, 1]
    assert counter(rig, "mlis_shared_texts_total") == 2
    assert rig.metrics.snapshot()["totals"]["shared_texts"] == 2
    await first
    rig.assert_at_rest()


@virtual_time
async def test_a_text_that_is_being_computed_is_not_computed_again() -> None:
    rig = Rig()
    rig.worker.gate.clear()
    first = rig.call(1, 2)
    await turns()
    second = rig.compute(text(2))
    await turns()
    assert rig.queue() == (0, 0, 1)
    rig.worker.gate.set()
    assert (await first, (await second).rows[:, 0].tolist(), (await second).shared) == ([1.0, 2.0], [2.0], 1)
    assert rig.worker.batches == [[1, 2]]
    assert await rig.call(2) == [2.0]  # it is over: nothing is kept
    assert rig.worker.batches == [[1, 2], [2]]
    rig.assert_at_rest()


@virtual_time
async def test_equal_texts_of_one_request_are_computed_once_and_count_as_shared_with_nobody() -> None:
    rig = Rig()
    answer = await rig.compute(text(1), text(2), text(1), text(1))
    assert (answer.rows[:, 0].tolist(), answer.shared) == ([1, 2, 1, 1], 0)
    assert rig.worker.batches == [[1, 2]]
    rig.assert_at_rest()


@virtual_time
async def test_texts_that_differ_in_length_segments_or_variant_are_not_equal() -> None:
    rig, first = busy_rig()
    await turns()
    plain = text(1)
    segments = type(plain)(plain.ids, np.array([0, 1, 1], np.int32))
    variant = type(plain)(plain.ids, variant=1)
    calls = [rig.compute(each) for each in (plain, text(1, 4), segments, variant)]
    rig.worker.gate.set()
    assert [(await each).shared for each in calls] == [0, 0, 0, 0]
    assert rig.worker.batches == [[9], [1, 1, 1, 1]]
    await first


@pytest.mark.parametrize("off", [{"enabled": False}, {"share_equal_texts": False}], ids=str)
def test_nothing_is_shared_where_it_is_off(off: dict[str, Any]) -> None:
    @virtual_time
    async def check() -> None:
        rig, first = busy_rig(**off)
        await turns()
        calls = [rig.compute(text(1)) for _ in range(3)]
        rig.worker.gate.set()
        assert [(await each).shared for each in calls] == [0, 0, 0]
        assert sum(batch.count(1) for batch in rig.worker.batches) == 3
        assert counter(rig, "mlis_shared_texts_total") == 0
        await first
        rig.assert_at_rest()

    check()


# Turns and waits


@virtual_time
async def test_a_query_that_equals_a_late_text_of_a_bulk_request_is_served_at_its_own_turn() -> None:
    rig, first = busy_rig(max_batch_size=4)
    await turns()
    bulk = rig.call(*range(100, 220))
    await turns()
    query = rig.call(219)  # of the 30th portion
    await turns()
    rig.worker.gate.set()
    assert await query == [219.0]
    served = next(place for place, batch in enumerate(rig.worker.batches) if 219 in batch)
    assert served <= 2  # behind the running batch and the portion that came before it
    assert await bulk == [float(i) for i in range(100, 220)]
    assert sum(batch.count(219) for batch in rig.worker.batches) == 1
    await first
    rig.assert_at_rest()


@virtual_time
async def test_who_joins_a_window_does_not_open_it_anew() -> None:
    rig = Rig(timeout_s=2.0)
    loop = asyncio.get_running_loop()
    began = loop.time()
    first = rig.call(1)
    await asyncio.sleep(1.5)
    second = rig.call(1)
    assert list(await asyncio.gather(first, second)) == [[1.0], [1.0]]
    assert loop.time() - began == pytest.approx(2.0)


@virtual_time
async def test_the_times_of_who_joins_a_running_batch_follow_each_other() -> None:
    rig = Rig()
    rig.worker.takes_s = 10.0
    began = asyncio.get_running_loop().time()
    first = rig.compute(text(1))
    await asyncio.sleep(4)
    second = rig.compute(text(1))
    leading, following = await first, await second
    assert tuple(leading)[1:4] == pytest.approx((began, began, began + 10))
    assert tuple(following)[1:4] == pytest.approx((began + 4, began + 4, began + 10))


@virtual_time
async def test_the_times_of_who_joins_after_the_engine_ended_follow_each_other() -> None:
    """The loop had not been told yet."""
    rig = Rig()
    rig.worker.takes_s, rig.worker.ready_s = 1.0, 10.0
    began = asyncio.get_running_loop().time()
    first = rig.compute(text(1))
    await asyncio.sleep(4)
    second = rig.compute(text(1))
    leading, following = await first, await second
    assert tuple(leading)[1:4] == pytest.approx((began, began, began + 1))
    assert tuple(following)[1:4] == pytest.approx((began + 4, began + 4, began + 4))


@virtual_time
async def test_a_request_with_texts_in_two_batches_starts_with_the_first_and_ends_with_the_last() -> None:
    rig = Rig()
    rig.worker.takes_s = 10.0
    began = asyncio.get_running_loop().time()
    first = rig.compute(text(1))
    await asyncio.sleep(4)
    second = rig.compute(text(1), text(2))
    await first
    assert tuple(await second)[1:4] == pytest.approx((began + 4, began + 4, began + 20))


@virtual_time
async def test_each_who_waits_for_a_text_has_his_own_wait_in_the_metrics() -> None:
    rig, first = busy_rig()
    await asyncio.sleep(1)
    second = rig.call(1)
    await asyncio.sleep(3)
    third = rig.call(1)
    await asyncio.sleep(2)
    rig.worker.gate.set()
    await asyncio.gather(first, second, third)
    batch = rig.metrics.snapshot()["batch"]
    assert batch["mean_size"] == 1
    assert batch["mean_queue_ms"] == pytest.approx(1e3 * (0 + 5 + 2) / 3)


# Who leaves takes only his own


@pytest.mark.parametrize("leaver", [0, 1, 2])
@pytest.mark.parametrize("is_running", [False, True])
def test_one_who_leaves_harms_none_of_the_others(leaver: int, is_running: bool) -> None:
    @virtual_time
    async def check() -> None:
        rig = Rig()
        rig.worker.gate.clear()
        first = None if is_running else rig.call(9)
        await turns()
        calls = [rig.call(1) for _ in range(3)]
        await turns()
        calls[leaver].cancel()
        await turns()
        rig.worker.gate.set()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(outcomes.pop(leaver), asyncio.CancelledError)
        assert outcomes == [[1.0], [1.0]]
        assert rig.worker.batches == ([[1]] if is_running else [[9], [1]])
        if first is not None:
            await first
        rig.assert_at_rest()

    check()


@pytest.mark.parametrize("is_running", [False, True])
@pytest.mark.parametrize("first_is_late", [False, True])
def test_each_has_his_own_deadline(is_running: bool, first_is_late: bool) -> None:
    @virtual_time
    async def check() -> None:
        rig = Rig()
        rig.worker.gate.clear()
        first = None if is_running else rig.call(9)
        await turns()
        loop = asyncio.get_running_loop()
        began = loop.time()
        patience_s = [5.0, 50.0] if first_is_late else [50.0, 5.0]
        calls = [rig.call(1, timeout_s=patience_s[0])]
        await turns()
        calls.append(rig.call(1, timeout_s=patience_s[1]))
        late, other = (calls[0], calls[1]) if first_is_late else (calls[1], calls[0])
        with pytest.raises(DeadlinePassed, match="while the request ran" if is_running else "in the queue"):
            await late
        assert loop.time() - began == pytest.approx(5)
        rig.worker.gate.set()
        assert await other == [1.0]
        if first is not None:
            await first
        rig.assert_at_rest()

    check()


@virtual_time
async def test_a_text_that_nobody_waits_for_any_more_is_never_computed_and_a_new_one_is() -> None:
    rig, first = busy_rig()
    await turns()
    calls = [rig.call(1), rig.call(1)]
    await turns()
    for call in calls:
        call.cancel()
    await turns()
    assert (rig.queue(), rig.admission.reserved_tokens) == ((0, 0, 1), 0)
    rig.worker.gate.set()
    await first
    assert rig.worker.batches == [[9]]
    assert await rig.call(1) == [1.0]
    rig.assert_at_rest()


@virtual_time
async def test_who_comes_while_a_text_runs_that_all_have_left_gets_its_row() -> None:
    rig = Rig()
    rig.worker.gate.clear()
    leaving = rig.call(1)
    await turns()
    leaving.cancel()
    await turns()
    coming = rig.call(1)
    await turns()
    rig.worker.gate.set()
    assert await coming == [1.0]
    assert rig.worker.batches == [[1]]
    rig.assert_at_rest()


@virtual_time
async def test_the_error_of_one_text_takes_a_request_out_of_its_other_texts_and_nobody_else() -> None:
    rig, first = busy_rig(max_batch_size=1)
    await turns()
    guilty = rig.call(POISON, 1)
    await turns()
    innocent = rig.call(1)
    await turns()
    rig.worker.gate.set()
    outcomes = await asyncio.gather(guilty, innocent, return_exceptions=True)
    assert isinstance(outcomes[0], BackendFailure)
    assert outcomes[1] == [1.0]
    assert rig.worker.batches == [[9], [POISON], [POISON], [1]]
    await first
    rig.assert_at_rest()


# Who pays


@virtual_time
async def test_the_tokens_of_a_text_are_held_once_by_one_who_still_waits_for_it() -> None:
    rig, first = busy_rig()
    await turns()
    assert rig.admission.reserved_tokens == 0
    held = rig.admission
    calls = [rig.call(1), rig.call(1, 2), rig.call(1, 3)]
    await turns()
    assert held.reserved_tokens == 9
    calls[0].cancel()  # the second takes over
    await turns()
    assert held.reserved_tokens == 9
    calls[1].cancel()  # the third does; 2 is not wanted any more
    await turns()
    assert held.reserved_tokens == 6
    late = rig.call(1)
    await turns()
    assert held.reserved_tokens == 6
    calls[2].cancel()
    await turns()
    assert held.reserved_tokens == 3
    rig.worker.gate.set()
    assert await late == [1.0]
    await first
    rig.assert_at_rest()


@pytest.mark.parametrize("turns_later", range(8))
def test_who_leaves_as_a_batch_takes_the_text_leaves_the_tokens_of_the_others_alone(turns_later: int) -> None:
    """In one of these turns of the loop a batch has the text, and its task has not begun."""

    @virtual_time
    async def check() -> None:
        rig, first = busy_rig(max_batch_size=1)
        await turns()
        leaving = rig.call(1)
        await turns()
        staying = rig.call(1, 2)
        await turns()
        assert rig.admission.reserved_tokens == 6
        rig.worker.takes_s = 1.0
        rig.worker.gate.set()
        await asyncio.sleep(1.0)
        await turns(turns_later)
        leaving.cancel()
        await asyncio.sleep(0.5)
        assert rig.worker.batches == [[9], [1]]
        assert rig.admission.reserved_tokens == 3
        assert await staying == [1.0, 2.0]
        await first
        rig.assert_at_rest()

    check()


@virtual_time
async def test_many_requests_for_one_text_take_no_more_room_than_one_does() -> None:
    rig, first = busy_rig(max_queue_tokens=256)
    await turns()
    calls = []
    for _ in range(10):  # each is let in for what it would cost alone, and then shrinks
        calls.append(rig.compute(text(1, 100)))
        await turns()
    assert rig.admission.reserved_tokens == 100
    calls.append(rig.compute(text(2, 100)))
    await turns()
    with pytest.raises(Overloaded):
        await rig.compute(text(3, 100))
    rig.worker.gate.set()
    await asyncio.gather(first, *calls)
    assert rig.worker.batches == [[9], [1, 2]]
    rig.assert_at_rest()


# What fails, fails for all who wait for it


@virtual_time
async def test_all_who_wait_for_a_text_that_fails_get_an_error_of_their_own() -> None:
    rig, first = busy_rig()
    await turns()
    calls = [rig.call(POISON), rig.call(POISON, 1), rig.call(1)]
    await turns()
    rig.worker.gate.set()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BackendFailure, BackendFailure, list]
    assert outcomes[0] is not outcomes[1]
    for _ in range(2):  # nothing of it is kept: the next ones are tried again
        again = await asyncio.gather(rig.call(POISON), rig.call(POISON), return_exceptions=True)
        assert [type(outcome) for outcome in again] == [BackendFailure, BackendFailure]
    assert sum(batch.count(POISON) for batch in rig.worker.batches) == 3 + 2 + 2
    assert rig.batcher.failures_in_a_row == 2  # texts that failed, not requests
    await first
    rig.assert_at_rest()


@virtual_time
async def test_who_joins_while_a_batch_is_halved_gets_his_row() -> None:
    rig = Rig()
    rig.worker.takes_s = 1.0
    calls = [rig.call(i) for i in (POISON, 1, 2, 3)]
    await asyncio.sleep(1.5)  # the first half runs
    assert rig.worker.batches == [[POISON, 1, 2, 3], [POISON, 1]]
    joining = [rig.call(i) for i in (POISON, 1, 2, 3)]
    outcomes = await asyncio.gather(*calls, *joining, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == 2 * [BackendFailure, list, list, list]
    assert outcomes[5:] == [[1.0], [2.0], [3.0]]
    assert rig.worker.batches == [[POISON, 1, 2, 3], [POISON, 1], [POISON], [POISON], [1], [2, 3]]
    rig.assert_at_rest()


@virtual_time
async def test_nobody_joins_a_text_that_was_given_up_while_its_batch_was_halved() -> None:
    rig = Rig()
    rig.worker.takes_s = 1.0
    leaving, bad, good = rig.call(1), rig.call(POISON), rig.call(2)
    await turns()
    assert rig.worker.batches == [[1, POISON, 2]]
    leaving.cancel()
    await asyncio.sleep(1.5)  # the retry runs without it
    coming = rig.call(1)
    assert await coming == [1.0]
    outcomes = await asyncio.gather(bad, good, return_exceptions=True)
    assert isinstance(outcomes[0], BackendFailure)
    assert outcomes[1] == [2.0]
    assert sum(batch.count(1) for batch in rig.worker.batches) == 2
    rig.assert_at_rest()


@virtual_time
async def test_a_row_that_is_not_finite_is_refused_to_all_who_wait_for_it() -> None:
    rig = Rig(cache_bytes=10**6)
    rig.worker.transform = lambda rows: np.where(rows == 2, np.nan, rows)
    calls = [rig.call(2), rig.call(2), rig.call(1, 2), rig.call(1)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == 3 * [NonFiniteOutput] + [list]
    rig.worker.transform = lambda rows: rows
    assert await rig.call(2) == [2.0]  # it was not kept
    assert rig.worker.batches == [[2, 1], [2]]
    rig.assert_at_rest()


@virtual_time
async def test_all_who_share_are_answered_when_the_server_closes() -> None:
    rig, first = busy_rig()
    await turns()
    calls = [rig.call(9), rig.call(1), rig.call(1)]
    await turns()
    rig.batcher.close()
    outcomes = await asyncio.gather(first, *calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == 4 * [Unavailable]


@virtual_time
async def test_after_a_bug_in_the_policy_nobody_joins_a_text_that_was_lost_in_it() -> None:
    rig, first = busy_rig()
    await turns()
    lost = [rig.call(1), rig.call(1)]
    await turns()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchQueue, "next_batch", lambda queue, *_: [][0])  # an IndexError
        rig.worker.gate.set()
        outcomes = await asyncio.gather(*lost, return_exceptions=True)
    assert all("internal error" in str(outcome) for outcome in outcomes)
    assert await rig.call(1) == [1.0]
    await first
    rig.assert_at_rest()


@virtual_time
async def test_after_a_bug_in_the_batch_nobody_joins_a_text_that_was_lost_in_it() -> None:
    rig = Rig()
    rig.worker.transform = lambda rows: np.array([["no number"]] * len(rows))
    outcomes = await asyncio.gather(rig.call(1), rig.call(1), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ServiceError, ServiceError]
    rig.worker.transform = lambda rows: rows
    assert await rig.call(1) == [1.0]
    rig.assert_at_rest()
