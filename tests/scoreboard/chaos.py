"""Chaos: a real server under callers of all kinds and faults of all kinds, and a ledger of every call.

By hand: python -m tests.scoreboard.chaos --seed 1 --calls 20000 --faults 50
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from tests.scoreboard.chaos_callers import ChaosCaller, options
from tests.scoreboard.chaos_faults import ChaosFaults, KeysFile
from tests.scoreboard.chaos_ledger import Breach, CallEnd, breaches_of, metrics_breaches, read_ends, silences
from tests.scoreboard.chaos_rest import Watched, log_breaches, permit_breaches, recovered
from tests.scoreboard.real_server import ROOT, Held, RealServer, environment, in_flight, real_server
from tests.scoreboard.recorded_server import LEDGER, ServerLedger, read_ledger
from tests.scoreboard.tcp_proxy import tcp_proxy

CALLERS, STREAMS, QUEUE_REQUESTS = 2, 2, 40
RECORDED = "tests.scoreboard.recorded_server"
_MOST_BREACHES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much chaos: until there were so many calls and faults, in segments of so many calls with a rest after each.

    most_s: then it ends after the segment that is under way.
    """

    calls: int
    faults: int
    segment_calls: int
    most_s: float


@dataclass(slots=True)
class Chaos:
    """What came of it. calls: by kind and code. faults: by kind. restarts: of engines. seconds: of the whole run."""

    seed: str
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    breaches: list[Breach] = field(default_factory=list)
    restarts: int = 0
    quiet_points: int = 0
    scrapes: int = 0
    harmed: int = 0
    seconds: float = 0.0

    @property
    def broken(self) -> Counter[str]:
        """Breaches by invariant."""
        return Counter(breach.invariant for breach in self.breaches)


def settings(keys: Path) -> tuple[str, ...]:
    return (
        "model.name=fake:base_ms=2",
        f"model.streams={STREAMS}",
        "model.process_per_stream=true",
        "server.enable_test_faults=true",
        "server.hang_timeout_ms=1000",
        f"server.auth.keys_file={keys}",
        f"batching.max_queue_requests={QUEUE_REQUESTS}",
    )


