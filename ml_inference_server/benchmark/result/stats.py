"""What the figures are worth: intervals, differences, and which percentiles a sample has earned."""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
# A percentile needs so many samples beyond it; with fewer it is one accident under another name.
BEYOND = 10
# A single run is cut into so many stretches of equal time, whose rates stand in for repeats (method of batch means).
STRETCHES = 10


@dataclass(frozen=True)
class Figure:
    """A positive quantity: the median over its repeats, their extremes, and a 95 % interval of what it would settle at.

    log_se, df: standard error of its logarithm and the degrees of freedom behind it; None where nothing is known, and
    then low and high are NaN.
    """

    value: float
    low: float
    high: float
    least: float
    most: float
    n: int
    log_se: float | None
    df: float


def samples_needed(percentile: float) -> int:
    """How many samples earn this percentile (0..100)."""
    return math.ceil(round(BEYOND / (1 - percentile / 100), 6))


def t_quantile(df: float) -> float:
    """Two-sided, for CONFIDENCE."""
    from scipy import stats  # slow to load

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, df))


def of_repeats(values: Sequence[float]) -> Figure | None:
    """The figure behind repeats; on the logarithm, because noise of speed is a factor. None without any."""
    if not values or min(values) <= 0:
        return None
    middle = statistics.median(values)
    if len(values) < 2:
        return Figure(middle, math.nan, math.nan, middle, middle, 1, None, 0)
    logs = np.log(values)
    return _figure(middle, float(logs.mean()), float(logs.std(ddof=1)) / math.sqrt(len(values)), values)


def of_one_run(value: float, stretches: Sequence[float]) -> Figure:
    """The figure behind one run, its uncertainty from the run's own stretches."""
    usable = [stretch for stretch in stretches if stretch > 0]
    if len(usable) < max(len(stretches), 2):
        return Figure(value, math.nan, math.nan, value, value, 1, None, 0)
    log_se = float(np.log(usable).std(ddof=1)) / math.sqrt(len(usable))
    return _figure(value, math.log(value), log_se, [value], df=len(usable) - 1)


def _figure(value: float, log_mean: float, log_se: float, values: Sequence[float], df: float | None = None) -> Figure:
    df = len(values) - 1 if df is None else df
    reach = t_quantile(df) * log_se
    return Figure(
        value, math.exp(log_mean - reach), math.exp(log_mean + reach), min(values), max(values), len(values), log_se, df
    )


def of_percentile(samples: ArrayLike, percentile: float) -> Figure | None:
    """One run's percentile with the distribution-free interval of its order statistics. None without samples."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    if not len(ordered):
        return None
    value = float(np.percentile(ordered, percentile))
    share, n = percentile / 100, len(ordered)
    reach = 1.96 * math.sqrt(n * share * (1 - share))
    low, high = math.floor(n * share - reach), math.ceil(n * share + reach)
    if low < 0 or high >= n or ordered[low] <= 0:
        return Figure(value, math.nan, math.nan, value, value, 1, None, 0)
    least, most = float(ordered[low]), float(ordered[high])
    return Figure(value, least, most, value, value, 1, math.log(most / least) / (2 * 1.96), n - 1)


@dataclass(frozen=True)
class Ratio:
    """b / a with its 95 % interval; NaN bounds where one side says nothing of its own uncertainty."""

    value: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        return self.low > 1 or self.high < 1


def ratio(b: Figure, a: Figure) -> Ratio:
    """Welch's interval on the difference of the logarithms."""
    value = b.value / a.value
    if a.log_se is None or b.log_se is None:
        return Ratio(value, math.nan, math.nan)
    variance = a.log_se**2 + b.log_se**2
    if not variance:
        return Ratio(value, value, value)
    df = variance**2 / (a.log_se**4 / a.df + b.log_se**4 / b.df)
    reach = t_quantile(df) * math.sqrt(variance)
    return Ratio(value, value * math.exp(-reach), value * math.exp(reach))


def mean_ratio(ratios: Sequence[Ratio]) -> Ratio | None:
    """The geometric mean over several loads; its interval takes their errors as independent. None without any."""
    if not ratios:
        return None
    logs = [math.log(r.value) for r in ratios]
    middle = math.fsum(logs) / len(logs)
    if any(math.isnan(r.low) for r in ratios):
        return Ratio(math.exp(middle), math.nan, math.nan)
    reach = math.sqrt(math.fsum((math.log(r.high / r.low) / 2) ** 2 for r in ratios)) / len(ratios)
    return Ratio(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach))


def rates_of_stretches(done_s: ArrayLike, weight: float) -> list[float]:
    """Finished items per second in STRETCHES equal parts of the run. [] where there are too few to cut."""
    ordered = np.sort(np.asarray(done_s, dtype=np.float64))
    if len(ordered) < 5 * STRETCHES:
        return []
    edges = np.linspace(0, ordered[-1], STRETCHES + 1)
    counts, _ = np.histogram(ordered, edges)
    return [float(rate) for rate in counts * weight / (edges[1] - edges[0])]


def paired_bootstrap(differences: ArrayLike, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences, resampling the pairs. NaN for fewer than two."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    means = [float(values[random.integers(0, len(values), len(values))].mean()) for _ in range(draws)]
    low, high = np.percentile(means, (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)))
    return float(low), float(high)


def median_interval(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """Median and its 95 % interval (percentile bootstrap)."""
    draw = random.Random(seed)  # noqa: S311 - a statistic, not a secret
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(draws))
    return statistics.median(values), medians[draws // 40], medians[draws - draws // 40 - 1]
