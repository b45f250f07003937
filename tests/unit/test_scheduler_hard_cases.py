"""What the batcher owes every caller when something goes wrong for another: one test for each way.

The clock jumps instead of ticking, so deadlines and windows cost no time and every order is the same on every run.
"""

import asyncio

import numpy as np
import pytest

from ml_inference_server.backends.base import Encoded
from ml_inference_server.server.batching import COMPANY_WAIT_S, BatchQueue
from ml_inference_server.server.call import Call
from ml_inference_server.utils.errors import (
    BackendFailure,
    DeadlinePassed,
    InvalidRequest,
    NonFiniteOutput,
    Overloaded,
    Unavailable,
)
from tests.conftest import JumpingLoop, virtual_time
from tests.unit.scheduler_kit import HOUR, POISON, Rig, turns


@virtual_time
async def test_each_caller_gets_its_own_rows_whatever_they_travelled_with() -> None:
    rig = Rig(slots=2)
    calls = [rig.call(*range(10 * n, 10 * n + n % 5 + 1)) for n in range(1, 40)]
    answers = await asyncio.gather(*calls)
    assert answers == [[float(i) for i in range(10 * n, 10 * n + n % 5 + 1)] for n in range(1, 40)]
    rig.assert_at_rest()


@virtual_time
async def test_one_request_is_split_over_batches_and_joined_in_order() -> None:
    rig = Rig(max_batch_size=4)
    assert await rig.call(*range(1, 12)) == [float(i) for i in range(1, 12)]
    assert [len(batch) for batch in rig.worker.batches] == [4, 4, 3]


@virtual_time
async def test_caller_leaves_the_queue_and_is_never_computed() -> None:
    rig = Rig()
    rig.worker.gate.clear()
    first = rig.call(1)
    await turns()
    leaving, staying = rig.call(2), rig.call(3)
    await turns()
    leaving.cancel()
    rig.worker.gate.set()
    assert list(await asyncio.gather(first, staying)) == [[1.0], [3.0]]
    assert leaving.cancelled()
    assert rig.worker.batches == [[1], [3]]
    rig.assert_at_rest()


@virtual_time
async def test_caller_leaves_during_its_batch_and_neighbours_get_their_answers() -> None:
    rig = Rig()
    rig.worker.gate.clear()
    calls = [rig.call(i) for i in (1, 2, 3)]
    await turns()
    assert rig.worker.batches == [[1, 2, 3]]
    calls[1].cancel()
    await turns()
    rig.worker.gate.set()
    assert list(await asyncio.gather(calls[0], calls[2])) == [[1.0], [3.0]]
    rig.assert_at_rest()


@virtual_time
async def test_caller_leaves_in_the_turn_in_which_its_batch_ends() -> None:
    """It has left, and nobody was told yet: its row must not meet a future that is done."""
    rig = Rig()
    rig.worker.gate.clear()
    calls = [rig.call(i) for i in (1, 2, 3)]
    await turns()
    rig.worker.gate.set()
    calls[1].cancel()
    assert list(await asyncio.gather(calls[0], calls[2])) == [[1.0], [3.0]]
    assert calls[1].cancelled()
    rig.assert_at_rest()


@virtual_time
async def test_all_callers_of_a_running_batch_leave_and_the_slot_comes_back() -> None:
    rig = Rig()
    rig.worker.gate.clear()
    calls = [rig.call(i) for i in (1, 2)]
    await turns()
    for call in calls:
        call.cancel()
    await turns()
    rig.worker.gate.set()
    assert await rig.call(5) == [5.0]
    rig.assert_at_rest()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_a_poisoned_text_fails_alone_at_every_position(size: int) -> None:
    @virtual_time
    async def check() -> None:
        for position in range(size):
            rig = Rig()
            ids = [POISON if i == position else i + 1 for i in range(size)]
            outcomes = await asyncio.gather(*(rig.call(i) for i in ids), return_exceptions=True)
            for wanted, outcome in zip(ids, outcomes, strict=True):
                if wanted == POISON:
                    assert isinstance(outcome, BackendFailure)
                    assert "model raised" not in str(outcome)
                else:
                    assert outcome == [float(wanted)]
            extra_runs = len(rig.worker.batches) - 1
            assert extra_runs <= 2 * int(np.ceil(np.log2(size))) + 1
            rig.assert_at_rest()

    check()


@virtual_time
async def test_a_poisoned_text_fails_its_whole_request_and_no_other() -> None:
    rig = Rig()
    guilty, innocent = rig.call(1, POISON, 2), rig.call(3, 4)
    outcomes = await asyncio.gather(guilty, innocent, return_exceptions=True)
    assert isinstance(outcomes[0], BackendFailure)
    assert outcomes[1] == [3.0, 4.0]
    rig.assert_at_rest()


