import json
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import ml_inference_server.metrics
from ml_inference_server.metrics.history import COLUMNS
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.metrics.system import SystemSampler, gpu_figures
from ml_inference_server.metrics.table import CLOSED_BY, CODES, METHODS, TABLE
from ml_inference_server.metrics.window import RELATIVE_ERROR

DOCUMENT = Path(ml_inference_server.metrics.__file__).parent.parent / "docs" / "metrics.md"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics(window_s=30, clock=clock)


def series(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    body, _ = metrics.prometheus("")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_text(body.decode())
        for sample in family.samples
    }


def answer(metrics: Metrics, method: str, code: str, seconds: float, **answered: Any) -> None:
    metrics.request_started(method)
    metrics.request_finished(method, code, seconds, **answered)


def batch(metrics: Metrics, **changes: Any) -> None:
    figures: dict[str, Any] = {
        "texts": 4,
        "tokens": 90,
        "padded_tokens": 100,
        "queue_s": [0.001, 0.002, 0.003, 0.006],
        "compute_s": 0.02,
        "closed_by": "idle",
        "ok": True,
    }
    metrics.batch_finished(**(figures | changes))


def test_nothing_happened_yet(metrics: Metrics) -> None:
    figures = metrics.snapshot()
    assert figures["latency_ms"] is None
    assert figures["loop_lag_ms"] is None
    assert figures["batch"] == {
        "mean_size": None,
        "per_s": 0,
        "padding_share": None,
        "mean_compute_ms": None,
        "mean_padding_ms": None,
        "mean_queue_ms": None,
        "busy_share": None,
        "closed_by": dict.fromkeys(CLOSED_BY, 0),
    }
    assert figures["stages_ms"] is None
    assert figures["queue"] == {"texts": 0, "tokens": 0, "batches_in_flight": 0, "batch_slots": 0}
    assert figures["in_flight"] == dict.fromkeys(METHODS, 0)
    assert figures["totals"]["requests"] == 0
    assert figures["rss_bytes"] > 0
    json.dumps(figures, allow_nan=False)


