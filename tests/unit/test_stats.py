"""Intervals that hold what they promise, and schedules that are fixed before the run."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from ml_inference_server.benchmark.load.records import Records, as_records, record
from ml_inference_server.benchmark.load.schedule import arrivals_s
from ml_inference_server.benchmark.measure.rate_search import PRECISION, RateSearch
from ml_inference_server.benchmark.result import stats
from ml_inference_server.benchmark.result.figures import figures, lag_reason


def test_samples_that_earn_a_percentile() -> None:
    assert [stats.samples_needed(p) for p in (50, 90, 95, 99, 99.9)] == [20, 100, 200, 1000, 10_000]


def test_the_interval_of_repeats_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        found = stats.of_repeats(np.exp(random.normal(math.log(100), 0.05, 4)).tolist())
        assert found is not None
        covered += found.low <= 100 <= found.high
    assert 0.91 < covered / 400 < 0.985


def test_the_interval_is_students_on_the_logarithm() -> None:
    found = stats.of_repeats([90.0, 100.0, 110.0])
    assert found is not None
    logs = np.log([90, 100, 110])
    low, high = scipy_stats.t.interval(0.95, 2, logs.mean(), scipy_stats.sem(logs))
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))
    assert (found.value, found.least, found.most, found.n) == (100, 90, 110, 3)


def test_one_value_has_no_interval_and_none_no_figure() -> None:
    found = stats.of_repeats([5.0])
    assert found is not None
    assert math.isnan(found.low)
    assert stats.of_repeats([]) is None
    assert math.isnan(stats.ratio(found, found).low)


def test_a_ratio_agrees_with_welchs_test() -> None:
    random = np.random.default_rng(2)
    a, b = np.exp(random.normal(0, 0.1, 5)), np.exp(random.normal(0.2, 0.02, 4))
    found_a, found_b = stats.of_repeats(a.tolist()), stats.of_repeats(b.tolist())
    assert found_a is not None
    assert found_b is not None
    ratio = stats.ratio(found_b, found_a)
    theirs = scipy_stats.ttest_ind(np.log(b), np.log(a), equal_var=False)
    assert ratio.is_significant == (theirs.pvalue < 0.05)
    reach = (theirs.confidence_interval().high - theirs.confidence_interval().low) / 2
    assert math.log(ratio.high / ratio.low) / 2 == pytest.approx(reach)


def test_equal_systems_are_seldom_told_apart() -> None:
    random = np.random.default_rng(3)
    told_apart = 0
    for _ in range(300):
        pair = [stats.of_repeats(np.exp(random.normal(0, 0.1, 3)).tolist()) for _ in range(2)]
        assert pair[0] is not None
        assert pair[1] is not None
        told_apart += stats.ratio(pair[1], pair[0]).is_significant
    assert told_apart / 300 < 0.08


def test_a_single_run_takes_its_interval_from_its_own_stretches() -> None:
    done_s = np.sort(np.random.default_rng(4).uniform(0, 10, 1000))
    rates = stats.rates_of_stretches(done_s, 4)
    assert len(rates) == stats.STRETCHES
    assert sum(rates) / len(rates) == pytest.approx(4 * 1000 / done_s[-1])
    found = stats.of_one_run(400, rates)
    assert found.low < 400 < found.high
    assert stats.rates_of_stretches(done_s[:20], 4) == []


def test_the_interval_of_a_percentile_covers_it() -> None:
    random = np.random.default_rng(5)
    truth = float(np.quantile(random.exponential(10, 1_000_000), 0.95))
    covered = 0
    for _ in range(300):
        found = stats.of_percentile(random.exponential(10, 400), 95)
        assert found is not None
        covered += found.low <= truth <= found.high
    assert covered / 300 > 0.9


def test_a_mean_of_ratios_is_geometric() -> None:
    found = stats.mean_ratio([stats.Ratio(2, 1.8, 2.2), stats.Ratio(0.5, 0.45, 0.55)])
    assert found is not None
    assert found.value == pytest.approx(1)
    assert not found.is_significant
    assert stats.mean_ratio([]) is None


def test_a_paired_bootstrap_finds_a_small_steady_difference() -> None:
    random = np.random.default_rng(6)
    low, high = stats.paired_bootstrap(random.normal(-0.01, 0.01, 50))
    assert low < -0.01 < high < 0
    low, high = stats.paired_bootstrap(np.zeros(20))
    assert (low, high) == (0, 0)


# Schedules


def test_a_schedule_is_fixed_by_its_seed() -> None:
    one = arrivals_s("poisson", 50, requests=1000, seed=3, repeat=1)
    np.testing.assert_array_equal(one, arrivals_s("poisson", 50, requests=1000, seed=3, repeat=1))
    assert not np.array_equal(one, arrivals_s("poisson", 50, requests=1000, seed=3, repeat=2))
    assert (np.diff(one) >= 0).all()


def test_a_poisson_process_has_its_rate_and_exponential_gaps() -> None:
    gaps = np.diff(arrivals_s("poisson", 50, requests=20_000, seed=0, repeat=1))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert scipy_stats.kstest(gaps, "expon", args=(0, 1 / 50)).pvalue > 0.01


def test_a_constant_process_has_equal_gaps() -> None:
    np.testing.assert_allclose(arrivals_s("constant", 4, requests=4, seed=0, repeat=1), [0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize("process", ["poisson", "constant"])
def test_a_duration_bounds_the_schedule(process: str) -> None:
    found = arrivals_s(process, 100, duration_s=10, seed=0, repeat=1)  # type: ignore[arg-type]
    assert found[-1] < 10
    assert len(found) == pytest.approx(1000, abs=150)
    assert len(arrivals_s(process, 0.001, duration_s=1, seed=0, repeat=1)) == 1  # type: ignore[arg-type]


# A sender that is late


def sent(lags_s: list[float], latency_s: float = 0.01) -> Records:
    rows = [
        record(n / 100, n / 100 + lag, n / 100 + lag + latency_s, "OK", (0, 0, 0, 0)) for n, lag in enumerate(lags_s)
    ]
    return as_records(rows)


def test_latency_is_counted_from_when_a_request_was_due() -> None:
    found = figures(sent([0.5] * 10), batch_size=1, scores=False, is_open=True)
    assert found.latency_ms is not None
    assert found.latency_ms.p50 == pytest.approx(510)
    assert found.lag_ms is not None
    assert found.lag_ms.p99 == pytest.approx(500)


def test_material_lag_is_told_and_accidents_are_not() -> None:
    assert lag_reason(sent([0.001] * 100)) == ""
    assert lag_reason(sent([0.001] * 99 + [0.5])) == "", "one request is an accident"
    assert "3 of 100 requests left more than 10.0 ms" in lag_reason(sent([0.001] * 97 + [0.5] * 3))
    slow = sent([0.02] * 100, latency_s=1.0)
    assert lag_reason(slow) == "", "20 ms are nothing beside a second"


# The search for a rate


def found_rate(capacity: float, first: float) -> tuple[float, int]:
    """(result, probes) against a server that keeps the bound up to `capacity`."""
    search, probes = RateSearch(first), 0
    while rate := search.next():
        probes += 1
        search.tell(rate, rate <= capacity)
    return search.low, probes


@pytest.mark.parametrize("first", [1.0, 70.0, 100.0, 900.0])
def test_the_search_ends_just_below_the_capacity(first: float) -> None:
    rate, probes = found_rate(100, first)
    assert 100 / PRECISION <= rate <= 100
    assert probes <= 15


def test_the_search_gives_up_on_a_server_that_never_keeps_the_bound() -> None:
    rate, probes = found_rate(0, 100)
    assert rate == 0
    assert probes < 10


def test_a_rate_that_failed_later_is_not_the_result() -> None:
    search = RateSearch(10)
    search.tell(10, True)
    search.tell(10, False)
    assert search.low == 0


def test_the_interval_of_a_median() -> None:
    middle, low, high = stats.median_interval([0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.1])
    assert (middle, low, high) == (1.0, 1.0, 1.0)
    middle, low, high = stats.median_interval([0.5, 1.5] * 20)
    assert low < middle < high or (low, high) == (0.5, 1.5)
