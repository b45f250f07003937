"""What those who share a server cost each other: single queries beside a bulk job, and a caller beside one who floods.

    python -m ml_inference_server.benchmark.studies.priorities --experiment FILE [--dataset FILE]

Starts the server and measures all cases in each round, each load from a process of its own. Told are ratios within a
round, so that runs on different machines can be compared. Two callers are two addresses of this machine, 127.0.0.1 and
::1. Equal texts are computed again, as the bundled ones come round soon (batching.share_equal_texts: false).
"""

import argparse
import asyncio
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ml_inference_server.benchmark.load.channel import Address
from ml_inference_server.benchmark.load.dataset import Workload, load_dataset
from ml_inference_server.benchmark.load.driver import Left, Share, processes_for, split
from ml_inference_server.benchmark.load.fleet import Fleet
from ml_inference_server.benchmark.load.records import counts, ok_only
from ml_inference_server.benchmark.load.schedule import arrivals_s
from ml_inference_server.benchmark.studies.own_server import OwnServer, own_server
from ml_inference_server.benchmark.target.interrupt import Stop, run_stoppable
from ml_inference_server.benchmark.target.server_process import LOOPBACK
from ml_inference_server.utils.arguments import positive_float, positive_int
from ml_inference_server.utils.errors import EXIT_FAILED_RUN, EXIT_OK

_HOST = "localhost"  # both of its addresses
_OTHER_LOOPBACK = "::1"
_TIMEOUT_S = 60.0
_WARMUP_S = 3.0
# The bulk job: its calls are of more than a batch, so that the server can tell it by its size.
_JOB_PER_CALL, _JOB_IN_FLIGHT = 64, 8
_CALLERS_PER_CALL, _CALLERS_IN_FLIGHT, _CALLERS_TIMEOUT_S = 8, 32, 10.0
_FLOOD, _LIGHT = 10.0, 0.1  # of the capacity
# What the server promises.
_MOST_P99_RATIO, _LEAST_JOB_RATIO = 2.0, 0.85


@dataclass
class MeasuredLoad:
    """One load of one round."""

    p50_ms: float
    p99_ms: float
    texts_per_s: float
    calls: int
    failed: Counter[str]


@dataclass
class Case:
    """What the rounds gave, and what each is compared with."""

    name: str
    rounds: list[MeasuredLoad] = field(default_factory=list)

    def told(self, value: str, base: "Case | None" = None) -> str:
        """Median (lowest-highest) of that attribute, or of its ratio to the same round of `base`."""
        values = [getattr(each, value) for each in self.rounds]
        if base is not None:
            values = [a / getattr(b, value) for a, b in zip(values, base.rounds, strict=True)]
        form = ".2f" if base is not None else ".1f"
        return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"

    @property
    def failed(self) -> str:
        total: Counter[str] = sum((each.failed for each in self.rounds), Counter())
        calls = sum(each.calls for each in self.rounds)
        return ", ".join(f"{count} {code}" for code, count in total.most_common()) + f" of {calls}" if total else "0"


