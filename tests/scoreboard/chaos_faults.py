"""Faults that hit more than one call: of the engine, of the network, of the whole server, of its keys."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import psutil

from ml_inference_server.door.keys import create_key
from ml_inference_server.door.rights import Right
from tests.scoreboard.chaos_callers import ChaosCaller
from tests.scoreboard.chaos_ledger import CallEnd, Fault
from tests.scoreboard.chaos_plan import PlannedCall, name_words, planned_as
from tests.scoreboard.real_server import RealServer
from tests.scoreboard.tcp_proxy import TcpProxy

_GAP_S = 0.6
_STALL_S, _MOST_FREEZE_S = 0.2, 0.3
_WORD_TIMEOUT_S = 20.0
_STARTED_S = 4.0
# Long enough to be tokenised in a thread, and so many that all of them are busy.
_LONG_WORDS, _LONG_TEXTS = 800, 12
# An engine takes a second or more to come again, and a text that kills it does so three times.
_WEIGHTS = {"kill": 1.5, "stop": 0.6, "crash": 0.4, "hang": 0.4, "cut": 8, "stall": 3, "freeze": 3, "keys": 6}
_ENGINE = frozenset({"kill", "stop", "crash", "hang", "freeze"})


class KeysFile:
    """The server's keys. It changes as time goes on; two keys always stay, a third one comes and goes.

    tokens: "" of callers, "metrics" of who scrapes, "extra" of the third, "stranger" of nobody.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens = {"stranger": "mlis_" + "x" * 43}
        for lane, rights in (("", [Right.INFER]), ("metrics", [Right.METRICS])):
            self.tokens[lane], content = create_key(path, lane or "caller", rights)
            path.write_text(content)
        without = path.read_text()
        self.tokens["extra"], content = create_key(path, "extra", [Right.INFER])
        path.write_text(content)
        self._contents = (without, content, "keys: [broken")

    def change(self, rng: random.Random) -> None:
        """To one of what it can be; a broken one must leave the former in force."""
        temporary = self.path.with_suffix(".new")
        temporary.write_text(rng.choice(self._contents))
        temporary.replace(self.path)


class ChaosFaults:
    """Does what a seeded schedule says, and remembers it. ends: of the calls that it made itself."""

    def __init__(
        self, server: RealServer, proxy: TcpProxy, keys: KeysFile, caller: ChaosCaller, seed: str, streams: int
    ) -> None:
        self._server, self._proxy, self._keys, self.caller = server, proxy, keys, caller
        self._rng = random.Random(f"{seed}/faults")
        self._seed, self._streams = seed, streams
        self._calls: set[asyncio.Task[None]] = set()
        self.faults: list[Fault] = []
        self.ends: list[CallEnd] = []

    def engines(self) -> list[psutil.Process]:
        """The processes of the engine that live; not what Python starts beside them."""
        found = []
        for child in self._server.ps.children():
            with contextlib.suppress(psutil.Error):
                if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
        return found

    async def run(self, until: Callable[[], bool]) -> None:
        """One fault after the other until then."""
        doing: dict[str, Callable[[], Awaitable[None] | None]] = {
            "kill": lambda: self._signal(signal.SIGKILL),
            "stop": lambda: self._signal(signal.SIGSTOP),
            "crash": lambda: self._word("crash"),
            "hang": lambda: self._word("hang"),
            "cut": self._proxy.cut,
            "stall": self._stall,
            "freeze": self._freeze,
            "keys": lambda: self._keys.change(self._rng),
        }
        while not until():
            await asyncio.sleep(self._rng.expovariate(1 / _GAP_S))
            kind = self._rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
            self.faults.append(Fault(kind, time.monotonic(), kind in _ENGINE))
            done = doing[kind]()
            if done is not None:
                await done
        await asyncio.gather(*self._calls)

    def _signal(self, number: signal.Signals) -> None:
        engines = sorted(self.engines(), key=lambda engine: engine.pid)
        if number is signal.SIGSTOP:
            # One that stops while it starts is noticed after a minute only.
            engines = [engine for engine in engines if time.time() - engine.create_time() > _STARTED_S]
        if not engines:  # all are being started again: it hits nobody
            del self.faults[-1]
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._rng.choice(engines).pid, number)

    def _word(self, kind: str) -> None:
        name = f"d{kind}{len(self.faults)}"
        rng = random.Random(f"{self._seed}/{name}")

        async def call() -> None:
            self.ends.append(await self.caller.call(planned_as(kind, rng, name, _WORD_TIMEOUT_S)))

        task = asyncio.create_task(call())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _stall(self) -> None:
        self._proxy.stall()
        await asyncio.sleep(_STALL_S)
        self._proxy.go_on()

    async def _freeze(self) -> None:
        self._server.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self._rng.uniform(0.05, _MOST_FREEZE_S))
        self._server.process.send_signal(signal.SIGCONT)

    async def fill_pools(self) -> None:
        """Whatever threads the server starts when it first needs them, it has then: what it holds can be a base."""
        words = [f"{name_words(f'dlong{number}')} " + "w " * _LONG_WORDS for number in range(_LONG_TEXTS)]
        calls = [
            PlannedCall(name=f"dlong{number}", kind="plain", method="Embed", texts=[text], timeout_s=_WORD_TIMEOUT_S)
            for number, text in enumerate(words)
        ]
        self.ends += await asyncio.gather(*(self.caller.call(each) for each in calls))
        for engine in self.engines():
            with contextlib.suppress(psutil.Error):
                engine.kill()

    def is_whole(self) -> bool:
        """All engines are there, and none of them is stopped."""
        return _states(self.engines()).count(True) == self._streams


def _states(engines: Sequence[psutil.Process]) -> list[bool]:
    states = []
    for engine in engines:
        with contextlib.suppress(psutil.Error):
            states.append(engine.status() != psutil.STATUS_STOPPED)
    return states