def test_counts_equal_what_was_fed_and_percentiles_keep_their_error(metrics: Metrics, clock: Clock) -> None:
    choose = random.Random(7)
    ledger: Counter[tuple[str, str]] = Counter()
    answered_s: list[float] = []
    texts = pairs = 0
    for _ in range(4000):
        clock.now_s += 0.005
        method, code = choose.choice(METHODS), choose.choice(CODES if choose.random() < 0.2 else ["OK"])
        seconds = choose.lognormvariate(-4, 1.5)
        ok = code == "OK"
        new_texts = choose.randrange(50) if ok and method == "Embed" else 0
        new_pairs = choose.randrange(50) if ok and method in ("Score", "Rerank") else 0
        answer(metrics, method, code, seconds, texts=new_texts, pairs=new_pairs)
        ledger[method, code] += 1
        texts, pairs = texts + new_texts, pairs + new_pairs
        if ok:
            answered_s.append(seconds)

    figures = metrics.snapshot()
    totals = figures["totals"]
    errors = sum(count for (_, code), count in ledger.items() if code != "OK")
    assert {(m, c): n for m, codes in totals["by_method_and_code"].items() for c, n in codes.items()} == dict(ledger)
    assert (totals["requests"], totals["errors"], totals["texts"], totals["pairs"]) == (4000, errors, texts, pairs)
    assert figures["uptime_s"] == pytest.approx(20)
    assert figures["requests_per_s"] == pytest.approx(4000 / 20)
    assert figures["answered_per_s"] == pytest.approx((4000 - errors) / 20)
    assert figures["errors_per_s"] == pytest.approx(errors / 20)
    assert figures["texts_per_s"] == pytest.approx(texts / 20)
    assert figures["pairs_per_s"] == pytest.approx(pairs / 20)
    answered_s.sort()
    latency_ms = figures["latency_ms"]
    assert latency_ms["avg"] == pytest.approx(1e3 * sum(answered_s) / len(answered_s), rel=1e-6)
    for name, share in (("p50", 50), ("p95", 95), ("p99", 99)):
        exact_s = answered_s[-(-share * len(answered_s) // 100) - 1]
        assert latency_ms[name] == pytest.approx(1e3 * exact_s, rel=RELATIVE_ERROR * 1.001)

    lines = series(metrics)
    for method in METHODS:
        for code in CODES:
            labels = (("code", code), ("method", method))
            assert lines["mlis_requests_total", labels] == ledger[method, code]
        by_outcome = [
            lines["mlis_request_duration_seconds_count", (("method", method), ("outcome", outcome))]
            for outcome in ("ok", "error")
        ]
        assert by_outcome == [ledger[method, "OK"], sum(ledger[method, code] for code in CODES if code != "OK")]


def test_the_window_forgets_and_the_totals_do_not(metrics: Metrics, clock: Clock) -> None:
    answer(metrics, "Embed", "OK", 0.01, texts=3)
    batch(metrics)
    metrics.observe_loop_lag(0.002)
    assert metrics.snapshot()["loop_lag_ms"]["p99"] == pytest.approx(2, rel=RELATIVE_ERROR)
    clock.now_s += 31
    figures = metrics.snapshot()
    assert (figures["requests_per_s"], figures["latency_ms"], figures["loop_lag_ms"]) == (0, None, None)
    assert figures["batch"]["mean_size"] is None
    assert (figures["totals"]["texts"], figures["totals"]["batches"]) == (3, 1)


def test_a_failed_request_has_no_latency(metrics: Metrics) -> None:
    answer(metrics, "Embed", "UNAVAILABLE", 0.01)
    assert metrics.snapshot()["latency_ms"] is None


def test_batches(metrics: Metrics, clock: Clock) -> None:
    clock.now_s += 10
    batch(metrics)
    batch(metrics, texts=8, tokens=290, padded_tokens=300, queue_s=[0.0] * 8, compute_s=0.04, closed_by="tokens")
    batch(metrics, closed_by="full", ok=False)
    figures = metrics.snapshot()
    assert figures["batch"] == {
        "mean_size": 6,
        "per_s": pytest.approx(0.2),
        "padding_share": 20 / 400,
        "mean_compute_ms": pytest.approx(30),
        "mean_padding_ms": pytest.approx(1.5),
        "mean_queue_ms": pytest.approx(1),
        "busy_share": None,
        "closed_by": dict.fromkeys(CLOSED_BY, 0) | {"idle": 1, "tokens": 1},
    }
    totals = figures["totals"]
    assert [totals[name] for name in ("batches", "failed_batches", "tokens", "padding_tokens")] == [3, 1, 380, 20]
    assert figures["tokens_per_s"] == pytest.approx(38)
    lines = series(metrics)
    assert lines["mlis_batches_total", (("closed_by", "full"), ("outcome", "error"))] == 1
    assert lines["mlis_batch_texts_sum", ()] == 12
    assert lines["mlis_queue_wait_seconds_count", ()] == 12
    assert lines["mlis_batch_compute_seconds_bucket", (("le", "0.0256"),)] == 1


def test_tokenizing(metrics: Metrics) -> None:
    metrics.tokenized(3, 42, 0.001)
    metrics.tokenized(1, 8, 0.002)
    lines = series(metrics)
    assert (lines["mlis_tokenized_texts_total", ()], lines["mlis_tokenized_tokens_total", ()]) == (4, 50)
    assert lines["mlis_tokenize_duration_seconds_count", ()] == 2


def test_gauges_follow_what_is_watched(metrics: Metrics) -> None:
    queue = SimpleNamespace(texts=5, tokens=70)
    metrics.watch(queue_texts=lambda: queue.texts, queue_tokens=lambda: queue.tokens, batches_in_flight=lambda: 2)
    metrics.request_started("Rerank")
    metrics.request_started("Rerank")
    metrics.request_finished("Rerank", "OK", 0.1, pairs=1)
    assert metrics.snapshot()["queue"] == {
        "texts": 5,
        "tokens": 70,
        "batches_in_flight": 2,
        "batch_slots": 1,
    }
    queue.texts = 0
    lines = series(metrics)
    assert (lines["mlis_queue_texts", ()], lines["mlis_queue_tokens", ()]) == (0, 70)
    assert lines["mlis_in_flight_batches", ()] == 2
    assert lines["mlis_in_flight_requests", (("method", "Rerank"),)] == 1
    assert metrics.snapshot()["in_flight"]["Rerank"] == 1


def test_no_input_makes_a_new_series(metrics: Metrics) -> None:
    at_start = series(metrics).keys()
    for number in range(50):
        answer(metrics, f"Made up {number}", f"CODE_{number}", 0.01)
    assert series(metrics).keys() == at_start
    assert metrics.snapshot()["totals"]["by_method_and_code"]["other"] == {"UNKNOWN": 50}
    assert metrics.snapshot()["in_flight"]["other"] == 0


def test_openmetrics_is_given_where_it_is_asked_for(metrics: Metrics) -> None:
    answer(metrics, "Embed", "OK", 0.01)
    body, content_type = metrics.prometheus("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    families = {family.name: family for family in parse_openmetrics(body.decode())}  # a strict parser
    assert set(families) == {row.name.removesuffix("_total") for row in TABLE}
    for row in TABLE:
        family = families[row.name.removesuffix("_total")]
        assert (family.type, family.unit, family.documentation) == (row.kind, row.unit, row.help)


def test_the_process_wide_registry_stays_untouched(metrics: Metrics) -> None:
    Metrics(window_s=5)  # a second one does not collide
    assert b"mlis_" not in prometheus_client.generate_latest(prometheus_client.REGISTRY)


def test_system_figures_are_sampled_once_a_second() -> None:
    sampler = SystemSampler(100.0)
    first = sampler.sample(100.9)
    assert sampler.sample(100.99) is first
    second = sampler.sample(101.5)
    assert second is not first
    assert second.cpu_seconds >= first.cpu_seconds > 0
    assert second.cpu_percent == pytest.approx(100 * (second.cpu_seconds - first.cpu_seconds) / 1.5)
    assert 0 <= second.machine_cpu_percent <= 100


def test_gpu_memory_is_read_only_where_a_gpu_is_in_use() -> None:
    idle = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False), mps=SimpleNamespace())
    busy = SimpleNamespace(
        cuda=SimpleNamespace(
            is_initialized=lambda: True,
            current_device=lambda: 0,
            get_device_properties=lambda _: SimpleNamespace(name="Some GPU", total_memory=1000),
            memory_allocated=lambda: 10,
            memory_reserved=lambda: 20,
        )
    )
    apple = SimpleNamespace(
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: True)),
        mps=SimpleNamespace(
            current_allocated_memory=lambda: 5, driver_allocated_memory=lambda: 6, recommended_max_memory=lambda: 7
        ),
    )
    half_imported = SimpleNamespace()
    assert [gpu_figures(torch) for torch in (None, half_imported, idle)] == [None, None, None]
    assert gpu_figures(busy) == {
        "kind": "cuda",
        "name": "Some GPU",
        "memory_bytes": 10,
        "reserved_bytes": 20,
        "total_bytes": 1000,
    }
    assert gpu_figures(apple) == {
        "kind": "mps",
        "name": "Apple GPU",
        "memory_bytes": 5,
        "reserved_bytes": 6,
        "total_bytes": 7,
    }