class PriorityBench:
    """Each load of the study, as often as it is asked for."""

    def __init__(self, server: OwnServer, queries: Workload, passages: Workload, args: argparse.Namespace) -> None:
        self._port = server.grpc_port
        self._queries, self._passages = queries, passages
        self._queries_per_s, self._seconds, self._job_texts = args.rate, args.seconds, args.texts

    async def warm_up(self) -> None:
        share = Share(self._passages, 8, _TIMEOUT_S, False, concurrency=16, duration_s=_WARMUP_S)
        await self._run(LOOPBACK, share)

    async def queries_alone(self, round_: int) -> MeasuredLoad:
        return await self._run(LOOPBACK, self._of_queries(round_, self._seconds))

    async def job_alone(self) -> MeasuredLoad:
        return await self._run(LOOPBACK, self._of_job(""))

    async def both(self, round_: int, priority: str) -> tuple[MeasuredLoad, MeasuredLoad]:
        """(job, queries): the queries go on as long as the job does. priority: of the job."""
        queries = self._of_queries(round_, 60 * self._seconds)
        return await self._beside((LOOPBACK, self._of_job(priority)), (LOOPBACK, queries))

    async def capacity(self) -> float:
        """Calls per second."""
        share = Share(
            self._passages,
            _CALLERS_PER_CALL,
            _TIMEOUT_S,
            False,
            concurrency=_CALLERS_IN_FLIGHT,
            duration_s=self._seconds,
        )
        return (await self._run(LOOPBACK, share)).texts_per_s / _CALLERS_PER_CALL

    async def light_alone(self, round_: int, capacity: float) -> MeasuredLoad:
        return await self._run(_OTHER_LOOPBACK, self._offered(_LIGHT * capacity, round_, 1))

    async def light_beside_flood(self, round_: int, capacity: float) -> tuple[MeasuredLoad, MeasuredLoad]:
        """(light, flood): the flood comes from another address, and goes on as long as the light load does."""
        light = self._offered(_LIGHT * capacity, round_, 1)
        flood = self._offered(_FLOOD * capacity, round_, 2)
        return await self._beside((_OTHER_LOOPBACK, light), (LOOPBACK, flood))

    def _of_queries(self, round_: int, seconds: float) -> Share:
        due_s = arrivals_s("poisson", self._queries_per_s, duration_s=seconds, seed=0, repeat=round_).tolist()
        return Share(self._queries, 1, _TIMEOUT_S, False, due_s=due_s)

    def _of_job(self, priority: str) -> Share:
        calls = math.ceil(self._job_texts / _JOB_PER_CALL)
        return Share(
            self._passages,
            _JOB_PER_CALL,
            _TIMEOUT_S,
            False,
            requests=calls,
            concurrency=_JOB_IN_FLIGHT,
            priority=priority,
        )

    def _offered(self, calls_per_s: float, round_: int, seed: int) -> Share:
        seconds = self._seconds + 60 * (seed - 1)  # the flood is ended
        due_s = arrivals_s("poisson", calls_per_s, duration_s=seconds, seed=seed, repeat=round_).tolist()
        return Share(self._passages, _CALLERS_PER_CALL, _CALLERS_TIMEOUT_S, False, due_s=due_s, first=seed * 1_000_000)

    async def _run(self, host: str, share: Share) -> MeasuredLoad:
        fleet = Fleet(Address(host, self._port), _in_processes(share), lambda _: None)
        await fleet.run()
        return _measured(fleet.left(), share)

    async def _beside(self, first: tuple[str, Share], other: tuple[str, Share]) -> tuple[MeasuredLoad, MeasuredLoad]:
        """(host, share) each: `other` has been answered once when `first` begins, and ends with it."""
        running = asyncio.Event()
        fleet = Fleet(Address(first[0], self._port), _in_processes(first[1]), lambda _: None)
        beside = Fleet(Address(other[0], self._port), _in_processes(other[1]), lambda _: running.set())
        task = asyncio.create_task(beside.run())
        try:
            await running.wait()
            await fleet.run()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        return _measured(fleet.left(), first[1]), _measured(beside.left(), other[1])


def _in_processes(share: Share) -> list[Share]:
    return split(share, processes_for(len(share.due_s) / share.due_s[-1], 0)) if share.due_s else [share]


def _measured(left: Left, share: Share) -> MeasuredLoad:
    records = left.records
    answered = ok_only(records)
    failed = counts(records)
    failed.pop("OK", None)
    failed.pop("UNFINISHED", None)  # cut off when the other load had ended
    latencies = (answered["done_s"] - answered["due_s"]) * 1e3
    return MeasuredLoad(
        p50_ms=float(np.percentile(latencies, 50)) if len(latencies) else float("nan"),
        p99_ms=float(np.percentile(latencies, 99)) if len(latencies) else float("nan"),
        texts_per_s=len(answered) * share.batch_size / left.seconds if left.seconds else 0.0,
        calls=len(records),
        failed=Counter(failed),
    )


