"""The server as a process: signals, the ready file, the exit code."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ml_inference_server.server.health import EngineLost, parent_ended
from ml_inference_server.server.lifecycle import Server, serving
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import (
    EXIT_ENGINE_LOST,
    EXIT_FAILED_RUN,
    EXIT_HUNG_UP,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    ConfigError,
)
from ml_inference_server.utils.files import replace_file
from ml_inference_server.utils.process import end_process, hangup_signal, leave_dead_streams
from ml_inference_server.utils.supervise import HEARTBEAT_EVERY_S, beat
from ml_inference_server.worker_processes.seat import Seat

log = logging.getLogger(__name__)


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP: the first one asks for a stop, a second SIGINT ends the process at once.

    exit_code: of a stop that went well. early_exit_code: of one before the server served.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.exit_code = EXIT_OK
        self.early_exit_code = EXIT_TERMINATED
        self._in_flight: Callable[[], int] = lambda: 0
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.asked.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        if (hangup := hangup_signal()) is not None:
            loop.add_signal_handler(hangup, self._hang_up)

    def report(self, in_flight: Callable[[], int]) -> None:
        """From now on the first Ctrl-C says how many requests it waits for."""
        self._in_flight = in_flight

    def _hang_up(self) -> None:
        leave_dead_streams()
        self.early_exit_code = EXIT_HUNG_UP
        self.asked.set()

    def _interrupt(self) -> None:
        if self.asked.is_set():
            end_process(EXIT_INTERRUPTED)
        self.exit_code = self.early_exit_code = EXIT_INTERRUPTED
        print(
            f"\nfinishing {self._in_flight()} requests; press Ctrl-C again to stop at once", file=sys.stderr, flush=True
        )
        self.asked.set()


Started = Callable[[Server], None]
"""Called once with the server that serves, before anybody hears of it."""


async def serve(
    settings: Settings,
    *,
    ready_file: Path | None = None,
    exit_with_parent: bool = False,
    heartbeat: int | None = None,
    started: Started | None = None,
    seat: Seat | None = None,
) -> int:
    """Serve until a signal asks for the stop; the process's exit code. Raises StartError if it cannot start.

    Whoever calls it ends the process then, which is what closes the gRPC connections.

    ready_file: holds the ports and the process id while it serves. exit_with_parent: stop when the parent has ended.
    heartbeat: a descriptor of the supervisor's. seat: of a worker among others.
    """
    signals = StopSignals()
    asked = asyncio.create_task(signals.asked.wait())
    parent = asyncio.create_task(parent_ended()) if exit_with_parent else None
    if parent is not None:
        parent.add_done_callback(lambda _: signals.asked.set())
    beating = None if heartbeat is None else asyncio.create_task(_beat(heartbeat))
    ready = asyncio.Event()
    running = asyncio.create_task(_serve(settings, signals, ready, ready_file, started, seat))
    try:
        await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
        if ready.is_set() or running.done():
            return await running
        log.warning("stopped while the model was loading")
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        return signals.early_exit_code
    finally:
        for task in filter(None, (asked, parent, beating)):
            task.cancel()


async def _beat(heartbeat: int) -> None:
    while True:
        beat(heartbeat)
        await asyncio.sleep(HEARTBEAT_EVERY_S)


async def _serve(
    settings: Settings,
    signals: StopSignals,
    ready: asyncio.Event,
    ready_file: Path | None,
    started: Started | None,
    seat: Seat | None,
) -> int:
    async with serving(settings, ends_process=True, seat=seat) as server:
        ready.set()
        if started is not None:
            started(server)
        # What is here now stays: full collections need not visit it again, which took 30 ms of silence each.
        gc.collect()
        gc.freeze()
        signals.report(lambda: server.model.admission.requests)
        with _announced(server, ready_file):
            log.info("ready")
            exit_code = await _until_stop(server, signals)
    return exit_code or (EXIT_FAILED_RUN if server.cut_off else signals.exit_code)


@contextlib.contextmanager
def _announced(server: Server, ready_file: Path | None) -> Iterator[None]:
    if ready_file is None:
        yield
        return
    ports = {"grpc_port": server.grpc_port, "http_port": server.http_port, "pid": os.getpid()}
    try:
        replace_file(ready_file, json.dumps(ports) + "\n")
    except OSError as error:
        raise ConfigError(f"--ready-file {ready_file} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        ready_file.unlink(missing_ok=True)


async def _until_stop(server: Server, signals: StopSignals) -> int:
    """EXIT_ENGINE_LOST where only a new process can help.

    EXIT_FAILED_RUN where the health watcher failed: health could lie from then on.
    """
    asked = asyncio.create_task(signals.asked.wait())
    await asyncio.wait({asked, server.health}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if not server.health.done():
        return EXIT_OK
    error = server.health.exception()
    if isinstance(error, EngineLost):
        log.critical("%s: this process ends with exit code %d, to be started again", error, EXIT_ENGINE_LOST)
        return EXIT_ENGINE_LOST
    log.critical("the health watcher failed: shutting down", exc_info=error)
    return EXIT_FAILED_RUN
