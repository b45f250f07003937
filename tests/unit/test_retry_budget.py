"""What a client asks again of a server that is overloaded."""

import pytest

from ml_inference_server.api.errors import ServerError
from ml_inference_server.api.operations import Attempts, RetryBudget


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_of_many_refused_calls_one_in_ten_is_asked_again() -> None:
    clock = Clock()
    budget = RetryBudget(clock)
    again = 0
    for _ in range(10_000):  # in ten seconds
        clock.now += 0.001
        budget.called()
        again += budget.pause_s(0.1, 1.0) < 1.0
    assert 1000 <= again <= 1100


def test_one_call_after_the_other_is_asked_again_as_soon_as_the_server_says() -> None:
    clock = Clock()
    budget = RetryBudget(clock)
    for _ in range(1000):
        budget.called()
        assert budget.pause_s(0.5, 60.0) == 0.5
        clock.now += 0.5


def test_beyond_the_budget_an_attempt_waits_for_its_turn() -> None:
    budget = RetryBudget(Clock())
    pauses = [budget.pause_s(0.1, 60.0) for _ in range(14)]
    assert pauses[:10] == [0.1] * 10
    assert pauses[10:] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_what_does_not_fit_into_the_time_left_takes_nothing() -> None:
    budget = RetryBudget(Clock())
    for _ in range(10):
        budget.pause_s(0.1, 60.0)
    assert [budget.pause_s(0.1, 0.3) for _ in range(5)] == [0.5] * 5


@pytest.mark.parametrize(
    ("code", "reason"), [("UNAVAILABLE", "DRAINING"), ("UNAVAILABLE", ""), ("RESOURCE_EXHAUSTED", "CALLER_LIMIT")]
)
def test_a_restart_and_a_limit_of_the_callers_own_take_nothing(code: str, reason: str) -> None:
    budget = RetryBudget(Clock())
    refused = ServerError("no", code=code, reason=reason, retry_after_s=0.1)
    for _ in range(100):
        assert Attempts(1e9, 2, budget).pause_s(refused) is not None
    assert budget.pause_s(0.1, 60.0) == 0.1
