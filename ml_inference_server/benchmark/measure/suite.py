"""All rows of one table against one running server."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ml_inference_server.benchmark.load.channel import Address, ServerUnreachable, Target
from ml_inference_server.benchmark.load.dataset import Workload
from ml_inference_server.benchmark.load.driver import Driver, Left, Share, processes_for, split
from ml_inference_server.benchmark.load.fleet import ClientProcessFailed, Fleet
from ml_inference_server.benchmark.load.loops import ClosedLoop, FinishedRequest, Ledger, ServerGone, sender
from ml_inference_server.benchmark.load.schedule import arrivals_s
from ml_inference_server.benchmark.load.stream import EmbedStream
from ml_inference_server.benchmark.measure.progress import Progress, row_work
from ml_inference_server.benchmark.result import figures
from ml_inference_server.benchmark.result.cell import Cell, cells_of
from ml_inference_server.benchmark.result.document import (
    Cause,
    ClientUse,
    Figures,
    FirstError,
    MachineConditions,
    Purpose,
    Run,
    ServerFacts,
    Status,
    Warmup,
)
from ml_inference_server.benchmark.result.figures import RowVerdict
from ml_inference_server.benchmark.result.files import Result
from ml_inference_server.benchmark.target.conditions import Conditions
from ml_inference_server.benchmark.target.counters import ServerCounters, difference
from ml_inference_server.benchmark.target.interrupt import Interrupted, Stop
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.experiment import ExperimentSettings

# Warm-up rounds go on while one is so much faster than the one before; more of them would be a run of its own.
_WARMER = 0.9
_MOST_ROUNDS = 5
# How many requests are in flight while an open-loop row warms up.
_OPEN_WARMUP = 4
# What a server says of itself and must still say after a row.
_LASTING = ("server_version", "experiment", "variant", "requested", "resolved", "fallbacks", "title", "settings")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServerChanged(Exception):
    """The server that answers is not the one that answered before."""


@dataclass
class Bench:
    """One server under measurement. `info` is what it said of itself before."""

    target: Target
    address: Address
    sidecar: ServerCounters
    info: ServerFacts
    load: ExperimentSettings
    workload: Workload
    stop: Stop
    progress: Progress
    result: Result


def refuse_oversized(batch_sizes: Sequence[int], info: ServerFacts) -> None:
    """ConfigError if the server would refuse a row for its size alone."""
    largest = max(batch_sizes)
    if largest > info.max_texts:
        raise ConfigError(
            f"batch size {largest} is more than this server takes in one request ({info.max_texts}): use a smaller"
            " one, or start the server with a larger server.max_texts"
        )


async def run_suite(bench: Bench, repeats: Sequence[int]) -> bool:
    """Measure every row once for each of `repeats`, all rows in turn; False if the server of `bench` was lost.

    Every row starts at the same first text, so that rows and variants can be compared. Interrupted leaves the row under
    way in the results, with what was measured of it.
    """
    for repeat, cell in itertools.product(repeats, cells_of(bench.load)):
        bench.progress.begin(str(cell), row_work(cell, bench.load))
        run = await measure_row(bench, cell, repeat)
        if run.lost:
            return False
    return True


async def measure_row(
    bench: Bench, cell: Cell, repeat: int, *, slo: Purpose | None = None, requests: int = 0, seed: int = 0
) -> Run:
    """One row, kept in the results however it ends. requests, seed: other than those of the settings.

    Interrupted after a Ctrl-C; a server that is gone or another one makes the row invalid and `lost`.
    """
    load = bench.load
    if requests:
        load = load.model_copy(update={"benchmark_requests": requests, "duration_s": 0.0})
    measured = _Row(replace(bench, load=load), cell, repeat, slo, seed)
    try:
        await bench.stop.race(measured.measure())
    except Interrupted:
        done = measured.left().started - measured.unfinished()
        of = f" of {load.benchmark_requests}" if not load.duration_s else ""
        measured.void(Status.INTERRUPTED, Cause.INTERRUPTED, f"interrupted after {done}{of} requests")
        raise
    except (ServerGone, ServerUnreachable) as gone:
        measured.void(Status.INVALID, Cause.SERVER_GONE, str(gone), lost=True)
    except ServerChanged as changed:
        measured.void(Status.INVALID, Cause.SERVER_CHANGED, str(changed), lost=True)
    except ClientProcessFailed as failed:
        measured.void(Status.INVALID, Cause.CLIENT_PROCESS_FAILED, str(failed))
    finally:
        run = measured.result()
        bench.result.add(run, measured.left().records)
        bench.progress.end(run)
    return run


class _Row:
    """One row while it is measured; `result` is right at every moment."""

    def __init__(self, bench: Bench, cell: Cell, repeat: int, slo: Purpose | None, seed: int) -> None:
        self._bench, self._cell, self._repeat, self._slo = bench, cell, repeat, slo
        self._seed = seed or bench.load.seed
        self._void: RowVerdict | None = None
        self._lost = False
        self._source: Driver | Fleet | None = None
        self._warmup: list[Ledger] = []
        self._settled = True
        self._counters: dict[str, float] | None = None
        self._conditions: MachineConditions | None = None
        self._planned = 0

    def void(self, status: Status, cause: Cause, reason: str, *, lost: bool = False) -> None:
        self._void, self._lost = RowVerdict(status, cause, reason), lost

    def left(self) -> Left:
        return Left() if self._source is None else self._source.left()

    def unfinished(self) -> int:
        return int(np.isnan(self.left().records["done_s"]).sum())

    async def measure(self) -> None:
        bench = self._bench
        await _require_same(bench)
        await self._warm_up()
        share = self._share()
        before = await bench.sidecar.counters()
        conditions = Conditions(bench.info.pid if bench.address[0] in _LOOPBACK else None)
        await self._drive(share)
        self._conditions = conditions.end(self.left().cpu_s)
        self._counters = difference(before, await bench.sidecar.counters())
        await _require_same(bench)

    async def _warm_up(self) -> None:
        """Rounds of the row's own load, with texts from the other end, until they get no faster by 10 %."""
        bench, cell = self._bench, self._cell
        if not bench.load.warmup_iterations:
            return
        concurrency = cell.concurrency or _OPEN_WARMUP
        fastest_s = float("inf")
        stream = EmbedStream(bench.target) if bench.load.streaming else None
        timeout_s = bench.load.request_timeout_ms / 1e3
        send = sender(bench.target, bench.workload, cell.batch_size, timeout_s, warmup=True, stream=stream)
        try:
            for _ in range(_MOST_ROUNDS):
                round_ = ClosedLoop(send, bench.target.is_alive, lambda _: None)
                self._warmup.append(round_.ledger)
                await round_.run(max(bench.load.warmup_iterations, concurrency), concurrency)
                took = [call.done_s - call.sent_s for call in round_.ledger.calls]
                median_s = float(np.median(took)) if took else 0.0
                self._settled = median_s >= _WARMER * fastest_s
                if self._settled:
                    break
                fastest_s = median_s
        finally:
            if stream is not None:
                await stream.close()

    def _share(self) -> Share:
        bench, cell, load = self._bench, self._cell, self._bench.load
        due_s = None
        if cell.is_open:
            due_s = arrivals_s(
                load.arrival.process,
                cell.rate_per_s,
                requests=load.benchmark_requests,
                duration_s=load.duration_s,
                seed=self._seed,
                repeat=self._repeat,
            ).tolist()
        self._planned = len(due_s) if due_s is not None else 0 if load.duration_s else load.benchmark_requests
        return Share(
            bench.workload,
            cell.batch_size,
            load.request_timeout_ms / 1e3,
            load.streaming,
            requests=load.benchmark_requests,
            concurrency=cell.concurrency,
            duration_s=load.duration_s,
            due_s=due_s,
        )

    async def _drive(self, share: Share) -> None:
        bench, load = self._bench, self._bench.load
        shares = split(share, processes_for(self._cell.rate_per_s, load.client_processes))
        began_s = time.perf_counter()
        meant_s = self._cell.seconds(load)

        def advance(done: int) -> None:
            if meant_s:
                took_s = time.perf_counter() - began_s
                bench.progress.at(took_s / meant_s, f"{took_s:.0f} of {meant_s:.0f} s")
            else:
                bench.progress.at(done / load.benchmark_requests, f"{done}/{load.benchmark_requests} requests")

        if len(shares) > 1:
            self._source = fleet = Fleet(bench.address, shares, advance)
            await fleet.run()
            return
        done = 0

        def count(_call: FinishedRequest) -> None:
            nonlocal done
            done += 1
            advance(done)

        self._source = driver = Driver(bench.target, share, count)
        await driver.run(time.perf_counter())

    def result(self) -> Run:
        """The row as it stands in the JSON."""
        bench, cell, left = self._bench, self._cell, self.left()
        scores = bench.workload.kind == "pairs"
        found = figures.figures(left.records, batch_size=cell.batch_size, scores=scores, is_open=cell.is_open)
        status, cause, reason = self._void or self._verdict(found)
        busy_share = round(left.cpu_s / found.seconds / left.processes, 4) if found.seconds else None
        return Run(
            **dict(found),
            variant=bench.info.variant,
            batch_size=cell.batch_size,
            concurrency=cell.concurrency or None,
            rate_per_s=cell.rate_per_s or None,
            process=bench.load.arrival.process if cell.is_open else None,
            streaming=bench.load.streaming,
            workload=bench.workload.kind,
            repeat=self._repeat,
            slo=self._slo,
            status=status,
            cause=cause,
            reason=reason,
            lost=self._lost,
            requests=self._planned or left.started,
            by_time=not self._planned,
            started=left.started,
            distinct_texts=bench.workload.distinct_texts(left.started * cell.batch_size),
            batches=figures.batch_figures(self._counters),
            first_error=FirstError(**left.first_error) if left.first_error else None,
            warmup=Warmup(
                requests=sum(ledger.started for ledger in self._warmup),
                ok=sum(ledger.ok for ledger in self._warmup),
                errors=_sum_errors(self._warmup),
                rounds=len(self._warmup),
                settled=self._settled,
            ),
            client=ClientUse(processes=left.processes, cpu_share=busy_share),
            conditions=self._conditions,
            raw=bench.result.next_raw(),
        )

    def _verdict(self, found: Figures) -> RowVerdict:
        started, records = self.left().started, self.left().records
        if started != found.ok + sum(found.errors.values()) + found.unfinished:
            reason = f"the client's own books do not balance: {started} requests were started"
            return RowVerdict(Status.INVALID, Cause.CLIENT_MISCOUNTED, reason)
        if self._cell.is_open and (late := figures.lag_reason(records)):
            return RowVerdict(Status.INVALID, Cause.CLIENT_LATE, late)
        return figures.verdict(found, self._planned or None)


def _sum_errors(ledgers: Sequence[Ledger]) -> dict[str, int]:
    total: dict[str, int] = {}
    for ledger in ledgers:
        for code, count in ledger.errors.items():
            total[code] = total.get(code, 0) + count
    return total


async def _require_same(bench: Bench) -> None:
    said = await bench.target.server_info()
    if said["instance_id"] != bench.info.instance_id:  # it may still be loading, and then tells no more
        raise ServerChanged("the server was restarted, so the answers came from two different processes")
    info = ServerFacts.model_validate(said)
    changed = [name for name in _LASTING if getattr(info, name) != getattr(bench.info, name)]
    if changed:
        raise ServerChanged(f"the server no longer says the same of itself: {', '.join(changed)} changed meanwhile")
