"""The highest rate that a server bears within a bound on its 99th percentile: bracket, bisect, confirm."""

import math

import numpy as np

from ml_inference_server.benchmark.load.loops import ClosedLoop, ServerGone, sender
from ml_inference_server.benchmark.load.records import Records, ok_only
from ml_inference_server.benchmark.measure.progress import row_work
from ml_inference_server.benchmark.measure.suite import Bench, measure_row
from ml_inference_server.benchmark.result.cell import Cell
from ml_inference_server.benchmark.result.document import Cause, HighestRate, Probe, Purpose, Run, Status
from ml_inference_server.benchmark.result.stats import samples_needed

PERCENTILE = 99
# The search ends when it knows the rate to within this factor.
PRECISION = 1.05
_MOST_PROBES = 20
_LOWEST_SHARE = 1 / 64
# How many requests are in flight while the search looks for its first rate.
_FIRST_CONCURRENCY = 8
_FIRST_SHARE = 0.7


class RateSearch:
    """Which rate to try next. `low` is the highest that met the bound, `high` the lowest that did not."""

    def __init__(self, first: float) -> None:
        self._first = first
        self.low = 0.0
        self.high = math.inf
        self._probes = 0

    def next(self) -> float | None:
        """None: the search is over."""
        if self._probes >= _MOST_PROBES or self.high <= self._first * _LOWEST_SHARE:
            return None
        if self.low == 0.0:
            return self._first if math.isinf(self.high) else self.high / 2
        if math.isinf(self.high):
            return self.low * 2
        return None if self.high / self.low <= PRECISION else math.sqrt(self.low * self.high)

    def tell(self, rate: float, met: bool) -> None:
        self._probes += 1
        if met:
            self.low = max(self.low, rate)
        else:
            self.high = min(self.high, rate)
            self.low = self.low if self.low < self.high else 0.0


def meets(run: Run, p99_ms: float) -> bool:
    """Whether a row kept the bound: all answered as fast as offered, the sender in time, the percentile within it."""
    if run.status is not Status.VALID or run.fell_behind or run.latency_ms is None:
        return False
    return run.latency_ms.p99 <= p99_ms


def requests_of(bench: Bench) -> int:
    """So many that the percentile is earned."""
    return max(bench.load.benchmark_requests, samples_needed(PERCENTILE))


async def search(bench: Bench, batch_size: int, units: float) -> bool:
    """Find the rate for one batch size and add it to the results, with every probe; False if the server was lost."""
    p99_ms = bench.load.slo.p99_ms or 0.0
    requests = requests_of(bench)
    bench.progress.begin(f"batch {batch_size}, search for p99 <= {p99_ms:g} ms", units / 4, counts=False)
    try:
        first = await bench.stop.race(_closed_rate(bench, batch_size))
    except ServerGone:
        return False
    rates = RateSearch(max(first * _FIRST_SHARE, 0.1))
    found = HighestRate(
        variant=bench.info.variant,
        batch_size=batch_size,
        p99_ms=p99_ms,
        rate_per_s=None,
        probes=[],
        requests=requests,
    )
    bench.result.searched(found)
    tried = 0
    while rate := _rounded(rates.next()):
        tried += 1
        bench.progress.begin(f"batch {batch_size}, trying {rate:g} requests/s", units / 8, counts=False)
        run = await measure_row(bench, Cell(batch_size, rate_per_s=rate), tried, slo=Purpose.PROBE, requests=requests)
        if run.lost:
            return False
        found = _tried(bench, found, run, rate)
        rates.tell(rate, meets(run, p99_ms))
    return await _confirm(bench, batch_size, rates.low, found, requests)


async def _confirm(bench: Bench, batch_size: int, rate: float, found: HighestRate, requests: int) -> bool:
    """Measure the found rate again under other schedules; a rate that fails is lowered until one holds."""
    p99_ms = bench.load.slo.p99_ms or 0.0
    attempt = 0
    while rate and attempt < _MOST_PROBES:
        attempt += 1
        rate = _rounded(rate) or 0.0
        runs: list[Run] = []
        for repeat in range(1, bench.load.repeats + 1):
            cell = Cell(batch_size, rate_per_s=rate)
            bench.progress.begin(f"{cell}, to confirm it", row_work(cell, bench.load))
            # Other schedules than those of the search, which chose the rate that was lucky with them.
            seed = 1_000_003 * attempt + bench.load.seed
            run = await measure_row(bench, cell, repeat, slo=Purpose.CONFIRMATION, requests=requests, seed=seed)
            if run.lost:
                return False
            runs.append(run)
            if not meets(run, p99_ms):
                break
        if all(meets(run, p99_ms) for run in runs):
            bench.result.searched(found.model_copy(update={"rate_per_s": rate}))
            return True
        bench.result.call_probes(runs)
        bench.progress.skip(-len(runs), 0.0)
        found = _tried(bench, found, runs[-1], rate)
        rate /= PRECISION
    bench.result.plan(-bench.load.repeats)  # nothing to confirm; the section of the report says so
    return True


def _tried(bench: Bench, found: HighestRate, run: Run, rate: float) -> HighestRate:
    """The search with one probe more, as the results now say it."""
    probe = Probe(
        rate_per_s=rate,
        p99_ms=round(run.latency_ms.p99, 3) if run.latency_ms else None,
        met=meets(run, found.p99_ms),
        reason=run.reason or ("it fell behind" if run.fell_behind else ""),
        client_late=run.cause is Cause.CLIENT_LATE,
    )
    found = found.model_copy(update={"probes": [*found.probes, probe]})
    bench.result.searched(found)
    return found


async def _closed_rate(bench: Bench, batch_size: int) -> float:
    """Requests per second with a few of them in flight: where the search begins."""
    send = sender(bench.target, bench.workload, batch_size, bench.load.request_timeout_ms / 1e3, warmup=True)
    loop = ClosedLoop(send, bench.target.is_alive, lambda _: None)
    await loop.run(max(bench.load.warmup_iterations, 5 * _FIRST_CONCURRENCY), _FIRST_CONCURRENCY)
    records: Records = ok_only(loop.ledger.records())
    return len(records) / float(np.max(records["done_s"])) if len(records) else 0.0


def _rounded(rate: float | None) -> float | None:
    """To three digits: a rate that a person can type again."""
    return None if not rate else float(f"{rate:.3g}")