@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_that_raises_once_is_retried_and_nobody_notices(size: int) -> None:
    @virtual_time
    async def check() -> None:
        rig = Rig()
        rig.worker.raises = lambda ids: len(rig.worker.batches) == 1
        assert list(await asyncio.gather(*(rig.call(i) for i in range(size)))) == [[float(i)] for i in range(size)]
        rig.assert_at_rest()

    check()


@pytest.mark.parametrize("change", [-1, 1], ids=["one row too few", "one row too many"])
def test_a_wrong_row_count_never_hands_answers_to_the_wrong_callers(change: int) -> None:
    @virtual_time
    async def check() -> None:
        rig = Rig()
        # Wrong for every batch of more than one text, as a backend that drops or doubles a row would be.
        rig.worker.transform = lambda rows: rows if len(rows) == 1 else np.resize(rows, (len(rows) + change, 1))
        assert list(await asyncio.gather(*(rig.call(i) for i in (1, 2, 3)))) == [[1.0], [2.0], [3.0]]
        rig.worker.transform = lambda rows: np.zeros((0, 1), np.float32)
        with pytest.raises(BackendFailure):
            await rig.call(4)
        rig.assert_at_rest()

    check()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_refused_and_its_neighbours_are_not(value: float) -> None:
    @virtual_time
    async def check() -> None:
        rig = Rig()
        rig.worker.transform = lambda rows: np.where(rows == 2, value, rows)
        outcomes = await asyncio.gather(*(rig.call(i) for i in (1, 2, 3)), return_exceptions=True)
        assert isinstance(outcomes[1], NonFiniteOutput)
        assert [outcomes[0], outcomes[2]] == [[1.0], [3.0]]
        rig.assert_at_rest()

    check()


@virtual_time
async def test_a_full_queue_refuses_exactly_what_does_not_fit_with_a_hint() -> None:
    rig = Rig(max_queue_requests=3)
    rig.worker.gate.clear()
    accepted = [rig.call(i) for i in (1, 2, 3)]
    await turns()
    for _ in range(2):
        with pytest.raises(Overloaded) as caught:
            await rig.call(4)
        assert caught.value.retry_after_ms is not None
        assert 20 <= caught.value.retry_after_ms <= 5000
    rig.worker.gate.set()
    assert list(await asyncio.gather(*accepted)) == [[1.0], [2.0], [3.0]]
    assert await rig.call(4) == [4.0]
    assert 4 not in [i for batch in rig.worker.batches[:-1] for i in batch]
    rig.assert_at_rest()


@virtual_time
async def test_the_token_budget_is_all_or_nothing() -> None:
    rig = Rig(max_queue_tokens=300)
    deadline = asyncio.get_running_loop().time() + HOUR
    first = rig.admission.admit(250, deadline)
    for _ in range(2):  # a refused request leaves nothing behind
        with pytest.raises(Overloaded):
            rig.admission.admit(51, deadline)
    second = rig.admission.admit(50, deadline)
    rig.admission.release(first)
    rig.admission.release(first)
    third = rig.admission.admit(250, deadline)
    with pytest.raises(Overloaded):
        rig.admission.admit(1, deadline)
    rig.admission.release(second)
    rig.admission.release(third)


@virtual_time
async def test_a_request_that_could_never_fit_is_told_so_and_not_to_come_back() -> None:
    rig = Rig(max_queue_tokens=300)
    with pytest.raises(InvalidRequest, match="split it"):
        rig.admission.admit(301, HOUR * 2)


@virtual_time
async def test_a_request_that_would_wait_for_most_of_its_time_is_refused_at_once_and_one_with_more_time_is_not() -> (
    None
):
    rig = Rig(max_batch_size=1)
    loop = asyncio.get_running_loop()
    rig.worker.takes_s = 3.0  # for three tokens: one token a second
    assert await rig.call(1) == [1.0]
    running, waiting = rig.call(2), rig.call(3, 4)
    await turns()
    with pytest.raises(Overloaded, match=r"the wait is about 6.0 s, the request has 7.0 s") as caught:
        await rig.call(5, timeout_s=7)
    assert caught.value.reason == "WAIT_TOO_LONG"
    assert caught.value.retry_after_ms == pytest.approx(1000 * (6 - 0.8 * 7), rel=0.26)
    patient = rig.call(6, timeout_s=20)
    began = loop.time()
    assert list(await asyncio.gather(running, waiting, patient)) == [[2.0], [3.0, 4.0], [6.0]]
    assert loop.time() - began == pytest.approx(12)
    assert await rig.call(7, timeout_s=3.1) == [7.0]  # nobody waits: there is nothing to refuse it for
    rig.assert_at_rest()


