"""How many replicas Ray is told to run: by the wait for the engine, never by more than double, never away from work."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_inference_server.deploy.ray_scaling import BUSY_SHARE, QUEUE_WAIT_MS, QueueWaitPolicy


def asked(waits_ms: list[float], busy: list[float], *, now: int | None = None, target: int = 0) -> int:
    """What the policy says; a replica for each figure, unless `now` says how many there are."""
    context = SimpleNamespace(
        current_num_replicas=len(waits_ms) if now is None else now,
        target_num_replicas=target,
        aggregated_metrics={
            QUEUE_WAIT_MS: dict(enumerate(waits_ms)),
            BUSY_SHARE: dict(enumerate(busy)),
        },
    )
    replicas, state = QueueWaitPolicy(target_ms=50)(context)
    assert state == {}
    return replicas


@pytest.mark.parametrize("wait_ms", [51, 60, 75, 400, 1e9])
def test_a_wait_above_the_target_adds_replicas_at_most_as_many_again(wait_ms: float) -> None:
    for now in (1, 2, 5):
        replicas = asked([wait_ms] * now, [1.0] * now)
        assert now < replicas <= 2 * now


def test_one_that_waits_long_counts_as_much_as_the_others_who_do_not() -> None:
    assert asked([140, 0, 0], [1, 0, 0]) == 3, "their mean is below the target"
    assert asked([200, 0, 0], [1, 0, 0]) == 4


def test_between_half_of_the_target_and_the_target_nothing_changes() -> None:
    for wait_ms in (26, 40, 50):
        assert asked([wait_ms] * 3, [0.1] * 3) == 3


def test_one_goes_at_a_time_and_only_where_the_rest_can_do_its_work() -> None:
    assert asked([1, 1, 1, 1], [0.1] * 4) == 3
    assert asked([1, 1], [0.7, 0.7]) == 2, "two thirds and more of two is too much for one"
    assert asked([1, 1], [0.3, 0.3]) == 1


@pytest.mark.parametrize("metrics", [None, {}, {QUEUE_WAIT_MS: {}}])
def test_before_the_first_figures_it_stays_as_it_was_meant(metrics: dict[str, object] | None) -> None:
    context = SimpleNamespace(current_num_replicas=2, target_num_replicas=3, aggregated_metrics=metrics)
    assert QueueWaitPolicy()(context) == (3, {})


def test_without_a_replica_it_asks_for_what_was_meant() -> None:
    assert asked([10], [0.5], now=0, target=1) == 1


@pytest.mark.parametrize("target_ms", [0, -1, float("nan")])
def test_a_target_that_is_none_is_refused(target_ms: float) -> None:
    with pytest.raises(ValueError, match="give the wait that is right"):
        QueueWaitPolicy(target_ms)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.data())
def test_whatever_the_figures_are_it_asks_for_one_replica_or_more(waits_ms: list[float], data: st.DataObject) -> None:
    busy = data.draw(st.lists(st.floats(0, 2), min_size=len(waits_ms), max_size=len(waits_ms)))
    replicas = asked(waits_ms, busy)
    assert max(1, len(waits_ms) - 1) <= replicas <= 2 * len(waits_ms)
