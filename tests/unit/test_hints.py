"""A hint is given when the figures carry it, and only then."""

from collections.abc import Callable
from typing import Any

import pytest

from ml_inference_server.metrics.hints import hints
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.utils.stages import STAGE_NAMES, Stamps

STAMPS = Stamps(
    received_at=0.0,
    admitted_at=0.001,
    tokenized_at=0.005,
    engine_started_at=0.015,
    engine_ended_at=0.055,
    gathered_at=0.059,
)

Change = Callable[[dict[str, Any]], None]


def healthy() -> dict[str, Any]:
    """A busy half minute without a fault."""
    now = [0.0]
    metrics = Metrics(window_s=30, clock=lambda: now[0])
    metrics.watch(queue_texts=int, queue_tokens=int, batches_in_flight=int, slots=1)
    now[0] = 30.0
    for _ in range(200):
        metrics.request_started("Embed")
        metrics.request_finished("Embed", "OK", 0.06, texts=4, stamps=STAMPS)
        metrics.batch_finished(
            texts=4, tokens=95, padded_tokens=100, queue_s=[0.01] * 4, compute_s=0.04, closed_by="idle", ok=True,
            lengths=[25, 25, 25, 20],
        )  # fmt: skip
    figures = metrics.snapshot()
    # Whatever runs beside the tests must not speak here.
    return {**figures, "cpu_percent": 90.0, "machine_cpu_percent": 50.0, "cpu_count": 2}


def told(change: Change, **batching: Any) -> list[str]:
    figures = healthy()
    change(figures)
    return hints(figures, lambda: {"batching": batching})


def test_a_healthy_server_gets_no_hint() -> None:
    assert told(lambda _: None) == []


def stages(**shares: float) -> Change:
    return lambda figures: figures["stages_ms"].update({**dict.fromkeys(STAGE_NAMES, 0.0), **shares, "total": 100.0})


def both(*changes: Change) -> Change:
    def change(figures: dict[str, Any]) -> None:
        for one in changes:
            one(figures)

    return change


def padded(figures: dict[str, Any]) -> None:
    figures["batch"].update(padding_share=0.31, mean_padding_ms=12.4, mean_compute_ms=40.0)


BUSY: Change = lambda figures: figures["batch"].update(busy_share=0.97)  # noqa: E731
TIMERS = {"full": 0, "tokens": 0, "timer": 150, "idle": 50, "single": 0, "retry": 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (padded, ["31\u00a0% of the work is padding, about 12.4 ms of each 40.0 ms batch", "more requests in flight"]),
        (both(BUSY, lambda f: f["errors_by_reason"].update(QUEUE_FULL=7)),
         ["The queue is full: 7 requests were refused in the last 30 s", "The model is the limit (97\u00a0% busy)"]),
        (lambda f: f["errors_by_reason"].update(QUEUE_FULL=1), ["1 request was refused", "max_queue_requests"]),
        (lambda f: f["errors_by_reason"].update(WAIT_TOO_LONG=2), ["2 requests were refused", "more would fit"]),
        (both(BUSY, lambda f: f["errors_by_reason"].update(WAIT_TOO_LONG=2)),
         ["waiting would have taken most of the time", "The model is the limit (97\u00a0% busy)"]),
        (lambda f: f["errors_by_reason"].update(CALLER_LIMIT=2), ["2 requests were refused", "server.limits"]),
        (lambda f: f["errors_by_reason"].update(DEADLINE_EXCEEDED=3), ["3 requests ran out of time"]),
        (lambda f: f["errors_by_reason"].update(BACKEND_ERROR=1, NON_FINITE_OUTPUT=1), ["failed on 2 requests"]),
        (lambda f: f.update(truncated_texts=200), ["200 texts were cut at the model's limit"]),
        (lambda f: f["batch"].update(closed_by=TIMERS, busy_share=0.2),
         ["75\u00a0% of the batches waited for batching.timeout_ms", "idle 80\u00a0% of the time"]),
        (both(BUSY, stages(queue=70.0, engine=30.0)), ["Requests spend 70\u00a0% of their time in the queue"]),
        (stages(tokenize=40.0, engine=60.0), ["tokens takes 40\u00a0% of the mean request (40.0 ms)"]),
        (lambda f: f.update(loop_lag_ms={"p99": 80.0}), ["The event loop runs up to 80 ms late"]),
        (lambda f: f.update(machine_cpu_percent=98.0), ["Other processes use 53\u00a0% of this machine's CPU"]),
    ],
)  # fmt: skip
def test_each_hint_is_given_for_its_figures(change: Change, words: list[str]) -> None:
    [sentence] = told(change)
    for expected in words:
        assert expected in sentence


def test_padding_with_length_grouping_off_names_the_setting() -> None:
    [sentence] = told(padded, length_grouping=False)
    assert "batching.length_grouping is off" in sentence


def quiet(figures: dict[str, Any]) -> None:
    figures["batch"]["closed_by"] = {**TIMERS, "timer": 3, "idle": 0}
    figures["requests_per_s"] = 0.1
    padded(figures)
    stages(tokenize=90.0)(figures)


def test_nothing_is_concluded_from_a_handful_of_requests() -> None:
    assert told(quiet) == []
