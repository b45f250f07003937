"""How far a benchmark is: a bar on a terminal, lines elsewhere, and a word to the server's dashboard."""

import sys
import time
from typing import Any

from tqdm import tqdm

from ml_inference_server.benchmark.result.cell import Cell, cells_of, load_of
from ml_inference_server.benchmark.result.document import Run, Status
from ml_inference_server.benchmark.target.counters import ServerCounters
from ml_inference_server.utils.experiment import ExperimentSettings

# How many probes a search takes, roughly.
_PROBES = 8


def work(experiment: ExperimentSettings) -> float:
    """The size of an experiment, in arbitrary units that are in proportion to its time."""
    cells = cells_of(experiment)
    total = sum(row_work(cell, experiment) for cell in cells) * experiment.repeats
    if experiment.slo.p99_ms is not None:
        total += sum(search_work(size, experiment) for size in experiment.batch_sizes)
    return total


def row_work(cell: Cell, load: ExperimentSettings) -> float:
    # In texts where the server decides how long it takes: rows with large batches take longer.
    return cell.batch_size * load.benchmark_requests if not load.duration_s else 1.0


def search_work(batch_size: int, load: ExperimentSettings) -> float:
    return (_PROBES + load.repeats) * row_work(Cell(batch_size), load)


class Progress:
    """One bar for all rows on a terminal; elsewhere one line for each finished row."""

    def __init__(self, name: str, rows: int, total: float) -> None:
        self._name = name
        self._rows = rows
        self._row = 0
        self._label = "starting"
        self._began_s: float | None = None
        self._done = 0.0
        self._total = max(total, 1e-9)
        self._share = 0.0
        self._row_start = 0.0
        self._row_work = 0.0
        self._stream = sys.stderr
        self.sidecar: ServerCounters | None = None
        self._bar = tqdm(
            total=self._total,
            desc="starting",
            file=self._stream,
            disable=not self._stream.isatty(),
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar:30}| {postfix} [{elapsed}<{remaining}]",
        )

    def begin(self, label: str, units: float, *, counts: bool = True) -> None:
        """The next row; `counts`: it is one of the planned ones."""
        self._row += counts
        if self._began_s is None:  # the server's start is no measure for what is left
            self._began_s = time.monotonic()
        self._row_start, self._row_work = self._done, units
        self._label = label
        self._bar.set_description_str(f"row {self._row}/{self._rows}: {label}", refresh=False)
        self.at(0.0)

    def at(self, share: float, note: str = "") -> None:
        """How much of the row under way is done, 0..1."""
        self._share = min(share, 1.0)
        self._move(self._row_start + self._share * self._row_work, note)
        if self.sidecar is not None:
            self.sidecar.announce(self._state(finished=False))

    def _move(self, done: float, note: str = "") -> None:
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._done)
        self._done = done

    def end(self, run: Run) -> None:
        self._move(self._row_start + self._row_work)
        if not self._stream.isatty():
            print(f"row {self._row}/{self._rows}: {describe(run)}{self._left()}", file=self._stream, flush=True)

    def _left(self) -> str:
        seconds = self._eta_s()
        return f" [{tqdm.format_interval(seconds)} left]" if seconds and self._row < self._rows else ""

    def _eta_s(self) -> float | None:
        if self._done <= 0 or self._began_s is None:
            return None
        return (time.monotonic() - self._began_s) * (self._total - self._done) / self._done

    def _state(self, *, finished: bool) -> dict[str, Any]:
        """What the server's dashboard takes; `done` is the share of the row under way."""
        eta_s = self._eta_s()
        return {
            "name": self._name,
            "row": min(max(self._row, 1), self._rows),
            "rows": self._rows,
            "label": self._label[:200],
            "done": 1.0 if finished else round(self._share, 4),
            "eta_s": None if eta_s is None or finished else round(max(eta_s, 0.0), 1),
            "finished": finished,
        }

    async def leave(self) -> None:
        """The server that is measured will not be measured any further."""
        if self.sidecar is not None:
            await self.sidecar.finish(self._state(finished=True))
            self.sidecar = None

    def say(self, line: str) -> None:
        """A line of text above the bar."""
        self._bar.write(line, file=self._stream)

    def skip(self, rows: int, units: float) -> None:
        """Leave out rows that cannot be measured."""
        self._row += rows
        self._move(self._done + units)

    def close(self) -> None:
        self._bar.close()


def describe(run: Run) -> str:
    """One finished row in one line."""
    latency = run.latency_ms
    figures = f"{run.requests_per_s:.1f} requests/s, p50 {latency.p50:.1f} ms" if latency else "no success"
    figures += ", fell behind" if run.fell_behind else ""
    errors = ", ".join(f"{count} {code}" for code, count in run.errors.items()) or "0 errors"
    verdict = "" if run.status is Status.VALID else f" - {run.status.upper()}: {run.reason}"
    variant = f"{run.variant}, " if run.variant else ""
    again = "probe" if run.is_probe else "repeat"
    repeat = f" ({again} {run.repeat})" if run.repeat > 1 else ""
    return (
        f"{variant}batch {run.batch_size}, {load_of(run.concurrency, run.rate_per_s)}{repeat}: {run.ok} ok,"
        f" {errors}, {figures}{verdict}"
    )
