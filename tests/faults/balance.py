"""Our Python client over several servers: how calls are spread, what a rolling restart loses, when a new one is found.

By hand, 20,000 calls for each of them: python -m tests.faults.balance --calls 20000
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ml_inference_server import AsyncClient
from ml_inference_server.api.errors import ServerError
from ml_inference_server.utils.arguments import positive_float, positive_int
from tests.conftest import until
from tests.faults.dns_names import Names
from tests.faults.restarts import Fleet, free_ports
from tests.integration.server_process import server_process

CALLERS = 12
MOST_OFF = 0.1
"""Of an even share, either way."""


@dataclass
class Calls:
    """by_server: answered calls, by the server's instance. lost: what the client raised. recent: the last servers."""

    client: AsyncClient
    by_server: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=400))
    is_over: bool = False

    async def one(self, text: str) -> None:
        ids: list[str] = []
        try:
            await self.client.embed([text], on_reply=lambda details: ids.append(details.request_id))
        except ServerError as error:
            self.lost.append(repr(error))
            return
        server = ids[0].partition("-")[0]
        self.by_server[server] += 1
        self.recent.append(server)

    async def until_over(self, number: int) -> None:
        while not self.is_over:
            await self.one(f"{number} {self.by_server.total()}")

    @property
    def total(self) -> int:
        return self.by_server.total() + len(self.lost)

    def is_even(self, servers: int) -> bool:
        """Whether the last calls went to so many servers in equal parts."""
        counted, share = Counter(self.recent), len(self.recent) / servers
        return (
            len(self.recent) == self.recent.maxlen
            and len(counted) == servers
            and all(abs(count - share) <= MOST_OFF * share for count in counted.values())
        )


@contextlib.asynccontextmanager
async def calling(target: str) -> AsyncIterator[Calls]:
    """Callers that call again as soon as they are answered, until the block ends."""
    async with AsyncClient(target) as client:
        calls = Calls(client)
        tasks = [asyncio.create_task(calls.until_over(number)) for number in range(CALLERS)]
        try:
            yield calls
        finally:
            calls.is_over = True
            await asyncio.gather(*tasks)


@dataclass
class Spread:
    """Of three servers that go round: what each was given before, and what was lost while each was restarted."""

    by_server: Counter[str]
    restarts: int
    calls: int
    lost: list[str]
    exit_codes: Counter[int]

    @property
    def off(self) -> float:
        """How far the server that is furthest from an even share is off, as a part of that share."""
        share = self.by_server.total() / len(self.by_server)
        return max(abs(count - share) for count in self.by_server.values()) / share


async def spread_and_restarts(folder: Path, *, calls: int, servers: int = 3, settings: Sequence[str] = ()) -> Spread:
    """`calls` calls over servers that stand, then as many and more until each server was restarted in turn."""
    fleet = Fleet(folder, free_ports(servers), settings)
    try:
        for port in fleet.ports:
            await asyncio.to_thread(fleet.start, port)
        async with calling("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in fleet.ports)) as going_on:
            await until(lambda: len(going_on.by_server) == servers)
            going_on.by_server.clear()  # until all were connected, the first one had all calls
            await until(lambda: going_on.by_server.total() >= calls)
            spread = going_on.by_server.copy()
            begun, known, restarts = going_on.total, len(going_on.by_server), 0
            while restarts < servers or going_on.total - begun < calls:
                port = fleet.ports[restarts % servers]
                await asyncio.to_thread(fleet.stop, port)
                await asyncio.to_thread(fleet.start, port)
                # The next one is not stopped before the clients have found this one again.
                await until(lambda known=known: len(going_on.by_server) > known)
                known = len(going_on.by_server)
                restarts += 1
        for port in fleet.ports:
            await asyncio.to_thread(fleet.stop, port)
    finally:
        fleet.kill_all()
    return Spread(spread, restarts, going_on.total - begun, going_on.lost, fleet.exit_codes)


@dataclass
class Found:
    """first_s, even_s: from the moment in which a fourth server is ready and its name says so."""

    first_s: float
    even_s: float
    lost: list[str]


async def newcomer(folder: Path, *, max_connection_age_s: float) -> Found:
    """Three servers behind one name, then a fourth: when it gets its first call, and when as many as the others."""
    (port,) = free_ports(1)
    hosts = [f"127.0.0.{number}" for number in range(1, 5)]
    age = ("--set", f"server.max_connection_age_s={max_connection_age_s}")
    names = Names(*hosts[:3])
    dns_port = await names.listen()
    with contextlib.ExitStack() as stack:

        def start(host: str) -> None:
            own = folder / host
            own.mkdir()
            stack.enter_context(server_process(own, "--host", host, "--port", str(port), *age)).ready()

        try:
            for host in hosts[:3]:
                await asyncio.to_thread(start, host)
            async with calling(f"dns://127.0.0.1:{dns_port}/embeddings.test:{port}") as going_on:
                await until(lambda: going_on.is_even(3))
                await asyncio.to_thread(start, hosts[3])
                names.addresses = hosts
                began_at = time.monotonic()
                await until(lambda: len(going_on.by_server) == 4)
                first_s = time.monotonic() - began_at
                await until(lambda: going_on.is_even(4))
                even_s = time.monotonic() - began_at
        finally:
            names.close()
    return Found(first_s, even_s, going_on.lost)


def main() -> int:
    parser = argparse.ArgumentParser(description="How calls of the Python client are spread over several servers.")
    parser.add_argument("--calls", type=positive_int, default=20_000)
    parser.add_argument("--servers", type=positive_int, default=3)
    parser.add_argument("--max-connection-age-s", type=positive_float, default=10.0)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    settings = [part for setting in given.settings for part in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        spread = asyncio.run(
            spread_and_restarts(Path(folder), calls=given.calls, servers=given.servers, settings=settings)
        )
    print(
        f"spread: {spread.by_server.total()} calls over {given.servers} servers, {100 * spread.off:.2f} % off at most"
    )
    print(f"rolling restart: {spread.restarts} restarts, {spread.calls} calls, {len(spread.lost)} lost")
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(newcomer(Path(folder), max_connection_age_s=given.max_connection_age_s))
    print(
        f"a new server, connections of at most {given.max_connection_age_s:g} s: first call after {found.first_s:.1f} "
        f"s, an even share after {found.even_s:.1f} s, {len(found.lost)} lost"
    )
    in_time = found.even_s <= 1.1 * given.max_connection_age_s
    return 0 if spread.off <= MOST_OFF and in_time and not spread.lost and not found.lost else 1


if __name__ == "__main__":
    sys.exit(main())