async def chaos(
    folder: Path,
    extent: Extent,
    *,
    seed: str,
    module: str = RECORDED,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Chaos:
    """module: what is run as the server; it must keep the ledger of tests.scoreboard.recorded_server."""
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    keys, ledger = KeysFile(folder / "keys.yaml"), folder / "ledger"
    ledger.mkdir()
    found = Chaos(seed)
    token = keys.tokens["metrics"]
    async with (
        real_server(folder, *settings(keys.path), module=module, token=token, **{LEDGER: str(ledger)}) as server,
        tcp_proxy(server.grpc_port) as proxy,
        _callers(folder, server.grpc_port, proxy.port, keys, seed) as callers,
    ):
        base: Held | None = None
        watched = Watched(server)
        faults: ChaosFaults | None = None
        lag_s, done = 0.0, 0
        while True:
            async with grpc.aio.insecure_channel(server.address, options=options("driver")) as channel:
                caller = ChaosCaller({"": channel}, keys.tokens)
                if faults is None:
                    faults = ChaosFaults(server, proxy, keys, caller, seed, STREAMS)
                faults.caller = caller
                async with aiohttp.ClientSession(server.url, headers=server.headers) as session:
                    lag_s = max(lag_s, await _segment(callers, extent.segment_calls, faults, watched, session))
                if base is None:
                    await faults.fill_pools()
            done += CALLERS * extent.segment_calls
            base = await _quiet(server, faults, ledger, base, found)
            tell(min(done, extent.calls), extent.calls)
            is_enough = done >= extent.calls and len(faults.faults) >= extent.faults
            if is_enough or loop.time() - began_at > extent.most_s:
                break
        found.breaches += await permit_breaches(server, keys.tokens[""], QUEUE_REQUESTS, STREAMS)
        found.restarts = int((await server.scrape("mlis_engine_restarts_total"))["mlis_engine_restarts_total", ()])
        exit_code = await server.stop()
        if exit_code:
            found.breaches.append(Breach("V10", f"the server ended with exit code {exit_code}"))
        found.breaches += log_breaches(server)
    found.faults = Counter(fault.kind for fault in faults.faults)
    found.scrapes = watched.scrapes
    found.breaches += watched.breaches
    _judge(found, list(_all_ends(folder, faults.ends)), read_ledger(ledger), faults, watched, lag_s)
    found.seconds = loop.time() - began_at
    return found


def _judge(
    found: Chaos, ends: list[CallEnd], server: ServerLedger, faults: ChaosFaults, watched: Watched, lag_s: float
) -> None:
    found.calls = Counter((end.kind, end.code) for end in ends)
    found.harmed = sum(end.kind == "plain" and end.code not in ("OK", "RESOURCE_EXHAUSTED") for end in ends)
    ok_at = [end.ended_at for end in ends if end.code == "OK"]
    found.breaches += silences(ok_at, watched.serving)
    known = {f"permit{number}" for number in range(QUEUE_REQUESTS + 1)}
    server.ended = {name: each for name, each in server.ended.items() if name not in known}
    found.breaches += breaches_of(ends, server, faults.faults, lag_s)


def _all_ends(folder: Path, own: list[CallEnd]) -> Iterator[CallEnd]:
    for number in range(CALLERS):
        yield from read_ends(folder / f"calls-{number}")
    yield from own


async def _segment(
    callers: "list[asyncio.subprocess.Process]",
    calls: int,
    faults: ChaosFaults,
    watched: Watched,
    session: aiohttp.ClientSession,
) -> float:
    """All callers make their calls while faults happen; the largest lag of their loops."""
    answers = [asyncio.create_task(_ask(process, {"calls": calls})) for process in callers]
    watching = asyncio.create_task(watched.run(session))
    await asyncio.gather(*answers, faults.run(lambda: all(answer.done() for answer in answers)))
    watching.cancel()
    await asyncio.wait([watching])
    if not watching.cancelled() and (error := watching.exception()) is not None:
        raise error
    return max(float(answer.result()["lag_s"]) for answer in answers)


async def _quiet(server: RealServer, faults: ChaosFaults, ledger: Path, base: Held | None, found: Chaos) -> Held:
    """Wait for rest, and check V4, V10 and V12; what it holds then is the base where there was none."""
    found.quiet_points += 1
    found.breaches += await recovered(server, faults)
    held = await server.at_rest(base)
    if beyond := held.beyond(base or held):
        found.breaches.append(Breach("V10", f"at rest: {'; '.join(beyond)}: {server.holds()}"))
    figures = await server.scrape()
    if left := in_flight(figures):
        found.breaches.append(Breach("V4", f"at rest {left} requests, texts or batches are still counted"))
    counted = {
        (dict(labels)["method"], dict(labels)["code"]): int(value)
        for (name, labels), value in figures.items()
        if name == "mlis_requests_total" and value
    }
    found.breaches += metrics_breaches(counted, read_ledger(ledger).counts)
    return base or held


@contextlib.asynccontextmanager
async def _callers(
    folder: Path, port: int, proxy_port: int, keys: KeysFile, seed: str
) -> AsyncIterator["list[asyncio.subprocess.Process]"]:
    processes: list[asyncio.subprocess.Process] = []
    try:
        for number in range(CALLERS):
            given = {"port": port, "proxy-port": proxy_port, "number": number, "seed": seed}
            given |= {"ledger": folder / f"calls-{number}"}
            command = [part for name, value in given.items() for part in (f"--{name}", str(value))]
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "tests.scoreboard.chaos_callers", *command),
                cwd=ROOT,
                env=environment(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            processes.append(process)
            _send(process, keys.tokens)
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _send(process: asyncio.subprocess.Process, what: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(what).encode() + b"\n")


async def _ask(process: asyncio.subprocess.Process, what: Any) -> dict[str, Any]:
    assert process.stdout is not None
    _send(process, what)
    line = await process.stdout.readline()
    if not line:
        raise RuntimeError(f"a process of callers ended with exit code {await process.wait()}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description="A server under calls and faults of all kinds, with a ledger.")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--segment-calls", type=int, default=5_000, help="of each process of callers, before a rest")
    parser.add_argument("--most-s", type=float, default=3600.0)
    parser.add_argument("--folder", type=Path, help="keep the ledgers and the server's log there; it must be empty")
    given = parser.parse_args()
    extent = Extent(calls=given.calls, faults=given.faults, segment_calls=given.segment_calls, most_s=given.most_s)

    def tell(done: int, of: int) -> None:
        print(f"\r{done} of {of}", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        found = asyncio.run(chaos(folder, extent, seed=given.seed, tell=tell))
    print(f"\nseed {found.seed}: {found.calls.total()} calls, {found.faults.total()} faults in {found.seconds:.0f} s")
    for (kind, code), count in sorted(found.calls.items()):
        print(f"  {kind:12} {code:20} {count}")
    print(f"faults: {dict(found.faults)}; {found.restarts} engines started again; {found.quiet_points} rests")
    print(f"{found.harmed} plain calls ended with an error; breaches: {dict(found.broken)}")
    for breach in found.breaches[:_MOST_BREACHES]:
        print(f"breach: {breach}")
    return 1 if found.breaches else 0


if __name__ == "__main__":
    sys.exit(main())
