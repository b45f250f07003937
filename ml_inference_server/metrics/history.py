"""The last hour, in fixed memory: a row each second for five minutes, a row each ten seconds for an hour.

A row is kept as the JSON that it will be sent as, so that handing out all of them costs no more than joining them.
"""

import json
from collections import deque

from ml_inference_server.metrics.snapshot import Gauges, ratio, times_ms
from ml_inference_server.metrics.window import Slot

COLUMNS = (
    "time_unix_s",
    "requests_per_s",
    "answered_per_s",
    "texts_per_s",
    "pairs_per_s",
    "tokens_per_s",
    "errors_per_s",
    "latency_p50_ms",
    "latency_p95_ms",
    "latency_p99_ms",
    "queue_texts",
    "in_flight",
    "batch_mean_size",
    "padding_share",
    "cpu_percent",
    "rss_bytes",
    "gpu_memory_bytes",
    "loop_lag_p99_ms",
)
FINE_ROWS, COARSE_ROWS = 300, 360
COARSE_S = 10


class History:
    """Fed once a second."""

    def __init__(self) -> None:
        self._fine: deque[str] = deque(maxlen=FINE_ROWS)
        self._coarse: deque[str] = deque(maxlen=COARSE_ROWS)
        self._since_coarse: list[tuple[Slot, float, Gauges]] = []

    def add(self, closed: Slot, covered_s: float, now: Gauges, time_unix_s: float) -> tuple[str, str | None]:
        """The new row of a second, and that of ten seconds once they are full, both as JSON.

        closed, covered_s: what was recorded since the call before. A rate of no time at all is null.
        """
        fine = _row(closed, covered_s, [now], time_unix_s)
        self._fine.append(fine)
        self._since_coarse.append((closed, covered_s, now))
        if len(self._since_coarse) < COARSE_S:
            return fine, None
        whole = Slot()
        for slot, _, _ in self._since_coarse:
            whole.merge(slot)
        covered_s = sum(seconds for _, seconds, _ in self._since_coarse)
        coarse = _row(whole, covered_s, [gauges for _, _, gauges in self._since_coarse], time_unix_s)
        self._coarse.append(coarse)
        self._since_coarse.clear()
        return fine, coarse

    def json(self) -> str:
        """What GET /api/v1/history answers, as docs/metrics.md describes it."""
        columns = json.dumps(COLUMNS)
        return (
            f'{{"schema_version":1,"columns":{columns},"fine":{{"step_s":1,"rows":[{",".join(self._fine)}]}},'
            f'"coarse":{{"step_s":{COARSE_S},"rows":[{",".join(self._coarse)}]}}}}'
        )


def _row(slot: Slot, covered_s: float, moments: list[Gauges], time_unix_s: float) -> str:
    """Rates and percentiles of the slot; of the moments the highest queue and in-flight, and the mean CPU."""
    sums, last = slot.sums, moments[-1]
    latency, lag = times_ms(slot.times["latency"]), times_ms(slot.times["loop_lag"])
    answered = sums["requests"] - sums["errors"]
    counts = (sums["requests"], answered, sums["texts"], sums["pairs"], sums["tokens"], sums["errors"])
    rates = [count / covered_s if covered_s else None for count in counts]
    return json.dumps(
        [
            round(time_unix_s, 1),
            *map(_short, rates),
            *(_short(latency[name]) if latency else None for name in ("p50", "p95", "p99")),
            max(now.queue_texts for now in moments),
            max(sum(now.in_flight.values()) for now in moments),
            _short(ratio(sums["batch_texts"], sums["batches"])),
            _short(ratio(sums["padded_tokens"] - sums["tokens"], sums["padded_tokens"])),
            _short(sum(now.system.cpu_percent for now in moments) / len(moments)),
            last.system.rss_bytes,
            last.system.gpu["memory_bytes"] if last.system.gpu else None,
            _short(lag["p99"]) if lag else None,
        ],
        separators=(",", ":"),
    )


def _short(value: float | None) -> float | None:
    """Four digits are more than a chart can show."""
    return None if value is None else float(f"{value:.4g}")
