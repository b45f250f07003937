import json
import sys

import pytest

from ml_inference_server.metrics.history import COARSE_ROWS, COLUMNS, FINE_ROWS, History
from ml_inference_server.metrics.registry import Metrics


class Rig:
    """Metrics on a clock of the test's, and a history fed from them once a second."""

    def __init__(self, window_s: int = 30) -> None:
        self.now_s = 0.0
        self.metrics = Metrics(window_s=window_s, clock=lambda: self.now_s)
        self.history = History()

    def answer(self, times: int, seconds: float = 0.01) -> None:
        for _ in range(times):
            self.metrics.request_started("Embed")
            self.metrics.request_finished("Embed", "OK", seconds, texts=2)

    def tick(self) -> str | None:
        self.now_s += 1
        closed, covered_s = self.metrics.take_closed()
        return self.history.add(closed, covered_s, self.metrics.gauges(), 1e9 + self.now_s)[1]

    def told(self) -> dict[str, list[dict[str, float | None]]]:
        tree = json.loads(self.history.json())
        assert tree["columns"] == list(COLUMNS)
        return {
            name: [dict(zip(COLUMNS, row, strict=True)) for row in tree[name]["rows"]] for name in ("fine", "coarse")
        }


@pytest.mark.parametrize("window_s", [1, 5, 30])
def test_each_second_is_told_once_and_exactly(window_s: int) -> None:
    rig = Rig(window_s)
    for second in range(20):
        rig.answer(second)
        rig.tick()
    told = rig.told()
    assert [row["requests_per_s"] for row in told["fine"]] == pytest.approx(list(range(20)), rel=1e-3)
    assert [row["texts_per_s"] for row in told["coarse"]] == pytest.approx([2 * 4.5, 2 * 14.5], rel=1e-3)


def test_percentiles_are_those_of_the_step() -> None:
    rig = Rig()
    rig.answer(10, 0.010)
    rig.tick()
    rig.tick()
    rig.answer(10, 0.100)
    rig.tick()
    fast, nothing, slow = rig.told()["fine"]
    assert fast["latency_p99_ms"] == pytest.approx(10, rel=0.011)
    assert nothing["latency_p99_ms"] is None
    assert slow["latency_p50_ms"] == pytest.approx(100, rel=0.011)
    assert nothing["requests_per_s"] == 0


def test_the_coarse_step_keeps_the_highest_queue() -> None:
    rig = Rig()
    depth = 0
    rig.metrics.watch(queue_texts=lambda: depth, queue_tokens=int, batches_in_flight=int)
    coarse = []
    for second in range(10):
        depth = 70 if second == 4 else 0
        coarse.append(rig.tick())
    assert coarse[:9] == [None] * 9
    [row] = rig.told()["coarse"]
    assert row["queue_texts"] == 70


def test_an_hour_fits_in_fixed_memory() -> None:
    rig = Rig()
    for second in range(4000):
        rig.answer(1, seconds=0.001 * (1 + second % 977))
        rig.tick()
    told = rig.told()
    assert (len(told["fine"]), len(told["coarse"])) == (FINE_ROWS, COARSE_ROWS)
    assert told["fine"][-1]["time_unix_s"] == 1e9 + 4000
    assert told["coarse"][0]["time_unix_s"] == 1e9 + 410
    assert sys.getsizeof(rig.history.json()) < 200_000