def table_rows(heading: str) -> dict[str, list[str]]:
    section = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.M)
    body = next(part for part in section if part.startswith(heading))
    return {
        cells[0].strip("` "): [cell.strip() for cell in cells[1:]]
        for line in body.splitlines()
        if line.startswith("| `") and (cells := line.strip("|").split("|"))
    }


def paths(tree: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for name, value in tree.items():
        found.add(prefix + name)
        if isinstance(value, dict) and name not in ("by_method_and_code", "errors_by_reason"):
            found |= paths(value, f"{prefix}{name}.")
    return found


def test_every_json_field_is_documented_and_no_other(metrics: Metrics) -> None:
    answer(metrics, "Embed", "OK", 0.01)
    metrics.observe_loop_lag(0.001)
    of_routes = {"readiness", "readiness.ready", "readiness.reason", "workers", "hints", "benchmark"}
    of_benchmarks = {f"benchmark.{name}" for name in ("name", "row", "rows", "label", "done", "eta_s")}
    of_gpus = {f"gpu.{name}" for name in ("kind", "name", "memory_bytes", "reserved_bytes", "total_bytes")}
    assert set(table_rows("JSON")) == paths(metrics.snapshot()) | of_routes | of_benchmarks | of_gpus


def test_every_metric_is_documented_as_it_is() -> None:
    documented = table_rows("Prometheus")
    assert documented == {row.name: [row.kind, row.unit, ", ".join(row.labels), row.help] for row in TABLE}


def test_every_column_of_the_history_is_documented() -> None:
    assert list(table_rows("History")) == list(COLUMNS)


def test_callers_are_counted_by_the_names_of_their_keys_and_by_nothing_else(metrics: Metrics) -> None:
    metrics.name_callers(["search", "nightly"])
    answer(metrics, "Embed", "OK", 0.01, caller="search")
    answer(metrics, "Embed", "RESOURCE_EXHAUSTED", 0.01, caller="nightly", reason="CALLER_LIMIT")
    answer(metrics, "Embed", "OK", 0.01, caller="192.0.2.1")
    metrics.tokenized(2, 30, 0.001, "search")
    metrics.tokenized(2, 5, 0.001, "192.0.2.1")
    found = series(metrics)
    by_caller = {
        (name.removeprefix("mlis_caller_"), labels[0][1]): value
        for (name, labels), value in found.items()
        if name.startswith("mlis_caller_") and value
    }
    assert by_caller == {
        ("requests_total", "search"): 1,
        ("requests_total", "nightly"): 1,
        ("requests_total", "other"): 1,
        ("tokens_total", "search"): 30,
        ("tokens_total", "other"): 5,
        ("limited_requests_total", "nightly"): 1,
    }


def test_no_more_callers_than_the_first_32_get_series(metrics: Metrics) -> None:
    metrics.name_callers([f"key-{number}" for number in range(20)])
    metrics.name_callers([f"key-{number}" for number in range(10, 100)])  # after a change of the file
    answer(metrics, "Embed", "OK", 0.01, caller="key-31")
    answer(metrics, "Embed", "OK", 0.01, caller="key-32")
    requests = {
        labels[0][1]: value for (name, labels), value in series(metrics).items() if name == "mlis_caller_requests_total"
    }
    assert len(requests) == 33
    assert (requests["key-31"], requests["other"]) == (1, 1)