@virtual_time
async def test_a_deadline_that_passes_in_the_queue_ends_the_wait_and_the_text_is_never_computed() -> None:
    rig = Rig()
    rig.worker.gate.clear()
    first = rig.call(1)
    await turns()
    loop = asyncio.get_running_loop()
    before = loop.time()
    with pytest.raises(DeadlinePassed, match="in the queue"):
        await rig.call(2, timeout_s=5)
    assert loop.time() - before == pytest.approx(5)
    rig.worker.gate.set()
    assert await first == [1.0]
    assert rig.worker.batches == [[1]]
    rig.assert_at_rest()


@virtual_time
async def test_a_deadline_that_passes_during_the_batch_ends_the_wait() -> None:
    rig = Rig()
    rig.worker.gate.clear()
    with pytest.raises(DeadlinePassed, match="while the request ran"):
        await rig.call(1, timeout_s=5)
    rig.worker.gate.set()
    assert await rig.call(2) == [2.0]
    rig.assert_at_rest()


@virtual_time
async def test_a_deadline_that_has_passed_is_not_admitted() -> None:
    rig = Rig()
    with pytest.raises(DeadlinePassed, match="before the request was admitted"):
        rig.admission.admit(3, asyncio.get_running_loop().time())
    with pytest.raises(DeadlinePassed):
        await rig.call(1, timeout_s=0)
    assert rig.worker.batches == []
    rig.assert_at_rest()


@virtual_time
async def test_a_text_whose_deadline_passed_in_this_very_moment_is_not_started() -> None:
    """The slot gets free and the deadline passes in one turn of the loop, before anybody could be told."""
    rig = Rig()
    rig.worker.gate.clear()
    first = rig.call(1)
    await turns()
    late = rig.call(2, timeout_s=5)
    await turns()
    asyncio.get_running_loop().jumping.now += 10  # type: ignore[attr-defined]
    rig.worker.gate.set()
    with pytest.raises(DeadlinePassed):
        await late
    assert await first == [1.0]
    await turns()
    assert rig.worker.batches == [[1]]
    rig.assert_at_rest()


@virtual_time
async def test_a_text_whose_deadline_passes_after_it_was_chosen_is_not_started() -> None:
    """Between the choice of its batch and the start of it, so that no timer could take it out of the queue."""
    loop = asyncio.get_running_loop()
    rig = Rig()
    rig.worker.gate.clear()
    first = rig.call(1)
    await turns()
    late = rig.call(2, timeout_s=5)
    await turns()

    def pass_the_deadline() -> None:
        loop.jumping.now += 10  # type: ignore[attr-defined]

    def ended(rows: np.ndarray) -> np.ndarray:
        loop.call_soon(pass_the_deadline)
        return rows

    rig.worker.transform = ended
    rig.worker.gate.set()
    with pytest.raises(DeadlinePassed, match="in the queue"):
        await late
    assert await first == [1.0]
    await turns()
    assert rig.worker.batches == [[1]]
    rig.assert_at_rest()


@virtual_time
async def test_a_text_whose_caller_left_is_not_computed_again_when_its_batch_is_retried() -> None:
    rig = Rig()
    rig.worker.gate.clear()
    leaving, staying = rig.call(1), rig.call(2)
    await turns()
    rig.worker.raises = lambda ids: len(ids) == 2
    leaving.cancel()
    await turns()
    rig.worker.gate.set()
    assert await staying == [2.0]
    assert rig.worker.batches == [[1, 2], [2]]
    rig.assert_at_rest()


@virtual_time
async def test_work_that_expired_while_its_batch_was_retried_is_not_computed_again() -> None:
    rig = Rig()
    rig.worker.gate.clear()
    expired, other = rig.call(1, timeout_s=5), rig.call(2)
    rig.worker.raises = lambda ids: len(ids) == 2
    with pytest.raises(DeadlinePassed):
        await expired
    rig.worker.gate.set()
    assert await other == [2.0]
    assert rig.worker.batches == [[1, 2], [2]]


@virtual_time
async def test_shutdown_refuses_new_requests_and_finishes_accepted_ones() -> None:
    rig = Rig()
    rig.worker.gate.clear()
    accepted = [rig.call(i) for i in (1, 2)]
    await turns()
    rig.admission.refuse_new()
    with pytest.raises(Unavailable) as caught:
        await rig.call(3)
    assert caught.value.retry_after_ms
    draining = asyncio.create_task(rig.admission.drained(60))
    await turns()
    rig.worker.gate.set()
    assert await draining == 0
    assert list(await asyncio.gather(*accepted)) == [[1.0], [2.0]]


