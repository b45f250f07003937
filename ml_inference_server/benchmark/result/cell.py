"""What a row measures: a batch size under a closed or an open load."""

from typing import NamedTuple

from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.experiment import ExperimentSettings


class Cell(NamedTuple):
    """One row to be measured: `concurrency` in a closed loop, `rate_per_s` requests per second in an open one."""

    batch_size: int
    concurrency: int = 0
    rate_per_s: float = 0.0

    @property
    def is_open(self) -> bool:
        return bool(self.rate_per_s)

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {load_of(self.concurrency, self.rate_per_s)}"

    def seconds(self, load: ExperimentSettings) -> float:
        """How long it is meant to take; 0 where only the server decides."""
        return load.duration_s or (load.benchmark_requests / self.rate_per_s if self.is_open else 0.0)


def load_of(concurrency: int | None, rate_per_s: float | None) -> str:
    return f"{rate_per_s:g} requests/s offered" if rate_per_s else f"concurrency {concurrency}"


def cells_of(experiment: ExperimentSettings) -> list[Cell]:
    """All combinations, batch sizes outermost, the closed loop before the open one."""
    return [
        cell
        for batch_size in experiment.batch_sizes
        for cell in (
            *(Cell(batch_size, concurrency=level) for level in experiment.concurrency_levels),
            *(Cell(batch_size, rate_per_s=rate) for rate in experiment.arrival.rates),
        )
    ]


def planned_rows(experiment: ExperimentSettings) -> int:
    """Rows that are asked for, over all repeats; of a search, the confirming ones count.

    ConfigError if there are none, or if they cannot be sent as asked.
    """
    searched = len(experiment.batch_sizes) if experiment.slo.p99_ms is not None else 0
    rows = (len(cells_of(experiment)) + searched) * experiment.repeats
    if not rows:
        raise ConfigError(
            "nothing to measure: give experiment.concurrency_levels, experiment.arrival.rates or experiment.slo.p99_ms"
        )
    if experiment.streaming and experiment.workload == "pairs":
        raise ConfigError(
            "experiment.streaming is for embeddings: use experiment.workload queries or passages, or no streaming"
        )
    return rows
