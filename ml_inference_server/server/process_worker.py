"""A backend in processes of its own, one for each stream.

Python's lock then stands between no batch and the requests, and a batch that crashes or hangs costs its process, not
the server. What ran there fails like a batch that raised; the process is started again, from the cache.
"""

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Sequence

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.backends.startup.resolve import Resolution
from ml_inference_server.backends.startup.start import Described
from ml_inference_server.server.engine_process import EngineDied, EngineProcess, StartListener
from ml_inference_server.server.workers import Output, express_slots
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError, StartError

log = logging.getLogger(__name__)

_MOST_BACKOFF_S = 30.0
# A start that takes several times as long as the first one, which had to choose and check as well, hangs.
_TIMES_THE_FIRST_START = 3.0
LEAST_START_LIMIT_S = 60.0
# Idle processes are asked whether they are there.
PING_EVERY_S = 5.0
_MOST_PING_S = 10.0


class ProcessWorker:
    """A process for each slot; one that ends is replaced. `start` first.

    On a CPU an express batch runs beside a bulk one in the same process, in a thread of its own.
    """

    def __init__(self, *, hang_timeout_s: float, faults: bool) -> None:
        """faults: let the fake backend obey its fault words."""
        self._hang_timeout_s = hang_timeout_s
        self._faults = faults
        self._resolution: Resolution | None = None
        self.engines: set[EngineProcess] = set()
        self._freed = asyncio.Event()  # set when a batch ends, or a process is ready: who waits for one looks again
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._start_limit_s = math.inf
        self._failed_starts = 0  # in a row
        self.slots = self.express_slots = 0
        self.restarts = 0
        self.lost = ""  # what hangs here can be ended

    async def start(self, model: ModelSettings, phase: Callable[[str], None]) -> Described:
        """The first process chooses, fills the caches and checks; the others load once it has loaded.

        ModelError if one cannot.
        """
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        others: list[asyncio.Task[Described | None]] = []

        def limit_starts() -> None:
            self._start_limit_s = max(LEAST_START_LIMIT_S, _TIMES_THE_FIRST_START * (loop.time() - began_at))

        def start_others(resolution: Resolution) -> None:
            limit_starts()
            self._resolution = resolution
            others.extend(loop.create_task(self._launch(resolution)) for _ in range(resolution.model.streams - 1))

        try:
            described = await self._launch(model, StartListener(phase, start_others))
            assert described is not None  # noqa: S101 - the first one describes what it loaded
            limit_starts()
            self.slots = described.resolution.model.streams
            self.express_slots = express_slots(described.info)
            phase(f"starting {self.slots} processes")
            await asyncio.gather(*others)
        except EngineDied as error:
            await self._give_up(others)
            raise ModelError(f"the model could not be loaded: {error}") from error
        except BaseException:
            await self._give_up(others)
            raise
        self._keep(asyncio.create_task(self._ping_idle_ones()))
        return described

    async def _give_up(self, launches: Sequence[asyncio.Task[Described | None]]) -> None:
        """The start has failed: whatever was started ends."""
        for launch in launches:
            launch.cancel()
        await asyncio.gather(*launches, return_exceptions=True)
        self.close()

    async def _launch(self, asked: ModelSettings | Resolution, told: StartListener | None = None) -> Described | None:
        engine = EngineProcess(asked, self._faults, told or StartListener(), self._replace)
        described = await engine.start(self._start_limit_s)
        if self._closed:
            engine.kill()
        if not engine.alive:
            raise EngineDied(f"the process of the engine ended ({engine.end})")
        self.engines.add(engine)
        self._freed.set()
        return described

    def _replace(self, dead: EngineProcess) -> None:
        """Called once for each process that has ended."""
        if dead in self.engines and not self._closed:
            log.error("a process of the engine ended (%s): starting a new one", dead.end)
            self.restarts += 1
            self._keep(asyncio.create_task(self._launch_until_it_runs()))
        self.engines.discard(dead)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _launch_until_it_runs(self) -> None:
        for tries in itertools.count():
            try:
                assert self._resolution is not None  # noqa: S101 - `start` has set it
                await self._launch(self._resolution)
            except (EngineDied, StartError, OSError) as error:
                self._failed_starts += 1
                wait_s = min(2.0**tries, _MOST_BACKOFF_S)
                log.error("the engine did not start (%s): trying again in %.0f s", error, wait_s)
                await asyncio.sleep(wait_s)
            else:
                self._failed_starts = 0
                log.info("a new process of the engine runs")
                return

    async def _ping_idle_ones(self) -> None:
        """One that hangs while nobody asks it for anything is found before somebody does."""
        while True:
            await asyncio.sleep(PING_EVERY_S)
            idle = [engine for engine in self.engines if engine.alive and not engine.questions]
            await asyncio.gather(*map(self._ping, idle))

    async def _ping(self, engine: EngineProcess) -> None:
        try:
            await engine.ping(min(self._hang_timeout_s, _MOST_PING_S))
        except EngineDied as error:
            log.debug("ping: %s", error)
        finally:
            self._freed.set()

    async def run(self, batch: TokenBatch, limit_s: float = math.inf, *, is_bulk: bool = False) -> Output:
        """Run one batch; waits while there is no process for it. Raises EngineDied, or RuntimeError if it raised."""
        is_bulk = is_bulk and self.express_slots > 0
        while (engine := self._freest(is_bulk)) is None:
            self._freed.clear()
            await self._freed.wait()
        try:
            return await engine.run(batch, min(limit_s, self._hang_timeout_s), is_bulk=is_bulk)
        finally:
            self._freed.set()

    def _freest(self, is_bulk: bool) -> EngineProcess | None:
        """The one with the fewest questions, of those that can take one more of this kind.

        Of several the last to end a batch: it has the weights in its cache.
        """
        free = [each for each in self.engines if each.has_room(is_bulk=is_bulk)]
        return min(free, key=lambda each: (each.questions, -each.ended_at), default=None)

    @property
    def pids(self) -> Sequence[int]:
        return [engine.pid for engine in self.engines if engine.alive]

    @property
    def trouble(self) -> str:
        return "" if self.pids else "no process of the engine runs; it is being started again"

    @property
    def stuck(self) -> str:
        """Calls wait for the first try of a start, as it takes seconds; not for one that has failed already."""
        return "the engine cannot be started" if self._failed_starts and not self.pids else ""

    def renew(self) -> None:
        """End all processes; each is replaced."""
        for engine in list(self.engines):
            engine.kill()

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for engine in list(self.engines):
            engine.kill()
