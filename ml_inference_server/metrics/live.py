"""Once a second: looks at everything once, keeps it for an hour, and sends it to every page that listens."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from ml_inference_server.metrics.benchmark_progress import BenchmarkProgress
from ml_inference_server.metrics.hints import hints
from ml_inference_server.metrics.history import History
from ml_inference_server.metrics.registry import Metrics

TICK_S = 1.0
LAG_PROBE_S = 0.1

log = logging.getLogger(__name__)


class Live:
    """server_info, readiness: as the sidecar has them."""

    def __init__(
        self, metrics: Metrics, server_info: Callable[[], Mapping[str, Any]], readiness: Callable[[], tuple[bool, str]]
    ) -> None:
        self._metrics = metrics
        self._server_info = server_info
        self._readiness = readiness
        self._history = History()
        self.benchmark = BenchmarkProgress()
        self._message = ""
        self._failed = False
        self._next: asyncio.Future[str] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """The first tick at once, then one each second."""
        self._next = asyncio.get_running_loop().create_future()
        self._tick()
        self._tasks = [asyncio.create_task(self._tick_for_ever()), asyncio.create_task(self._probe_lag())]

    async def stop(self) -> None:
        """End the ticks and every `listen`. Safe to call twice."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._next is not None:
            self._next.cancel()

    def figures(self) -> dict[str, Any]:
        """The JSON of GET /metrics."""
        ready, reason = self._readiness()
        figures = self._metrics.snapshot()
        return {
            **figures,
            "readiness": {"ready": ready, "reason": reason},
            "hints": hints(figures, lambda: self._server_info().get("settings") or {}),
            "benchmark": self.benchmark.current(time.monotonic()),
        }

    def message(self) -> str:
        """The JSON of the last tick. RuntimeError if that one failed: the log has the cause."""
        if self._failed:
            raise RuntimeError("the figures could not be put together")
        return self._message

    def history(self) -> str:
        """The JSON of GET /api/v1/history."""
        return self._history.json()

    async def listen(self) -> AsyncIterator[str]:
        """The last message, then each new one; ends with `stop`. Who is slow misses some."""
        yield self.message()
        while self._next is not None and not self._next.cancelled():
            try:
                yield await asyncio.shield(self._next)
            except asyncio.CancelledError:
                if self._next.cancelled():
                    return
                raise

    async def _tick_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            # On a grid: a late tick is not followed by late ones. Ticks that were slept through are left out.
            due = max(due + TICK_S, loop.time())
            await asyncio.sleep(due - loop.time())
            self._tick()

    def _tick(self) -> None:
        try:
            closed, covered_s = self._metrics.take_closed()
            fine, coarse = self._history.add(closed, covered_s, self._metrics.gauges(), time.time())
            figures = json.dumps(self.figures(), allow_nan=False, separators=(",", ":"))
        except Exception:
            if not self._failed:
                log.exception("the live figures could not be put together; trying again every second")
            self._failed = True
            return
        self._failed = False
        self._message = f'{{"figures":{figures},"row":{fine},"coarse_row":{coarse or "null"}}}'
        if self._next is not None:
            waited_for, self._next = self._next, asyncio.get_running_loop().create_future()
            waited_for.set_result(self._message)

    async def _probe_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_PROBE_S
            await asyncio.sleep(LAG_PROBE_S)
            self._metrics.observe_loop_lag(max(0.0, loop.time() - due))
