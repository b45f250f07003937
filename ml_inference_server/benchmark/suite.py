"""All rows of one table against one running server."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm import tqdm

from ml_inference_server.benchmark.channel import OK, ServerUnreachable, Target
from ml_inference_server.benchmark.dataset import Workload
from ml_inference_server.benchmark.interrupt import Interrupted, Stop
from ml_inference_server.benchmark.load import (
    Call,
    ClosedLoop,
    Ledger,
    ServerGone,
    latency_summary_ms,
    sender,
)
from ml_inference_server.utils.config import ExperimentSettings
from ml_inference_server.utils.errors import ConfigError


class Cell(NamedTuple):
    """One row to be measured."""

    batch_size: int
    concurrency: int


def cells_of(experiment: ExperimentSettings) -> list[Cell]:
    """All combinations, batch sizes outermost."""
    return [Cell(b, c) for b in experiment.batch_sizes for c in experiment.concurrency_levels]


@dataclass(frozen=True)
class Suite:
    """What is measured. Every row starts at the same first text, so that rows and variants can be compared."""

    cells: Sequence[Cell]
    workload: Workload
    requests: int
    warmup: int
    timeout_s: float

    @property
    def items(self) -> int:
        """Texts or pairs of all measured requests together."""
        return sum(cell.batch_size for cell in self.cells) * self.requests


def refuse_oversized(cells: Sequence[Cell], info: dict[str, Any]) -> None:
    """ConfigError if the server would refuse a row for its size alone."""
    largest = max(cell.batch_size for cell in cells)
    if largest > info["max_texts"]:
        raise ConfigError(
            f"batch size {largest} is more than this server takes in one request ({info['max_texts']}): use a smaller"
            " one, or start the server with a larger server.max_texts"
        )


class Progress:
    """One bar for all rows on a terminal; elsewhere one line for each finished row."""

    def __init__(self, rows: int, items: int) -> None:
        self._rows = rows
        self._row = 0
        self._stream = sys.stderr
        # Counted in texts, not in requests: rows with large batches take longer, and the time left shall be true.
        self._bar = tqdm(
            total=items,
            desc="starting",
            file=self._stream,
            disable=not self._stream.isatty(),
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar:30}| {postfix} [{elapsed}<{remaining}]",
        )

    def begin(self, cell: Cell, requests: int) -> Callable[[Call], None]:
        """The function to call after each request of the next row."""
        self._row += 1
        self._bar.set_description_str(
            f"row {self._row}/{self._rows}: batch {cell.batch_size}, concurrency {cell.concurrency}", refresh=False
        )
        done = 0

        def advance(_call: Call) -> None:
            nonlocal done
            done += 1
            self._bar.set_postfix_str(f"{done}/{requests} requests", refresh=False)
            self._bar.update(cell.batch_size)

        return advance

    def end(self, run: dict[str, Any]) -> None:
        if not self._stream.isatty():
            print(f"row {self._row}/{self._rows}: {describe(run)}", file=self._stream, flush=True)

    def say(self, line: str) -> None:
        """A line of text above the bar."""
        self._bar.write(line, file=self._stream)

    def skip(self, rows: int) -> None:
        """Leave out rows that cannot be measured."""
        self._row += rows

    def close(self) -> None:
        self._bar.close()


def describe(run: dict[str, Any]) -> str:
    """One finished row in one line."""
    latency = run["latency_ms"]
    figures = f"{run['requests_per_s']:.1f} requests/s, p50 {latency['p50']:.1f} ms" if latency else "no success"
    errors = ", ".join(f"{count} {code}" for code, count in run["errors"].items()) or "0 errors"
    verdict = "" if run["status"] == "valid" else f" - {run['status'].upper()}: {run['reason']}"
    variant = f"{run['variant']}, " if run["variant"] else ""
    return (
        f"{variant}batch {run['batch_size']}, concurrency {run['concurrency']}: {run['ok']} ok, {errors},"
        f" {figures}{verdict}"
    )


class _Row:
    """One row while it is measured; `result` is right at every moment."""

    def __init__(self, variant: str, suite: Suite, cell: Cell) -> None:
        self._variant = variant
        self._suite = suite
        self._cell = cell
        self.warmup = Ledger()
        self.ledger = Ledger()
        self.status = ""
        self.reason = ""

    def void(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason

    def result(self) -> dict[str, Any]:
        """The row as it stands in the JSON; times in the unit of their name, None where nothing succeeded."""
        ledger, suite, cell = self.ledger, self._suite, self._cell
        seconds = ledger.seconds
        items = ledger.ok * cell.batch_size
        scores = suite.workload.kind == "pairs"
        pairs, texts = (items, 2 * items) if scores else (0, items)
        status, reason = (self.status, self.reason) if self.status else self._verdict()
        first = ledger.first_error
        return {
            "variant": self._variant,
            "batch_size": cell.batch_size,
            "concurrency": cell.concurrency,
            "workload": suite.workload.kind,
            "status": status,
            "reason": reason,
            "requests": suite.requests,
            "started": ledger.started,
            "ok": ledger.ok,
            "errors": ledger.errors,
            "unfinished": ledger.unfinished,
            "pairs": pairs,
            "texts": texts,
            "distinct_texts": suite.workload.distinct_texts(ledger.started * cell.batch_size),
            "seconds": round(seconds, 6),
            "requests_per_s": ledger.ok / seconds if seconds else 0.0,
            "pairs_per_s": pairs / seconds if seconds and scores else None,
            "texts_per_s": texts / seconds if seconds else 0.0,
            "latency_ms": latency_summary_ms(ledger.latencies_ms),
            "first_error": first
            and {
                "after_s": round(first.sent_s + first.latency_s - ledger.began_s, 6),
                "code": first.reply.code,
                "message": first.reply.message,
            },
            "warmup": {"requests": self.warmup.started, "ok": self.warmup.ok, "errors": self.warmup.errors},
            "raw": {
                "sent_s": [round(call.sent_s - ledger.began_s, 6) for call in ledger.calls],
                "latency_ms": [round(call.latency_s * 1e3, 3) for call in ledger.calls],
                "failed": {n: call.reply.code for n, call in enumerate(ledger.calls) if call.reply.code != OK.code},
            },
        }

    def _verdict(self) -> tuple[str, str]:
        failed = len(self.ledger.calls) - self.ledger.ok
        missing = self._suite.requests - len(self.ledger.calls)
        if failed or missing:
            return "failures", f"{failed} of {self._suite.requests} requests failed" + (
                f", {missing} were not finished" if missing else ""
            )
        return "valid", ""


async def run_suite(
    target: Target, suite: Suite, info: dict[str, Any], stop: Stop, progress: Progress, runs: list[dict[str, Any]]
) -> None:
    """Measure every row and append it to `runs`; ends early, after an invalid row, when the server of `info` is gone.

    Interrupted leaves the row under way in `runs`, with what was measured of it.
    """
    for cell in suite.cells:
        row = _Row(info["variant"], suite, cell)
        try:
            await stop.race(_measure(row, target, suite, cell, info["instance_id"], progress))
        except Interrupted:
            row.void("interrupted", f"interrupted after {len(row.ledger.calls)} of {suite.requests} requests")
            raise
        except (ServerGone, ServerUnreachable) as gone:
            row.void("invalid", str(gone))
            return
        finally:
            runs.append(row.result())
            progress.end(runs[-1])


async def _measure(row: _Row, target: Target, suite: Suite, cell: Cell, instance_id: str, progress: Progress) -> None:
    advance = progress.begin(cell, suite.requests)
    await _require_same(target, instance_id)
    warm = ClosedLoop(
        sender(target, suite.workload, cell.batch_size, suite.timeout_s, warmup=True), target.is_alive, lambda _: None
    )
    row.warmup = warm.ledger
    await warm.run(suite.warmup, cell.concurrency)
    loop = ClosedLoop(sender(target, suite.workload, cell.batch_size, suite.timeout_s), target.is_alive, advance)
    row.ledger = loop.ledger
    await loop.run(suite.requests, cell.concurrency)
    await _require_same(target, instance_id)


async def _require_same(target: Target, instance_id: str) -> None:
    info = await target.server_info()
    if info["instance_id"] != instance_id:
        raise ServerGone("the server was restarted, so the answers came from two different processes")