@virtual_time
async def test_a_drain_that_takes_too_long_says_how_many_are_left_and_close_answers_them() -> None:
    rig = Rig()
    rig.worker.gate.clear()
    calls = [rig.call(i) for i in (1, 2)]
    await turns()
    rig.admission.refuse_new()
    assert await rig.admission.drained(10) == 2
    rig.batcher.close()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]
    assert rig.worker.closed


@virtual_time
async def test_an_idle_worker_never_waits_for_company() -> None:
    rig = Rig()
    loop = asyncio.get_running_loop()
    before = loop.time()
    assert await rig.call(1) == [1.0]
    assert loop.time() == before


@virtual_time
async def test_the_window_gathers_calls_and_closes_at_the_oldest_ones_timeout() -> None:
    rig = Rig(timeout_s=2.0)
    loop = asyncio.get_running_loop()
    before = loop.time()
    first = rig.call(1)
    await asyncio.sleep(1.5)
    second = rig.call(2)
    assert list(await asyncio.gather(first, second)) == [[1.0], [2.0]]
    assert loop.time() - before == pytest.approx(2.0)
    assert rig.worker.batches == [[1, 2]]


@virtual_time
async def test_all_slots_are_used_and_none_is_used_twice() -> None:
    rig = Rig(slots=2, max_batch_size=1)
    rig.worker.gate.clear()
    calls = [rig.call(i) for i in (1, 2, 3)]
    await turns()
    assert rig.worker.batches == [[1], [2]]
    rig.worker.gate.set()
    assert list(await asyncio.gather(*calls)) == [[1.0], [2.0], [3.0]]


@virtual_time
async def test_a_bug_in_the_policy_answers_everybody_and_the_batcher_goes_on() -> None:
    rig = Rig()
    rig.worker.gate.clear()
    running = rig.call(1)
    await turns()
    broken = rig.call(2)
    await turns()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchQueue, "next_batch", lambda queue, *_: [][0])  # an IndexError
        rig.worker.gate.set()
        outcomes = await asyncio.gather(running, broken, return_exceptions=True)
    assert outcomes[0] == [1.0]
    assert "internal error" in str(outcomes[1])
    assert await rig.call(3) == [3.0]


@virtual_time
async def test_failures_are_counted_until_a_batch_succeeds() -> None:
    rig = Rig()
    for _ in range(3):
        with pytest.raises(BackendFailure):
            await rig.call(POISON)
    assert rig.batcher.failures_in_a_row == 3
    await rig.call(1)
    assert rig.batcher.failures_in_a_row == 0


@virtual_time
async def test_a_request_that_was_let_in_but_not_queued_when_the_server_closed_is_answered() -> None:
    """Its texts were still being tokenised."""
    rig = Rig()
    now = asyncio.get_running_loop().time()
    call = Call("test", received_at=now, deadline=now + HOUR)
    with rig.admission.admit(3, call.deadline) as reservation:
        rig.batcher.close()
        with pytest.raises(Unavailable):
            await rig.batcher.compute([Encoded(np.array([1, 0, 0], np.int32))], call, reservation)
    assert (rig.admission.requests, rig.worker.batches) == (0, [])


@virtual_time
async def test_texts_that_come_one_after_the_other_travel_together_although_a_stream_is_free() -> None:
    """gRPC hands over one call in a turn of the event loop, or in a few."""
    rig = Rig(slots=2)
    calls: list[asyncio.Task[list[float]]] = []
    for i in (1, 2, 3, 4):
        calls.append(rig.call(i))
        await turns(4)
    assert await asyncio.gather(*calls) == [[1.0], [2.0], [3.0], [4.0]]
    assert rig.worker.batches == [[1, 2, 3, 4]]


@virtual_time
async def test_texts_that_come_without_end_keep_a_free_stream_waiting_for_no_longer_than_company_may() -> None:
    rig = Rig()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, JumpingLoop)
    began_at = loop.time()
    calls: list[asyncio.Task[list[float]]] = []
    while not rig.worker.batches and len(calls) < 32:
        calls.append(rig.call(len(calls)))
        loop.jumping.now += COMPANY_WAIT_S / 10  # what a turn took
        await turns(4)
    assert 0.9 * COMPANY_WAIT_S < loop.time() - began_at < 1.3 * COMPANY_WAIT_S
    await asyncio.gather(*calls)
