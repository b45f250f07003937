"""What several processes count, added up: the same as one process that had counted all of it."""

import functools
import math
import pickle
import random
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from ml_inference_server.metrics.merged import MergedMetrics
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.metrics.report import Report, summed_gpu
from ml_inference_server.metrics.table import CLOSED_BY, METHODS, MOST_CALLERS, REASONS, TABLE
from ml_inference_server.utils.stages import Stamps
from tests.unit.test_metrics_registry import Clock

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
# Of the moment, or of the processes themselves.
OF_PROCESSES = {row.name for row in TABLE if row.name.startswith("process_")} | {"mlis_workers", "mlis_uptime_seconds"}


def sent(metrics: Metrics) -> Report:
    """As it arrives at the supervisor."""
    report: Report = pickle.loads(pickle.dumps(metrics.report()))  # noqa: S301 - its own
    return report


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def something(rng: random.Random, *all_of: Metrics) -> None:
    """One event, noted by all of them."""
    method, seconds, caller = rng.choice(METHODS), rng.uniform(1e-6, 2), f"caller-{rng.randrange(4)}"
    failed, texts = rng.random() < 0.3, rng.randrange(1, 9)
    reason, closed_by = rng.choice(REASONS), rng.choice(CLOSED_BY)
    stamps = None if failed else Stamps(*(share * seconds for share in (0, 0.01, 0.05, 0.25, 0.95, 0.98)))
    for metrics in all_of:
        metrics.name_callers([caller])
        metrics.request_started(method)
        metrics.request_finished(
            method,
            "INTERNAL" if failed else "OK",
            seconds,
            texts=texts,
            stamps=stamps,
            reason=reason if failed else "",
            request_id=f"id-{texts}",
            caller=caller,
        )
        metrics.tokenized(texts, 9 * texts, seconds / 9, caller)
        metrics.texts_shared(1)
        metrics.cache_looked_up(hits=1, misses=2)
        metrics.observe_loop_lag(seconds / 100)
        metrics.batch_finished(
            texts=texts,
            tokens=9 * texts,
            padded_tokens=10 * texts,
            queue_s=[seconds / 3] * texts,
            compute_s=seconds / 2,
            closed_by=closed_by,
            ok=not failed,
            lengths=[9] * texts,
        )


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_is_what_one_process_would_have_counted(seed: int) -> None:
    rng, clock = random.Random(seed), Clock()
    one, parts = Metrics(window_s=30, clock=clock), [Metrics(window_s=30, clock=clock) for _ in range(3)]
    merged = MergedMetrics(window_s=30, clock=clock)
    for _ in range(200):
        something(rng, one, rng.choice(parts))
        clock.now_s += rng.uniform(0, 0.2)
        if rng.random() < 0.1:
            merged.put(place := rng.randrange(3), sent(parts[place]))
    for place, part in enumerate(parts):
        merged.put(place, sent(part))
    expected, found = samples(one.prometheus(OPENMETRICS)[0]), samples(merged.prometheus(OPENMETRICS)[0])
    assert expected.keys() == found.keys()
    differing = {
        key: (value, found[key])
        for key, value in expected.items()
        if not math.isclose(value, found[key], rel_tol=1e-9) and key[0] not in OF_PROCESSES
    }
    assert differing == {}
    alone, together = one.snapshot(), merged.snapshot()
    for name in ("errors_by_reason", "distributions", "totals", "in_flight"):
        assert together[name] == alone[name], name
    for name in ("requests_per_s", "latency_ms", "stages_ms"):  # each process rounds its sums to nanoseconds
        assert together[name] == pytest.approx(alone[name], rel=1e-6, abs=1e-5), name
    model_alone, model_together = one.model_figures(), merged.model_figures()
    assert (model_together.answered, model_together.rows, model_together.batches) == (
        model_alone.answered,
        model_alone.rows,
        model_alone.batches,
    )
    closed_alone, closed_together = one.take_closed()[0], merged.take_closed()[0]
    assert dict(closed_together.sums) == pytest.approx(dict(closed_alone.sums), rel=1e-6)


