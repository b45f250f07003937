"""A soak: very many calls to a real server, some cancelled, some failing; then it must hold what it held before.

By hand: python -m tests.scoreboard.soak --calls 1000000 --cancelled 0.3 --failing 0.3
"""

import argparse
import asyncio
import contextlib
import functools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.scoreboard.real_server import ROOT, SERVER, Held, RealServer, environment, real_server

# The line of the table, and what a run that is too short for it can tell at all: allocators take memory in steps.
MOST_MB_PER_100K = 1.0
_STEPS_MB = 4.0
_SAMPLES = 400
_CALLERS, _IN_FLIGHT = 2, 48
# Of the calls that were cancelled, so many had reached a handler at least; the others had not been taken up yet.
_LEAST_IN_HANDLER = 0.1
# Of the shares that were asked for; the last calls of a run cannot make up for those that came too late.
_LEAST_OF_SHARE = 0.95
_REQUESTS = "mlis_requests_total"
# Slept, so that calls are cancelled while they wait and while they run.
SETTINGS = ("server.enable_test_faults=true", "model.name=fake:base_ms=10")


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of the calls that are cancelled, and that fail."""

    name: str
    cancelled: float = 0.0
    failing: float = 0.0


OK = Mix("all ok")
CANCELLED = Mix("30 % cancelled", cancelled=0.3)
FAILING = Mix("30 % failing", failing=0.3)
BOTH = Mix("30 % cancelled and 30 % failing", cancelled=0.3, failing=0.3)


@dataclass(frozen=True, slots=True)
class Sample:
    """calls: that have ended so far."""

    calls: int
    rss_bytes: int


def slope_mb_per_100k(samples: Sequence[Sample]) -> float:
    """By least squares over the second half of the calls; MB are 10^6 bytes. ValueError for less than three samples."""
    half = samples[-1].calls / 2 if samples else 0
    late = [sample for sample in samples if sample.calls >= half]
    if len({sample.calls for sample in late}) < 3:
        raise ValueError(f"{len(late)} samples of the second half cannot show a slope")
    calls, rss = np.array([(sample.calls, sample.rss_bytes) for sample in late], float).T
    centred = calls - calls.mean()
    return float(centred @ rss / (centred @ centred)) * 100_000 / 1e6


def limit_mb_per_100k(calls: int) -> float:
    """Which slope a run of so many calls must not exceed: MOST_MB_PER_100K where it is long enough to tell."""
    return max(MOST_MB_PER_100K, _STEPS_MB * 100_000 / (calls / 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Soaked:
    """What a soak found. calls: made by the callers. ends: how they ended, by kind of call and code.

    cancelled_in_handler: calls that were cancelled while the server worked on them, as its metrics say.
    """

    mix: Mix
    calls: int
    ends: Counter[str]
    wrong: list[str]
    samples: list[Sample]
    before: Held
    after: Held
    fault_lines: list[str]
    exit_code: int
    cancelled_in_handler: int
    duration_s: float
    server_cpu_s: float

    @property
    def slope(self) -> float:
        return slope_mb_per_100k(self.samples)

    @property
    def cancelled(self) -> int:
        return sum(count for end, count in self.ends.items() if end.endswith(" CANCELLED"))

    @property
    def failed(self) -> int:
        return self.calls - self.cancelled - sum(count for end, count in self.ends.items() if end.endswith(" OK"))

    def breaches(self) -> list[str]:
        """What is not as it should be, each in words; a leak above all."""
        found = list(self.wrong)
        limit = limit_mb_per_100k(self.calls)
        if self.slope >= limit:
            found.append(f"memory grows by {self.slope:.2f} MB per 100,000 calls (limit {limit:.2f})")
        found += self.after.beyond(self.before)
        found += [f"in the log: {line}" for line in self.fault_lines]
        if self.exit_code:
            found.append(f"the server ended with exit code {self.exit_code}")
        if self.cancelled_in_handler < _LEAST_IN_HANDLER * self.mix.cancelled * self.calls:
            found.append(f"only {self.cancelled_in_handler} calls were cancelled while the server worked on them")
        for name, share, count in (
            ("cancelled", self.mix.cancelled, self.cancelled),
            ("failed", self.mix.failing, self.failed),
        ):
            if count < _LEAST_OF_SHARE * share * self.calls:
                found.append(f"only {count} of {self.calls} calls were {name}, and {share:.0%} were to be")
        return found


async def soak(
    folder: Path,
    mix: Mix,
    calls: int,
    *,
    seed: int,
    module: str = SERVER,
    variables: Mapping[str, str] | None = None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Soaked:
    """`calls` calls of `mix` to a server of its own, from two processes.

    Before them a tenth as many warm it up: what it holds after those is the base. module: what is run as the server;
    variables: of its environment.
    """
    async with real_server(folder, *SETTINGS, module=module, **(variables or {})) as server:
        warm_up = max(1000, min(calls // 10, 20_000))
        await _calls(server, mix, warm_up, seed + 1_000_000)
        before = await server.at_rest()
        samples: list[Sample] = []

        def sampled(sample: Sample) -> None:
            samples.append(sample)
            tell(sample.calls, calls)

        began_at, cpu_before_s = time.monotonic(), sum(server.ps.cpu_times()[:2])
        ends, wrong = await _calls(server, mix, calls, seed, sampled)
        duration_s, cpu_s = time.monotonic() - began_at, sum(server.ps.cpu_times()[:2]) - cpu_before_s
        after = await server.at_rest(before)
        codes = await server.scrape(_REQUESTS)
        exit_code = await server.stop()
        faults = server.fault_lines()
    return Soaked(
        mix=mix,
        calls=calls,
        ends=ends,
        wrong=wrong,
        samples=samples,
        before=before,
        after=after,
        fault_lines=faults,
        exit_code=exit_code,
        cancelled_in_handler=int(codes[_REQUESTS, (("code", "CANCELLED"), ("method", "Embed"))]),
        duration_s=duration_s,
        server_cpu_s=cpu_s,
    )


async def _calls(
    server: RealServer, mix: Mix, calls: int, seed: int, sampled: Callable[[Sample], None] = lambda sample: None
) -> tuple[Counter[str], list[str]]:
    """How they ended, and what was wrong. sampled: called with what the server's memory is on the way."""
    ends: Counter[str] = Counter()
    wrong: list[str] = []
    done = [0] * _CALLERS
    due = 0

    def progressed(number: int, calls_done: int) -> None:
        nonlocal due
        done[number] = calls_done
        if sum(done) >= due:
            due += max(1, calls // _SAMPLES)
            sampled(Sample(sum(done), server.ps.memory_info().rss))

    async with contextlib.AsyncExitStack() as stack:
        told = []
        for number in range(_CALLERS):
            own = calls // _CALLERS + (number < calls % _CALLERS)
            process = await stack.enter_async_context(_caller(server.grpc_port, mix, own, 2 * seed + number))
            told.append(_told(process, functools.partial(progressed, number)))
        for each in await asyncio.gather(*told):
            ends.update(each["ends"])
            wrong += each["wrong"]
    return ends, wrong


@contextlib.asynccontextmanager
async def _caller(port: int, mix: Mix, calls: int, seed: int) -> AsyncIterator[asyncio.subprocess.Process]:
    given = {
        "port": port,
        "calls": calls,
        "in-flight": _IN_FLIGHT,
        "cancelled": mix.cancelled,
        "failing": mix.failing,
        "seed": seed,
    }
    command = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "tests.scoreboard.soak_callers", *command),
        cwd=ROOT,
        env=environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _told(process: asyncio.subprocess.Process, progressed: Callable[[int], None]) -> dict[str, Any]:
    """The last line of a process of callers."""
    assert process.stdout is not None
    told: dict[str, Any] = {}
    async for line in process.stdout:
        told = json.loads(line)
        if "done" in told:
            progressed(told["done"])
    if await process.wait() or "ends" not in told:
        raise RuntimeError(f"a process of callers ended with exit code {process.returncode}")
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether a server holds after very many calls what it held before.")
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--cancelled", type=float, default=0.3)
    parser.add_argument("--failing", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", type=Path, help="write calls and memory of each sample there (JSON)")
    given = parser.parse_args()
    mix = Mix("as asked", given.cancelled, given.failing)

    def tell(done: int, of: int) -> None:
        print(f"\r{done} of {of}", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        soaked = asyncio.run(soak(Path(folder), mix, given.calls, seed=given.seed, tell=tell))
    if given.samples is not None:
        given.samples.write_text(json.dumps([(sample.calls, sample.rss_bytes) for sample in soaked.samples]))
    print(f"\n{soaked.calls} calls in {soaked.duration_s:.0f} s: {dict(soaked.ends.most_common())}")
    print(f"{soaked.cancelled_in_handler} were cancelled while the server worked on them")
    print(f"{1e6 * soaked.server_cpu_s / soaked.calls:.0f} us of the server's CPU time for each call")
    print(f"memory {soaked.slope:+.3f} MB per 100,000 calls; {soaked.before} before, {soaked.after} after")
    for breach in soaked.breaches():
        print(f"breach: {breach}")
    return 1 if soaked.breaches() else 0


if __name__ == "__main__":
    sys.exit(main())
