"""A backend in processes of its own, one for each stream.

Python's lock then stands between no batch and the requests, and a batch that crashes or hangs costs its process, not
the server. What ran there fails like a batch that raised; the process is started again, from the cache.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.backends.startup.resolve import Resolution
from ml_inference_server.backends.startup.start import Described
from ml_inference_server.server.engine_process import EngineDied, EngineProcess
from ml_inference_server.server.workers import Output
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError, StartError

log = logging.getLogger(__name__)

_MOST_BACKOFF_S = 30.0


class ProcessWorker:
    """A process for each slot; one that ends is replaced. `start` first."""

    express_slots = 0  # another process would hold the model once more

    def __init__(self, *, hang_timeout_s: float, faults: bool) -> None:
        """faults: let the fake backend obey its fault words."""
        self._hang_timeout_s = hang_timeout_s
        self._faults = faults
        self._resolution: Resolution | None = None
        self.engines: set[EngineProcess] = set()
        # The last one to end a batch has the weights in its cache.
        self._idle: asyncio.LifoQueue[EngineProcess] = asyncio.LifoQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.slots = 0
        self.restarts = 0

    async def start(self, model: ModelSettings, phase: Callable[[str], None]) -> Described:
        """The first process chooses, checks and fills the caches; then the others load. ModelError if one cannot."""
        try:
            described = await self._launch(model, phase)
            assert described is not None  # noqa: S101 - the first one describes what it loaded
            self._resolution = described.resolution
            self.slots = described.resolution.model.streams
            phase(f"starting {self.slots} processes")
            await asyncio.gather(*(self._launch(self._resolution) for _ in range(self.slots - 1)))
        except EngineDied as error:
            self.close()
            raise ModelError(f"the model could not be loaded: {error}") from error
        except BaseException:
            self.close()
            raise
        return described

    async def _launch(
        self, asked: ModelSettings | Resolution, phase: Callable[[str], None] = lambda text: None
    ) -> Described | None:
        engine = EngineProcess(asked, self._faults, phase, self._replace)
        described = await engine.start()
        if self._closed:
            engine.kill()
        if not engine.alive:
            raise EngineDied(f"the process of the engine ended ({engine.end})")
        self.engines.add(engine)
        self._idle.put_nowait(engine)
        return described

    def _replace(self, dead: EngineProcess) -> None:
        """Called once for each process that has ended."""
        if dead in self.engines and not self._closed:
            log.error("a process of the engine ended (%s): starting a new one", dead.end)
            self.restarts += 1
            task = asyncio.create_task(self._launch_until_it_runs())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self.engines.discard(dead)

    async def _launch_until_it_runs(self) -> None:
        for tries in itertools.count():
            try:
                assert self._resolution is not None  # noqa: S101 - `start` has set it
                await self._launch(self._resolution)
            except (EngineDied, StartError, OSError) as error:
                wait_s = min(2.0**tries, _MOST_BACKOFF_S)
                log.error("the engine did not start (%s): trying again in %.0f s", error, wait_s)
                await asyncio.sleep(wait_s)
            else:
                log.info("a new process of the engine runs")
                return

    async def run(self, batch: TokenBatch) -> Output:
        """Run one batch; waits while there is no process for it. Raises EngineDied, or RuntimeError if it raised."""
        engine = await self._idle.get()
        while not engine.alive:
            engine = await self._idle.get()
        try:
            return await engine.run(batch, self._hang_timeout_s)
        finally:
            if engine.alive:
                self._idle.put_nowait(engine)

    @property
    def pids(self) -> Sequence[int]:
        return [engine.pid for engine in self.engines if engine.alive]

    @property
    def trouble(self) -> str:
        return "" if self.pids else "no process of the engine runs; it is being started again"

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for engine in list(self.engines):
            engine.kill()
