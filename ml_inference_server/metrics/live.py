"""Once a second: looks at everything once, keeps it for an hour, and sends it to every page that listens."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

from ml_inference_server.metrics.benchmark_progress import BenchmarkProgress
from ml_inference_server.metrics.broadcast import Broadcast
from ml_inference_server.metrics.hints import hints
from ml_inference_server.metrics.history import History
from ml_inference_server.metrics.model_figures import ModelFigures
from ml_inference_server.metrics.snapshot import Gauges
from ml_inference_server.metrics.window import Slot

TICK_S = 1.0
LAG_PROBE_S = 0.1

log = logging.getLogger(__name__)


class Recorded(Protocol):
    """What is looked at: the figures of one process, or of several."""

    def snapshot(self) -> dict[str, Any]: ...

    def take_closed(self) -> tuple[Slot, float]: ...

    def gauges(self) -> Gauges: ...

    def prometheus(self, accept: str) -> tuple[bytes, str]: ...

    def model_figures(self) -> ModelFigures: ...


class Live:
    """A `View` of what is recorded here.

    server_info, readiness: as the sidecar has them. observe_lag: gets how late the event loop runs what is due.
    refresh: awaited before anything is looked at. workers: as the `View` tells them.
    """

    def __init__(
        self,
        metrics: Recorded,
        server_info: Callable[[], Mapping[str, Any]],
        readiness: Callable[[], tuple[bool, str]],
        *,
        observe_lag: Callable[[float], None] | None = None,
        refresh: Callable[[], Awaitable[None]] | None = None,
        workers: Callable[[], list[dict[str, Any]]] = list,
    ) -> None:
        self._metrics = metrics
        self._server_info = server_info
        self._readiness = readiness
        self._observe_lag = observe_lag
        self._refresh = refresh or _nothing
        self._workers = workers
        self._history = History()
        self._benchmark = BenchmarkProgress()
        self._message = ""
        self._failed = False
        self._broadcast: Broadcast | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """The first tick at once, then one each second."""
        self._broadcast = Broadcast()
        self._tick()
        self._tasks = [asyncio.create_task(self._tick_for_ever())]
        if self._observe_lag is not None:
            self._tasks.append(asyncio.create_task(probe_lag(self._observe_lag)))

    async def stop(self) -> None:
        """End the ticks and every `listen`. Safe to call twice."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._broadcast is not None:
            self._broadcast.close()

    async def figures(self) -> dict[str, Any]:
        await self._refresh()
        return self._figures()

    def _figures(self) -> dict[str, Any]:
        ready, reason = self._readiness()
        figures = self._metrics.snapshot()
        return {
            **figures,
            "readiness": {"ready": ready, "reason": reason},
            "workers": self._workers(),
            "hints": hints(figures, lambda: self._server_info().get("settings") or {}),
            "benchmark": self._benchmark.current(time.monotonic()),
        }

    async def prometheus(self, accept: str) -> tuple[bytes, str]:
        await self._refresh()
        return self._metrics.prometheus(accept)

    async def model_figures(self) -> ModelFigures:
        await self._refresh()
        return self._metrics.model_figures()

    async def readiness(self) -> tuple[bool, str]:
        await self._refresh()
        return self._readiness()

    async def workers(self) -> list[dict[str, Any]]:
        await self._refresh()
        return self._workers()

    async def message(self) -> str:
        if self._failed:
            raise RuntimeError("the figures could not be put together")
        return self._message

    async def history(self) -> str:
        return self._history.json()

    async def announce(self, body: bytes) -> None:
        self._benchmark.update(body, time.monotonic())

    async def listen(self) -> AsyncIterator[str]:
        yield await self.message()
        if self._broadcast is not None:
            async for message in self._broadcast.following():
                yield message

    async def _tick_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            # On a grid: a late tick is not followed by late ones. Ticks that were slept through are left out.
            due = max(due + TICK_S, loop.time())
            await asyncio.sleep(due - loop.time())
            await self._refresh()
            self._tick()

    def _tick(self) -> None:
        try:
            closed, covered_s = self._metrics.take_closed()
            fine, coarse = self._history.add(closed, covered_s, self._metrics.gauges(), time.time())
            figures = json.dumps(self._figures(), allow_nan=False, separators=(",", ":"))
        except Exception:
            if not self._failed:
                log.exception("the live figures could not be put together; trying again every second")
            self._failed = True
            return
        self._failed = False
        self._message = f'{{"figures":{figures},"row":{fine},"coarse_row":{coarse or "null"}}}'
        if self._broadcast is not None:
            self._broadcast.publish(self._message)


async def probe_lag(observe: Callable[[float], None]) -> None:
    """Without end: how late the event loop is, ten times a second."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_PROBE_S
        await asyncio.sleep(LAG_PROBE_S)
        observe(max(0.0, loop.time() - due))


async def _nothing() -> None:
    """Needs no refreshing: what is recorded is here."""