async def _run(args: argparse.Namespace, stop: Stop) -> int:
    dataset = await load_dataset(args.dataset)
    alone, job_alone = Case("single queries alone"), Case("bulk job alone")
    named, job_named = Case("queries beside the job"), Case("job named bulk")
    sized, job_sized = Case("queries beside the job, nothing named"), Case("job with nothing named")
    light, light_flooded, flood = Case("light caller alone"), Case("light caller beside the flood"), Case("flood")
    steps = tqdm(total=6 * args.rounds, desc="priorities", disable=None)
    overrides = ["batching.share_equal_texts=false", *args.overrides, f"server.host={_HOST}"]
    async with own_server(args.experiment, overrides, stop) as server:
        bench = PriorityBench(server, dataset.workload("queries", 0), dataset.workload("passages", 0), args)
        await stop.race(bench.warm_up())
        capacity = await stop.race(bench.capacity())
        for number in range(args.rounds):
            alone.rounds.append(await stop.race(bench.queries_alone(number)))
            steps.update()
            job_alone.rounds.append(await stop.race(bench.job_alone()))
            steps.update()
            for queries, job, priority in ((named, job_named, "bulk"), (sized, job_sized, "")):
                of_job, of_queries = await stop.race(bench.both(number, priority))
                job.rounds.append(of_job)
                queries.rounds.append(of_queries)
                steps.update()
            light.rounds.append(await stop.race(bench.light_alone(number, capacity)))
            steps.update()
            of_light, of_flood = await stop.race(bench.light_beside_flood(number, capacity))
            light_flooded.rounds.append(of_light)
            flood.rounds.append(of_flood)
            steps.update()
        title = server.info["title"]
    steps.close()
    print(f"{title}; {args.rounds} rounds, median (lowest-highest)\n")
    print(f"Single queries, {args.rate:g}/s, Poisson; the job: {args.texts} passages, {_JOB_PER_CALL} per call,")
    print(
        f"{_JOB_IN_FLIGHT} in flight. Callers: {_CALLERS_PER_CALL} passages per call, the capacity is {capacity:.0f}/s,"
    )
    print(f"the flood offers {_FLOOD:g} times that and the light caller {_LIGHT:g} times.\n")
    print(_table([(alone, None), (named, alone), (sized, alone), (light, None), (light_flooded, light)], "p50_ms"))
    print()
    print(_table([(alone, None), (named, alone), (sized, alone), (light, None), (light_flooded, light)], "p99_ms"))
    print()
    print(_table([(job_alone, None), (job_named, job_alone), (job_sized, job_alone), (flood, None)], "texts_per_s"))
    held = (
        _median_ratio(named, alone, "p99_ms") <= _MOST_P99_RATIO
        and _median_ratio(light_flooded, light, "p99_ms") <= _MOST_P99_RATIO
        and _median_ratio(job_named, job_alone, "texts_per_s") >= _LEAST_JOB_RATIO
        and not any(case.failed != "0" for case in (alone, named, job_named, light, light_flooded))
    )
    promise = f"p99 within {_MOST_P99_RATIO:g} times, the job at {_LEAST_JOB_RATIO:g}, nothing refused but of the flood"
    print(f"\nThe promise ({promise}) {'holds' if held else 'does NOT hold'} here.")
    return EXIT_OK if held else EXIT_FAILED_RUN


def _median_ratio(case: Case, base: Case, value: str) -> float:
    pairs = zip(case.rounds, base.rounds, strict=True)
    return float(statistics.median(getattr(a, value) / getattr(b, value) for a, b in pairs))


def _table(rows: Sequence[tuple[Case, Case | None]], value: str) -> str:
    """One line for each case; the second is what it is compared with."""
    unit = {"p50_ms": "p50, ms", "p99_ms": "p99, ms", "texts_per_s": "texts/s"}[value]
    lines = [f"| load | {unit} | of what it is alone | not answered |", "| --- | --- | --- | --- |"]
    for case, base in rows:
        ratio = case.told(value, base) if base is not None else "-"
        lines.append(f"| {case.name} | {case.told(value)} | {ratio} | {case.failed} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ml_inference_server.benchmark.studies.priorities", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--experiment", type=Path, required=True, metavar="FILE", help="experiment file (YAML)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dataset", default="sample", help="as experiment.dataset (default: sample)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="turns of all cases (default 3)")
    parser.add_argument("--seconds", type=positive_float, default=20.0, help="length of what has no end (default 20)")
    parser.add_argument("--rate", type=positive_float, default=20.0, help="single queries per second (default 20)")
    parser.add_argument("--texts", type=positive_int, default=10_000, help="of the bulk job (default 10,000)")
    return run_stoppable(lambda stop: _run(parser.parse_args(argv), stop))


if __name__ == "__main__":
    sys.exit(main())