def test_a_process_that_ended_keeps_its_counts_and_loses_its_gauges() -> None:
    clock = Clock()
    merged = MergedMetrics(window_s=30, clock=clock, ready=lambda: 1, restarts=lambda: 1)
    first, second = Metrics(window_s=30, clock=clock), Metrics(window_s=30, clock=clock)
    for metrics, queued in ((first, 5), (second, 7)):
        metrics.watch(queue_texts=functools.partial(int, queued), queue_tokens=int, batches_in_flight=int, slots=2)
        something(random.Random(1), metrics)
    merged.put(0, sent(first))
    merged.put(1, sent(second))
    both = samples(merged.prometheus(OPENMETRICS)[0])
    cpu = ("process_cpu_seconds_total", ())
    assert (both["mlis_queue_texts", ()], both["mlis_batch_slots", ()]) == (12, 4)
    merged.retire(0)
    merged.retire(0)  # it has ended once
    merged.retire(9)  # and this one has never been
    one_left = samples(merged.prometheus(OPENMETRICS)[0])
    assert (one_left["mlis_queue_texts", ()], one_left["mlis_batch_slots", ()]) == (7, 2)
    assert (one_left["mlis_workers", ()], one_left["mlis_worker_restarts_total", ()]) == (1, 1)
    kinds = {row.name: row.kind for row in TABLE}
    fallen = {
        key: (value, one_left[key])
        for key, value in both.items()
        if one_left[key] < value and kinds.get(key[0]) != "gauge"
    }
    assert fallen == {}
    assert one_left[cpu] >= both[cpu]
    again = Metrics(window_s=30, clock=clock)
    something(random.Random(2), again)
    merged.put(0, sent(again))
    assert merged.snapshot()["totals"]["requests"] == 3


def test_the_names_of_callers_stay_as_few_as_those_of_one_process() -> None:
    clock = Clock()
    merged = MergedMetrics(window_s=30, clock=clock)
    for process in range(2):
        metrics = Metrics(window_s=30, clock=clock)
        names = [f"caller-{process}-{number}" for number in range(MOST_CALLERS)]
        metrics.name_callers(names)
        for name in names:
            metrics.request_started("Embed")
            metrics.request_finished("Embed", "OK", 0.01, caller=name)
        merged.put(process, sent(metrics))
    lines = [
        line for line in merged.prometheus("")[0].decode().splitlines() if line.startswith("mlis_caller_requests_total")
    ]
    assert len(lines) == MOST_CALLERS + 1
    assert sum(float(line.split()[-1]) for line in lines) == 2 * MOST_CALLERS
    assert f'mlis_caller_requests_total{{caller="other"}} {MOST_CALLERS}' in lines


def test_seconds_are_told_as_many_as_the_slots_cover() -> None:
    """Two processes whose slots do not begin together: a rate is that of all over the mean of their seconds."""
    clock = Clock()
    merged = MergedMetrics(window_s=30, clock=clock)
    early = Metrics(window_s=30, clock=clock)
    clock.now_s += 0.5
    late = Metrics(window_s=30, clock=clock)
    for metrics in (early, late):
        something(random.Random(1), metrics)
    clock.now_s += 0.6
    merged.put(0, sent(early))
    merged.put(1, sent(late))
    closed, covered_s = merged.take_closed()
    assert (closed.sums["requests"], covered_s) == (1, 0.5)
    assert merged.take_closed()[1] == 0.0


def test_memory_of_one_gpu_is_added_up_and_its_size_is_not() -> None:
    gpu: dict[str, Any] = {"kind": "cuda", "name": "g", "memory_bytes": 3, "reserved_bytes": 5, "total_bytes": 80}
    assert summed_gpu([None, gpu, gpu]) == gpu | {"memory_bytes": 6, "reserved_bytes": 10}
    assert summed_gpu([None]) is None


@pytest.mark.parametrize("seed", range(20))
def test_no_counter_falls_by_the_last_digit_when_a_process_ends(seed: int) -> None:
    """The sum of three fractions is another one in another order; to Prometheus a counter that falls has begun anew."""
    rng, clock = random.Random(seed), Clock()
    merged = MergedMetrics(window_s=30, clock=clock)
    parts = [Metrics(window_s=30, clock=clock) for _ in range(5)]
    for place, part in enumerate(parts):
        for _ in range(20):
            something(rng, part)
        merged.put(place, sent(part))
    counters = {row.name for row in TABLE if row.kind == "counter"}
    before = samples(merged.prometheus(OPENMETRICS)[0])
    for place in rng.sample(range(5), 5):
        merged.retire(place)
        after = samples(merged.prometheus(OPENMETRICS)[0])
        falling = [key for key in before if after[key] < before[key] and key[0].endswith(("_total", "_sum", "_count"))]
        assert falling == []
        assert {key[0] for key in after} >= counters
        before = after
