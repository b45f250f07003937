"""Where the time goes, and how close the server comes to its engine: three workloads, against the in-process ceiling.

    python -m ml_inference_server.benchmark.studies.speed --experiment FILE [--dataset FILE] [--update]

Prints each workload's texts/s as a share of what the same backend does without a server in the same run, and of the
processor's own limit; then the stages of the mean request, the processor time of server and client, and the event
loop's lag. Beside each share stands the one that was stored with the last commit that touched speed; --update stores.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from tqdm import tqdm

from ml_inference_server.benchmark.load.channel import Target
from ml_inference_server.benchmark.load.dataset import Dataset, Kind, load_dataset
from ml_inference_server.benchmark.load.driver import Driver, Left, Share
from ml_inference_server.benchmark.load.records import ok_only
from ml_inference_server.benchmark.load.schedule import arrivals_s
from ml_inference_server.benchmark.result.document import InProcess, InProcessFailed
from ml_inference_server.benchmark.result.figures import figures
from ml_inference_server.benchmark.result.stats import samples_needed
from ml_inference_server.benchmark.runner import START_TIMEOUT_S
from ml_inference_server.benchmark.target.conditions import process_cpu_s
from ml_inference_server.benchmark.target.in_process import requests_of, time_in_process
from ml_inference_server.benchmark.target.interrupt import Stop, run_stoppable
from ml_inference_server.benchmark.target.machine import git_facts, machine_facts
from ml_inference_server.benchmark.target.server_process import LOOPBACK, ServerOptions, ServerProcess
from ml_inference_server.utils.arguments import positive_float, positive_int
from ml_inference_server.utils.config import load_settings
from ml_inference_server.utils.errors import EXIT_FAILED_RUN, EXIT_OK, ConfigError, StartError
from ml_inference_server.utils.files import replace_file, replaceable
from ml_inference_server.utils.installation import results_folder
from ml_inference_server.utils.share import MARK, NOTE, cell, is_impossible
from ml_inference_server.utils.stages import STAGE_NAMES

STORE = results_folder() / "speed.json"
_KINDS: tuple[Kind, ...] = ("queries", "passages")
_STAGES = (*STAGE_NAMES, "other")
_WARMUP_S = 2.0
_TIMEOUT_S = 60.0
# Of the saturation load: so little that hardly any query meets another one.
_LIGHT = 0.02
_MAX_OPEN_S = 60.0


@dataclass
class SpeedLoad:
    """One closed-loop workload and what its repeats gave: texts/s, and per text the CPU time of both sides."""

    kind: Kind
    batch_size: int
    concurrency: int
    texts_per_s: list[float] = field(default_factory=list)
    server_cpu_ms: list[float] = field(default_factory=list)
    client_cpu_ms: list[float] = field(default_factory=list)
    stages_ms: dict[str, float] = field(default_factory=dict)
    loop_lag_ms: float | None = None
    errors: int = 0

    def __str__(self) -> str:
        return f"{self.kind}, {self.batch_size} per call, {self.concurrency} in flight"


class SpeedBench:
    """A running server and the texts for it."""

    def __init__(self, target: Target, ports: dict[str, int], dataset: Dataset, seconds: float) -> None:
        self._target = target
        self._url = f"http://{LOOPBACK}:{ports['http_port']}/metrics"
        self._pid = ports["pid"]
        self._dataset = dataset
        self._seconds = seconds

    async def closed(self, load: SpeedLoad) -> None:
        """One repeat of `load`, after a warm-up of its own."""
        await self._drive(load, concurrency=load.concurrency, duration_s=_WARMUP_S)
        cpu_s = process_cpu_s(self._pid)
        left = await self._drive(load, concurrency=load.concurrency, duration_s=self._seconds)
        cpu_s = (process_cpu_s(self._pid) or 0.0) - (cpu_s or 0.0)
        found = figures(left.records, batch_size=load.batch_size, scores=False, is_open=False)
        load.errors += sum(found.errors.values()) + found.unfinished
        load.texts_per_s.append(found.texts_per_s)
        load.server_cpu_ms.append(1e3 * cpu_s / max(1, found.texts))
        load.client_cpu_ms.append(1e3 * left.cpu_s / max(1, found.texts))
        live = await self._live()
        load.stages_ms = live.get("stages_ms") or {}
        load.loop_lag_ms = (live.get("loop_lag_ms") or {}).get("p99")

    async def idle_p50_ms(self) -> float:
        """Median latency of single queries, one at a time."""
        left = await self._drive(SpeedLoad("queries", 1, 1), concurrency=1, duration_s=self._seconds)
        return float(np.median(_latencies_ms(left)))

    async def open_ms(self, rate_per_s: float) -> Any:
        """Latencies of single queries at `rate_per_s` (Poisson), from the moment when each was due.

        Enough of them for a p99, unless that would take longer than _MAX_OPEN_S.
        """
        enough_s = 1.1 * samples_needed(99) / rate_per_s
        duration_s = min(max(2 * self._seconds, enough_s), _MAX_OPEN_S)
        due_s = arrivals_s("poisson", rate_per_s, duration_s=duration_s, seed=0, repeat=0).tolist()
        return _latencies_ms(await self._drive(SpeedLoad("queries", 1, 0), due_s=due_s))

    async def _drive(self, load: SpeedLoad, **how: Any) -> Left:
        workload = self._dataset.workload(load.kind, 0)
        driver = Driver(
            self._target, Share(workload, load.batch_size, _TIMEOUT_S, streaming=False, **how), lambda _: None
        )
        await driver.run(time.perf_counter())
        return driver.left()

    async def _live(self) -> dict[str, Any]:
        async with aiohttp.ClientSession() as session, session.get(self._url) as answer:
            live: dict[str, Any] = await answer.json()
        return live


def _latencies_ms(left: Left) -> Any:
    answered = ok_only(left.records)
    return (answered["done_s"] - answered["due_s"]) * 1e3


async def _run(args: argparse.Namespace, stop: Stop) -> int:
    args.store = replaceable(args.store, "--store")
    given = [part for override in args.overrides for part in ("--set", override)]
    experiment = ["--experiment", str(args.experiment), *given]
    settings = load_settings(args.experiment, overrides=args.overrides)
    dataset = await load_dataset(args.dataset)
    loads = [SpeedLoad("queries", 1, 32), SpeedLoad("passages", 1, 32), SpeedLoad("passages", 32, 8)]
    # The texts of a call are all different, so the work is the same however many a call holds.
    texts = {kind: list(requests_of(dataset.workload(kind, 0), 1, None)) for kind in _KINDS}
    ceilings: dict[Kind, list[InProcess]] = {kind: [] for kind in _KINDS}
    steps = tqdm(total=2 * len(ceilings) + args.repeats * len(loads) + 3, desc="speed", disable=None)

    async def time_ceilings() -> None:
        for kind in _KINDS:
            one = await stop.race(
                time_in_process(sys.executable, experiment, texts[kind], args.seconds, START_TIMEOUT_S)
            )
            if isinstance(one, InProcessFailed):
                raise ConfigError(f"the backend cannot be timed without a server: {one.error}")
            ceilings[kind].append(one)
            steps.update()

    await time_ceilings()
    with tempfile.TemporaryDirectory(prefix="ml_inference_server-") as folder:
        arguments = [*experiment, "--port", "0", "--http-port", "0", "--set", "metrics.window_s=5"]
        drain_s = settings.server.drain_timeout_ms / 1e3
        options = ServerOptions(arguments, Path(folder) / "server.log", START_TIMEOUT_S, drain_s)
        async with ServerProcess(options, stop) as server:
            ports = await stop.race(server.start())
            async with Target(LOOPBACK, ports["grpc_port"]) as target:
                info = await target.server_info()
                bench = SpeedBench(target, ports, dataset, args.seconds)
                for _ in range(args.repeats):
                    for load in loads:
                        await stop.race(bench.closed(load))
                        steps.update()
                saturation = statistics.median(loads[0].texts_per_s)
                if not saturation:
                    steps.close()
                    raise StartError(f"no single query was answered ({loads[0].errors} errors): nothing to compare")
                idle_ms = await stop.race(bench.idle_p50_ms())
                steps.update()
                light_ms = await stop.race(bench.open_ms(_LIGHT * saturation))
                steps.update()
                half_ms = await stop.race(bench.open_ms(saturation / 2))
                steps.update()
    await time_ceilings()
    steps.close()
    shares = {str(load): _share(load, ceilings[load.kind]) for load in loads}
    stored = _stored(args.store).get(settings.name, {})
    print(report(info["title"], loads, ceilings, shares, stored))
    print(f"\nSingle queries, one after the other: p50 {idle_ms:.1f} ms")
    for share, latencies_ms in ((_LIGHT, light_ms), (0.5, half_ms)):
        if len(latencies_ms) < samples_needed(99):
            print(f"At {share:.0%} of the saturation load: {len(latencies_ms)} queries, too few for a p99")
            continue
        p50_ms, p99_ms = np.percentile(latencies_ms, (50, 99))
        print(
            f"At {share:.0%} of the saturation load: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms, "
            f"{p99_ms / idle_ms:.1f}x the p50 of one after the other"
        )
    if impossible := [name for name, share in shares.items() if is_impossible(share)]:
        print(f"\nNot to be believed: {'; '.join(impossible)}: {NOTE}", file=sys.stderr)
        return EXIT_FAILED_RUN
    if args.update:
        _store(args.store, settings.name, {"shares": shares, "commit": git_facts(), "machine": machine_facts()})
        print(f"Stored in {args.store}")
    return EXIT_FAILED_RUN if any(load.errors for load in loads) else EXIT_OK


def _share(load: SpeedLoad, ceilings: Sequence[InProcess]) -> float:
    return statistics.median(load.texts_per_s) / statistics.median(each.texts_per_s for each in ceilings)


def report(
    title: str,
    loads: Sequence[SpeedLoad],
    ceilings: Mapping[Kind, Sequence[InProcess]],
    shares: dict[str, float],
    stored: dict[str, Any],
) -> str:
    lines = [
        f"{title}\n",
        "| workload | texts/s | of the in-process ceiling | stored | of the roofline | CPU ms/text: server | client |"
        " errors |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for load in loads:
        rates, ceiling = load.texts_per_s, ceilings[load.kind]
        roofs = [each.roofline_texts_per_s for each in ceiling if each.roofline_texts_per_s]
        roof = cell(statistics.median(rates) / statistics.median(roofs)) if roofs else "-"
        before, share = stored.get("shares", {}).get(str(load)), cell(shares[str(load)])
        lines.append(
            f"| {load} | {statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f}) | {share} |"
            f" {'-' if before is None else f'{before:.2f}'} | {roof} | {statistics.median(load.server_cpu_ms):.2f} |"
            f" {statistics.median(load.client_cpu_ms):.2f} | {load.errors} |"
        )
    lines += ["", f"| ms of the mean request | {' | '.join(_STAGES)} | loop lag, p99 |", "| --- |" + " --- |" * 8]
    for load in loads:
        stages = " | ".join(f"{load.stages_ms.get(stage, float('nan')):.2f}" for stage in _STAGES)
        lag = "-" if load.loop_lag_ms is None else f"{load.loop_lag_ms:.1f}"
        lines.append(f"| {load} | {stages} | {lag} |")
    for kind, each in ceilings.items():
        rates = [one.texts_per_s for one in each]
        lines.append(
            f"\nIn-process ceiling, {kind}: {', '.join(f'{rate:.0f}' for rate in rates)} texts/s (before, after)"
        )
    if any(MARK in line for line in lines):
        lines.append(f"\n{MARK} {NOTE}")
    return "\n".join(lines)


def _stored(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return content


def _store(path: Path, name: str, entry: dict[str, Any]) -> None:
    content = _stored(path) | {name: entry}
    replace_file(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ml_inference_server.benchmark.studies.speed", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--experiment", type=Path, required=True, metavar="FILE", help="experiment file (YAML)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dataset", default="sample", help="as experiment.dataset (default: sample)")
    parser.add_argument("--seconds", type=positive_float, default=6.0, help="length of each measurement (default 6)")
    parser.add_argument("--repeats", type=positive_int, default=3, help="turns of all workloads (default 3)")
    parser.add_argument("--store", type=Path, default=STORE, metavar="FILE", help="where the shares are kept")
    parser.add_argument("--update", action="store_true", help="store this run's shares")
    args = parser.parse_args(argv)
    return run_stoppable(lambda stop: _run(args, stop))


if __name__ == "__main__":
    sys.exit(main())
