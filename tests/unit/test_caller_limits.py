"""Limits per caller: token buckets on a clock that the test turns, and what a caller is told who asks for more."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_inference_server.server.admission import Admission
from ml_inference_server.server.caller_limits import BURST_S, NO_LIMITS, CallerBuckets, CallerLimits
from ml_inference_server.server.engine_rate import EngineRate
from ml_inference_server.server.ready_model import same_limits
from ml_inference_server.utils.config import BatchingSettings
from ml_inference_server.utils.errors import InvalidRequest, Overloaded
from ml_inference_server.utils.limit_settings import LimitSettings
from tests.conftest import virtual_time


def admission(limits: CallerLimits, **batching: int) -> Admission:
    def limits_of(caller: str) -> CallerLimits:
        return limits if caller == "limited" else NO_LIMITS

    settings = BatchingSettings.model_validate(batching)
    return Admission(settings, EngineRate(), batch_tokens=2048, limits_of=limits_of)


def test_a_second_of_requests_may_come_at_once_and_then_one_at_a_time() -> None:
    buckets, limits = CallerBuckets(), CallerLimits(requests_per_s=10)
    for _ in range(10):
        assert buckets.wait_s("a", limits, 5, 100.0) == 0
        buckets.take("a", limits, 5, 100.0)
    assert buckets.wait_s("a", limits, 5, 100.0) == pytest.approx(0.1)
    assert buckets.wait_s("b", limits, 5, 100.0) == 0
    assert buckets.wait_s("a", limits, 5, 100.05) == pytest.approx(0.05)
    assert buckets.wait_s("a", limits, 5, 100.1) == 0


def test_less_than_one_request_per_second_lets_one_in() -> None:
    buckets, limits = CallerBuckets(), CallerLimits(requests_per_s=0.1)
    assert buckets.wait_s("a", limits, 5, 0.0) == 0
    buckets.take("a", limits, 5, 0.0)
    assert buckets.wait_s("a", limits, 5, 2.0) == pytest.approx(8)


def test_a_request_of_more_tokens_than_a_second_gives_waits_for_a_full_bucket_and_pays_afterwards() -> None:
    buckets, limits = CallerBuckets(), CallerLimits(tokens_per_s=100)
    buckets.take("a", limits, 50, 0.0)
    assert buckets.wait_s("a", limits, 500, 0.0) == pytest.approx(0.5)
    buckets.take("a", limits, 500, 0.5)
    assert buckets.wait_s("a", limits, 1, 0.5) == pytest.approx(4.01)


@given(
    st.floats(0.1, 1000),
    st.one_of(st.none(), st.floats(1, 1e5)),
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 5000)), min_size=1, max_size=60),
)
@settings(max_examples=200, deadline=None)
def test_nobody_gets_more_than_his_rate_and_the_hint_is_exact(
    requests_per_s: float, tokens_per_s: float | None, asked: list[tuple[float, int]]
) -> None:
    buckets, limits = CallerBuckets(), CallerLimits(requests_per_s, tokens_per_s)
    now, requests, tokens_before = 0.0, 0, 0
    for pause_s, tokens in asked:
        now += pause_s
        wait_s = buckets.wait_s("a", limits, tokens, now)
        if wait_s:
            assert buckets.wait_s("a", limits, tokens, now + 0.9 * wait_s) > 0 or wait_s < 1e-4
            now += wait_s
        assert buckets.wait_s("a", limits, tokens, now) == 0
        if tokens_per_s is not None:  # what went before, not this one, which may be larger than a bucket
            assert tokens_before <= max(1, tokens_per_s * BURST_S) + tokens_per_s * now + 1e-3 * tokens_per_s
        buckets.take("a", limits, tokens, now)
        requests, tokens_before = requests + 1, tokens_before + tokens
        assert requests <= max(1, requests_per_s * BURST_S) + requests_per_s * now + 1e-3 * requests_per_s


def test_callers_who_were_quiet_are_forgotten() -> None:
    buckets, limits = CallerBuckets(), CallerLimits(requests_per_s=1)
    for number in range(20_000):
        buckets.take(f"caller {number}", limits, 1, float(number))
    assert len(buckets) <= 1024
    for _ in range(2000):
        buckets.take("in debt", limits, 1, 20_000.0)
    for number in range(2000):
        buckets.take(f"another {number}", limits, 1, 20_010.0 + number)
    assert buckets.wait_s("in debt", limits, 1, 21_999.0) > 0


@virtual_time
async def test_who_asks_too_often_is_told_when_to_come_back_and_comes_in_then() -> None:
    limited = admission(CallerLimits(requests_per_s=3))
    loop = asyncio.get_running_loop()
    for _ in range(3):
        limited.admit(5, loop.time() + 60, caller="limited")
    with pytest.raises(Overloaded, match=r"no more per second; retry in 334 ms") as caught:
        limited.admit(5, loop.time() + 60, caller="limited")
    assert (caught.value.reason, caught.value.retry_after_ms) == ("CALLER_LIMIT", 334)
    limited.admit(5, loop.time() + 60, caller="another")
    await asyncio.sleep(0.334)
    limited.admit(5, loop.time() + 60, caller="limited")
    with pytest.raises(Overloaded):
        limited.admit(5, loop.time() + 60, caller="limited")


@virtual_time
async def test_a_request_that_is_refused_for_another_reason_costs_nothing_of_the_limit() -> None:
    limited = admission(CallerLimits(requests_per_s=1), max_queue_tokens=300)
    deadline = asyncio.get_running_loop().time() + 60
    first = limited.admit(300, deadline, caller="another")
    for _ in range(5):
        with pytest.raises(Overloaded) as caught:
            limited.admit(200, deadline, caller="limited")
        assert caught.value.reason == "QUEUE_FULL"
    limited.release(first)
    limited.admit(200, deadline, caller="limited")


@virtual_time
async def test_a_share_of_the_queue() -> None:
    limited = admission(CallerLimits(queue_share=0.1), max_queue_tokens=10_000, max_queue_requests=50)
    deadline = asyncio.get_running_loop().time() + 60
    with pytest.raises(InvalidRequest, match=r"this caller's share of the queue is 1000: split it"):
        limited.admit(1001, deadline, caller="limited")
    held = [limited.admit(200, deadline, caller="limited") for _ in range(5)]
    with pytest.raises(Overloaded, match=r"no more in the queue; retry in \d+ ms") as caught:
        limited.admit(1, deadline, caller="limited")
    assert caught.value.reason == "CALLER_LIMIT"
    limited.admit(2000, deadline, caller="another")
    limited.release(held.pop())
    held.append(limited.admit(200, deadline, caller="limited"))
    limited.release(held.pop())
    for each in held:
        each.give_back(each.tokens)  # in the engine: they wait no more, but are five requests with the next
    limited.admit(1, deadline, caller="limited")
    with pytest.raises(Overloaded):
        limited.admit(1, deadline, caller="limited")


def test_the_settings_hold_for_every_caller_but_the_server_itself() -> None:
    assert same_limits(LimitSettings())("192.0.2.1") is NO_LIMITS
    limits_of = same_limits(LimitSettings(requests_per_s=5, queue_share=0.5))
    assert limits_of("192.0.2.1") == CallerLimits(5, None, 0.5)
    assert limits_of("") is NO_LIMITS
