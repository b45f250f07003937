"""How the server scales: with requests in flight, texts per call, tokens per text, and load beyond what it can do.

    python -m ml_inference_server.benchmark.studies.scaling --experiment FILE [--dataset FILE] [--output FILE.svg]

Starts the server and measures four sweeps, all of them in each repeat. Throughput is told as a share of the sweep's
best, latency in multiples of an idle server's median, so that runs on different machines can be compared.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from tqdm import tqdm

from ml_inference_server.benchmark.load.channel import Target
from ml_inference_server.benchmark.load.dataset import Dataset, Workload, load_dataset
from ml_inference_server.benchmark.load.driver import Driver, Share
from ml_inference_server.benchmark.load.schedule import arrivals_s
from ml_inference_server.benchmark.report.plots import Panel, of_panels
from ml_inference_server.benchmark.result.figures import figures, lag_reason
from ml_inference_server.benchmark.runner import START_TIMEOUT_S
from ml_inference_server.benchmark.target.counters import ServerCounters, difference
from ml_inference_server.benchmark.target.interrupt import Stop, run_stoppable
from ml_inference_server.benchmark.target.server_process import LOOPBACK, ServerOptions, ServerProcess
from ml_inference_server.utils.arguments import positive_float, positive_int
from ml_inference_server.utils.config import load_settings
from ml_inference_server.utils.errors import EXIT_FAILED_RUN, EXIT_OK
from ml_inference_server.utils.files import replace_file, replaceable
from ml_inference_server.utils.installation import results_folder

_TIMEOUT_S = 60.0
# Under overload a caller waits so long for an answer; what comes later is no use to it.
_PATIENCE_S = 2.0
_WARMUP_S = 2.0
_IN_FLIGHT = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_PER_CALL = (1, 2, 4, 8, 16, 32, 64, 128)
_TEXTS_IN_FLIGHT = 256
_TOKENS = (8, 16, 32, 64, 128, 256)
_LOADS = (0.2, 0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)
_OFFERED_PER_CALL = 8
_TOKENS_A_WORD = 1.3  # of English in WordPiece, about; the true count comes from the server's counters


@dataclass
class SweepPoint:
    """One place of a sweep and what its repeats gave. x: what the sweep varies; for lengths, measured afterwards."""

    x: float
    texts_per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    tokens_per_text: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)  # by gRPC code
    late: int = 0  # repeats in which the client itself could not keep its schedule


@dataclass
class Sweep:
    title: str
    x_label: str
    points: list[SweepPoint]
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> float:
        return max(statistics.median(point.texts_per_s) for point in self.points)


class ScalingBench:
    """A running server and the texts for it."""

    def __init__(self, target: Target, sidecar: ServerCounters, url: str, dataset: Dataset, seconds: float) -> None:
        self._target, self._sidecar, self._url, self._seconds = target, sidecar, url, seconds
        self.queries, self.passages = dataset.workload("queries", 0), dataset.workload("passages", 0)
        self.rss_bytes: list[int] = []

    async def closed(self, point: SweepPoint, workload: Workload, per_call: int, in_flight: int) -> None:
        await self._measure(
            point, Share(workload, per_call, _TIMEOUT_S, False, concurrency=in_flight, duration_s=self._seconds)
        )

    async def offered(self, point: SweepPoint, calls_per_s: float, repeat: int) -> None:
        due_s = arrivals_s("poisson", calls_per_s, duration_s=2 * self._seconds, seed=0, repeat=repeat).tolist()
        await self._measure(point, Share(self.passages, _OFFERED_PER_CALL, _PATIENCE_S, False, due_s=due_s))

    async def warm_up(self) -> None:
        share = Share(self.passages, 4, _TIMEOUT_S, False, concurrency=16, duration_s=_WARMUP_S)
        await Driver(self._target, share, lambda _: None).run(time.perf_counter())

    async def _measure(self, point: SweepPoint, share: Share) -> None:
        before = await self._sidecar.counters()
        driver = Driver(self._target, share, lambda _: None)
        await driver.run(time.perf_counter())
        records = driver.left().records
        found = figures(records, batch_size=share.batch_size, scores=False, is_open=share.due_s is not None)
        point.texts_per_s.append(found.texts_per_s)
        latency = found.latency_ms
        point.p50_ms.append(latency.p50 if latency else float("nan"))
        point.p99_ms.append(latency.p99 if latency else float("nan"))
        point.failed.update(found.errors)
        point.failed["unfinished"] += found.unfinished
        point.late += share.due_s is not None and bool(lag_reason(records))
        done = difference(before, await self._sidecar.counters())
        if done and done["mlis_batch_texts_sum"]:
            point.tokens_per_text.append(done["mlis_tokens_total"] / done["mlis_batch_texts_sum"])
        async with aiohttp.ClientSession() as session, session.get(self._url) as answer:
            self.rss_bytes.append(int((await answer.json())["rss_bytes"]))


def texts_of(passages: Workload, tokens: int) -> Workload:
    """Texts of about `tokens` tokens each: the words of all passages, cut again."""
    words = " ".join(passages.items).split()
    size = max(1, round((tokens - 2) / _TOKENS_A_WORD))
    texts = dict.fromkeys(" ".join(words[i : i + size]) for i in range(0, len(words) - size + 1, size))
    return Workload("passages", tuple(texts))


async def _run(args: argparse.Namespace, stop: Stop) -> int:
    args.output = replaceable(args.output, "--output")
    given = [part for override in args.overrides for part in ("--set", override)]
    settings = load_settings(args.experiment, overrides=args.overrides)
    dataset = await load_dataset(args.dataset)
    in_flight = Sweep("Queries, one per call", "requests in flight", [SweepPoint(x) for x in _IN_FLIGHT])
    per_call = Sweep(f"Passages, {_TEXTS_IN_FLIGHT} in flight", "texts per call", [SweepPoint(x) for x in _PER_CALL])
    lengths = Sweep("Texts of one length, 32 in flight", "tokens per text", [SweepPoint(x) for x in _TOKENS])
    offered = Sweep(
        f"Passages, {_OFFERED_PER_CALL} per call, Poisson, callers wait {_PATIENCE_S:g} s",
        "offered load, in multiples of the capacity",
        [SweepPoint(x) for x in _LOADS],
    )
    sweeps = [in_flight, per_call, lengths, offered]
    steps = tqdm(total=args.repeats * (1 + sum(len(s.points) for s in sweeps)), desc="scaling", disable=None)
    with tempfile.TemporaryDirectory(prefix="ml_inference_server-") as folder:
        arguments = ["--experiment", str(args.experiment), *given, "--port", "0", "--http-port", "0"]
        options = ServerOptions(
            arguments, Path(folder) / "server.log", START_TIMEOUT_S, settings.server.drain_timeout_ms / 1e3
        )
        async with ServerProcess(options, stop) as server:
            ports = await stop.race(server.start())
            async with (
                Target(LOOPBACK, ports["grpc_port"]) as target,
                ServerCounters(LOOPBACK, ports["http_port"]) as sidecar,
            ):
                info = await target.server_info()
                url = f"http://{LOOPBACK}:{ports['http_port']}/metrics"
                bench = ScalingBench(target, sidecar, url, dataset, args.seconds)
                for repeat in range(args.repeats):
                    await stop.race(bench.warm_up())
                    for point in in_flight.points:
                        await stop.race(bench.closed(point, bench.queries, 1, int(point.x)))
                        steps.update()
                    for point in per_call.points:
                        calls = _TEXTS_IN_FLIGHT // int(point.x)
                        await stop.race(bench.closed(point, bench.passages, int(point.x), calls))
                        steps.update()
                    for point in lengths.points:
                        await stop.race(bench.closed(point, texts_of(bench.passages, int(point.x)), 1, 32))
                        steps.update()
                    capacity = SweepPoint(0)
                    await stop.race(bench.closed(capacity, bench.passages, _OFFERED_PER_CALL, 32))
                    steps.update()
                    for point in offered.points:
                        rate = point.x * capacity.texts_per_s[0] / _OFFERED_PER_CALL
                        await stop.race(bench.offered(point, rate, repeat))
                        steps.update()
    steps.close()
    for point in lengths.points:
        point.x = statistics.median(point.tokens_per_text or [point.x])
    idle_ms = statistics.median(in_flight.points[0].p50_ms)
    print(report(info["title"], sweeps, idle_ms, bench.rss_bytes))
    replace_file(args.output, of_panels(_panels(sweeps, idle_ms), len(sweeps), info["title"]))
    print(f"\nPlots: {args.output}")
    broken = sum(point.failed.total() for sweep in sweeps[:3] for point in sweep.points)
    return EXIT_FAILED_RUN if broken else EXIT_OK


def report(title: str, sweeps: Sequence[Sweep], idle_ms: float, rss_bytes: Sequence[int]) -> str:
    """The tables, and the three sentences that the sweeps are made for."""
    lines = [title]
    for sweep in sweeps:
        lines += [
            f"\n{sweep.title}\n",
            f"| {sweep.x_label} | throughput, of the best (spread) | p50, of an idle server's | p99 | not answered |",
            "| --- | --- | --- | --- | --- |",
        ]
        for point in sweep.points:
            share = [rate / sweep.best for rate in point.texts_per_s]
            late = " (client late)" if point.late else ""
            lines.append(
                f"| {point.x:.3g} | {statistics.median(share):.2f} ({min(share):.2f}-{max(share):.2f}) |"
                f" {statistics.median(point.p50_ms) / idle_ms:.1f} | {statistics.median(point.p99_ms) / idle_ms:.1f} |"
                f" {_told(point.failed)}{late} |"
            )
    lengths, offered = sweeps[2], sweeps[3]
    past = [statistics.median(point.texts_per_s) / offered.best for point in offered.points if point.x > 1]
    tokens = [point.x * statistics.median(point.texts_per_s) for point in lengths.points]
    rates = ", ".join(f"{rate / max(tokens):.2f}" for rate in tokens)
    lines += [
        f"\nBeyond the capacity, answers in time stay at {100 * min(past):.0f} % of the peak or more.",
        f"Tokens per second by length, of the best: {rates}.",
        f"Memory of the server: {min(rss_bytes) / 2**20:.0f} to {max(rss_bytes) / 2**20:.0f} MiB, at the end"
        f" {rss_bytes[-1] / rss_bytes[len(rss_bytes) // 2]:.2f} times what it was half-way.",
    ]
    return "\n".join(lines)


def _told(failed: Counter[str]) -> str:
    """Such as "12 RESOURCE_EXHAUSTED, 1 DEADLINE_EXCEEDED"."""
    return ", ".join(f"{count} {code}" for code, count in failed.most_common() if count) or "0"


def _panels(sweeps: Sequence[Sweep], idle_ms: float) -> list[Panel]:
    above, below = [], []
    for sweep in sweeps:
        xs = [point.x for point in sweep.points]
        rates = [_spread(point.texts_per_s, sweep.best) for point in sweep.points]
        above.append(Panel(sweep.title, sweep.x_label, "texts/s, of the best", xs, {"throughput": rates}))
        times = {
            "p50": [_spread(point.p50_ms, idle_ms) for point in sweep.points],
            "p99": [_spread(point.p99_ms, idle_ms) for point in sweep.points],
        }
        below.append(Panel(sweep.title, sweep.x_label, "latency, of an idle server's p50", xs, times, log_y=True))
    return above + below


def _spread(values: Sequence[float], unit: float) -> tuple[float, float, float]:
    return statistics.median(values) / unit, min(values) / unit, max(values) / unit


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ml_inference_server.benchmark.studies.scaling", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--experiment", type=Path, required=True, metavar="FILE", help="experiment file (YAML)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dataset", default="sample", help="as experiment.dataset (default: sample)")
    parser.add_argument("--seconds", type=positive_float, default=3.0, help="length of each measurement (default 3)")
    parser.add_argument("--repeats", type=positive_int, default=3, help="turns of all sweeps (default 3)")
    parser.add_argument(
        "--output",
        type=Path,
        default=results_folder() / "scaling.svg",
        metavar="FILE",
        help="the plots (default: %(default)s)",
    )
    return run_stoppable(lambda stop: _run(parser.parse_args(argv), stop))


if __name__ == "__main__":
    sys.exit(main())
