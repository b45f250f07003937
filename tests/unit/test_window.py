import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_inference_server.metrics.window import RELATIVE_ERROR, SMALLEST_S, Distribution, SlidingWindow

times_s = st.floats(min_value=SMALLEST_S, max_value=3600.0)


def nearest_rank(values: list[float], share: float) -> float:
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1]


@given(st.lists(times_s, min_size=1, max_size=300))
def test_percentiles_are_within_the_stated_error(values: list[float]) -> None:
    distribution = Distribution()
    distribution.add_many(np.array(values))
    shares = (0.01, 0.5, 0.95, 0.99, 1.0)
    found = distribution.percentiles_s(*shares)
    assert found is not None
    assert found == [pytest.approx(nearest_rank(values, share), rel=RELATIVE_ERROR * 1.0001) for share in shares]


@given(st.lists(times_s, min_size=1))
def test_the_mean_is_exact_to_the_nanosecond(values: list[float]) -> None:
    distribution = Distribution()
    distribution.add_many(np.array(values))
    assert distribution.count == len(values)
    assert distribution.mean_s == pytest.approx(math.fsum(values) / len(values), abs=1e-9)


@given(st.lists(st.floats(min_value=0.0, max_value=3600.0), max_size=300))
def test_many_at_once_count_as_one_by_one(values: list[float]) -> None:
    one_by_one, at_once = Distribution(), Distribution()
    for value in values:
        one_by_one.add_many(np.array([value]))
    at_once.add_many(np.array(values))
    assert at_once.count == one_by_one.count
    assert at_once.mean_s == pytest.approx(one_by_one.mean_s, abs=1e-9)
    found = at_once.percentiles_s(0.5, 1.0)
    # The two logarithms may round a value on a bucket's edge to either side.
    assert found == (
        one_by_one.percentiles_s(0.5, 1.0) and pytest.approx(one_by_one.percentiles_s(0.5, 1.0), rel=0.021)
    )


@pytest.mark.parametrize("seconds", [0.0, 9e-7, -0.5])
def test_times_too_short_to_measure_count_as_zero(seconds: float) -> None:
    distribution = Distribution()
    distribution.add_many(np.array([seconds]))
    assert distribution.percentiles_s(0.5) == [0.0]
    assert distribution.mean_s == 0.0


def test_an_empty_distribution_has_no_figures() -> None:
    assert Distribution().percentiles_s(0.5) is None
    assert Distribution().mean_s is None


def test_taking_out_what_was_added_leaves_nothing() -> None:
    kept, passing = Distribution(), Distribution()
    kept.add_many(np.array([0.25]))
    for value in (0.001, 0.25, 7.0, 0.0):
        passing.add_many(np.array([value]))
    before = kept.percentiles_s(0.5, 1.0)
    kept.merge(passing)
    assert kept.count == 5
    kept.merge(passing, -1)
    assert (kept.count, kept.mean_s, kept.percentiles_s(0.5, 1.0)) == (1, 0.25, before)


@given(
    window_s=st.integers(1, 40),
    steps_s=st.lists(st.floats(0.0, 15.0), min_size=1, max_size=80),
    start_s=st.floats(0.0, 1e6),
)
def test_a_view_holds_the_window_and_nothing_older(window_s: int, steps_s: list[float], start_s: float) -> None:
    window = SlidingWindow(window_s, start_s)
    slot_s = min(1.0, window_s / 10)
    now_s, events = start_s, []
    for step_s in steps_s:
        now_s += step_s
        events.append(now_s)
        slot = window.at(now_s)
        slot.sums["events"] += 1
        slot.times["time"].add_many(np.array([0.01]))
        view = window.view(now_s)
        rounding_s = 1e-6
        at_least = sum(now_s - event < window_s - slot_s - rounding_s for event in events)
        at_most = sum(now_s - event < window_s + rounding_s for event in events)
        assert at_least <= view.sums["events"] <= at_most
        assert view.times["time"].count == view.sums["events"]
    after = window.view(now_s + window_s + slot_s)
    assert after.sums["events"] == 0
    assert after.times["time"].percentiles_s(0.5) is None


def test_before_the_window_is_full_it_covers_the_time_since_the_start() -> None:
    window = SlidingWindow(30, 100.0)
    assert window.covered_s(105.5) == 5.5
    assert window.covered_s(129.0) == 29.0


def test_a_full_window_covers_whole_slots_and_the_running_one() -> None:
    window = SlidingWindow(30, 0.0)
    assert window.covered_s(1000.25) == 29.25
    assert window.covered_s(1000.75) == 29.75


def test_a_steady_rate_is_read_as_that_rate() -> None:
    window = SlidingWindow(30, 0.0)
    for tick in range(8 * 100):
        window.at(tick / 8).sums["events"] += 1
    now_s = (8 * 100 - 1) / 8
    events = window.view(now_s).sums["events"]
    assert events / window.covered_s(now_s) == pytest.approx(8, abs=1 / 29)


def test_the_first_instant_makes_no_absurd_rate() -> None:
    assert SlidingWindow(30, 5.0).covered_s(5.0) == 1.0
    assert SlidingWindow(1, 5.0).covered_s(5.0) == pytest.approx(0.1)


def test_a_clock_that_steps_back_changes_nothing() -> None:
    window = SlidingWindow(30, 0.0)
    window.at(10.0).sums["events"] += 1
    window.at(9.0).sums["events"] += 1
    assert window.view(10.0).sums["events"] == 2
