"""Starts the workers of one server, keeps them running, stops them together, and answers what is asked of them all."""

import asyncio
import contextlib
import functools
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.cores import claimed, divided, listed
from ml_inference_server.utils.cpu import available_cpus, quota_cpus
from ml_inference_server.utils.errors import EXIT_CONFIG, EXIT_MODEL, EXIT_OK, EXIT_PORT, EXIT_TERMINATED, ConfigError
from ml_inference_server.utils.files import replace_file
from ml_inference_server.utils.ports import check_shared_ports, reserved
from ml_inference_server.utils.process import hangup_signal
from ml_inference_server.utils.supervise import HEARTBEAT_EVERY_S, KeptProcess, beat
from ml_inference_server.worker_processes.hub import Hub
from ml_inference_server.worker_processes.seat import WORKER_FLAG, Seat

log = logging.getLogger(__name__)

_PARENT_EVERY_S = 0.5
# Of a worker that ends later nothing is final: the others go on, and what was wrong may be mended meanwhile.
_FINAL_AT_FIRST = (EXIT_CONFIG, EXIT_MODEL, EXIT_PORT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What the program was told beside its settings; the same as of one server."""

    ready_file: Path | None = None
    exit_with_parent: bool = False
    heartbeat: int | None = None


def run_workers(settings: Settings, count: int, orders: Orders) -> int:
    """Until a signal ends them; the exit code. StartError if they cannot be started."""
    check_shared_ports()
    with (
        _own_cpus(settings, count) as cpus,
        reserved(settings.server.host, settings.server.port, "server") as grpc_port,
        reserved(settings.metrics.host, settings.metrics.port, "metrics") as http_port,
    ):
        ports = {"grpc_port": grpc_port, "http_port": http_port}
        return asyncio.run(_run(settings, cpus, ports, orders))


@contextlib.contextmanager
def _own_cpus(settings: Settings, count: int) -> Iterator[list[list[int]]]:
    """Of each worker; empty lists where the system places them."""
    if not settings.server.pin_workers:
        yield [[] for _ in range(count)]
        return
    allowed, quota = os.sched_getaffinity(0), quota_cpus()
    if quota is not None and quota < len(allowed):
        raise ConfigError(
            f"server.workers on CPUs of their own under a quota of {quota:g} CPUs of {len(allowed)}, which others use "
            f"too: give this process CPUs of its own (cpuset, taskset), or set server.pin_workers=false"
        )
    parts = divided(allowed, count)
    with claimed(sorted(allowed)):
        log.info("%d workers on CPUs %s", count, " | ".join(listed(part) for part in parts))
        yield parts


async def _run(settings: Settings, cpus: list[list[int]], ports: dict[str, int], orders: Orders) -> int:
    with ThreadPoolExecutor(len(cpus), "worker") as threads:
        return await _Workers(settings, cpus, ports, orders, threads).run()


class _Workers:
    """Made inside the event loop. Each worker has a thread, in which it is started again and again."""

    def __init__(
        self,
        settings: Settings,
        cpus: list[list[int]],
        ports: dict[str, int],
        orders: Orders,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._hub = Hub(cpus, settings.metrics.window_s)
        self._ports = ports
        self._orders = orders
        self._threads = threads
        self._share = max(1, available_cpus() // len(cpus))
        self._attending: set[asyncio.Task[None]] = set()
        command = [sys.executable, *sys.orig_argv[1:], "--exit-with-parent"]
        command += ["--port", str(ports["grpc_port"]), "--http-port", str(ports["http_port"])]
        self._kept = [
            KeptProcess(
                command,
                name=f"worker {index}",
                final=(),
                final_at_first=_FINAL_AT_FIRST,
                equipment=functools.partial(self._equipment, index),
            )
            for index in range(len(cpus))
        ]
        self._lives: list[asyncio.Future[int | None]] = []

    async def run(self) -> int:
        for number in filter(None, (signal.SIGTERM, signal.SIGINT, hangup_signal())):
            self._loop.add_signal_handler(number, self._stop, number)
        watching = [asyncio.create_task(each) for each in self._watches()]
        self._hub.start()
        try:
            if await self._start_all():
                announced = asyncio.create_task(self._announce())
                either: set[asyncio.Future[Any]] = {*self._lives, announced}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if announced.done():
                    announced.result()
                    await asyncio.wait(self._lives, return_when=asyncio.FIRST_COMPLETED)
                announced.cancel()
        finally:
            if not self._hub.is_stopping:  # a worker that does not start ends the others, and so does a fault here
                self._stop(signal.SIGTERM)
            codes = await asyncio.gather(*self._lives)
            for task in watching:
                task.cancel()
            if self._orders.ready_file is not None:
                self._orders.ready_file.unlink(missing_ok=True)
            await self._hub.stop()
        log.info("stopped")
        # Of a worker that was just being started again the stop is no fault, where others stopped after their work.
        stopped = {EXIT_OK, EXIT_TERMINATED} if EXIT_OK in codes else {EXIT_OK}
        return next((code for code in codes if code is not None and code not in stopped), EXIT_OK)

    async def _start_all(self) -> bool:
        """The first one alone, for it fills the caches that the others read. Whether it serves, and all are started."""
        first = self._start(0)
        served = asyncio.ensure_future(self._hub.members[0].has_served.wait())
        waited: set[asyncio.Future[Any]] = {first, served}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        served.cancel()
        if first.done() or self._hub.is_stopping:
            return False
        for index in range(1, len(self._kept)):
            self._start(index)
        return True

    def _start(self, index: int) -> "asyncio.Future[int | None]":
        life = self._loop.run_in_executor(self._threads, self._kept[index].run)
        self._lives.append(life)
        return life

    def _stop(self, number: signal.Signals) -> None:
        self._hub.is_stopping = True
        if self._orders.ready_file is not None:
            self._orders.ready_file.unlink(missing_ok=True)
        for kept, _ in zip(self._kept, self._lives, strict=False):
            kept.stop(number)

    async def _announce(self) -> None:
        for member in self._hub.members:
            await member.has_served.wait()
        if self._orders.ready_file is not None and not self._hub.is_stopping:
            ports = json.dumps(self._ports | {"pid": os.getpid()})
            try:
                replace_file(self._orders.ready_file, f"{ports}\n")
            except OSError as error:
                raise ConfigError(
                    f"--ready-file {self._orders.ready_file} cannot be written: {error.strerror}"
                ) from error
        log.info("ready: %d workers", len(self._kept))

    @contextlib.contextmanager
    def _equipment(self, index: int) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
        """In the thread of the worker: a new process has the CPUs of the thread that starts it."""
        member = self._hub.members[index]
        if member.cpus:
            os.sched_setaffinity(0, member.cpus)
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        self._loop.call_soon_threadsafe(self._attend, index, mine)
        with theirs:
            seat = Seat(index=index, link=theirs.fileno(), cpus=len(member.cpus) or self._share)
            yield (WORKER_FLAG, seat.written()), (theirs.fileno(),)

    def _attend(self, index: int, end: socket.socket) -> None:
        task = self._loop.create_task(self._hub.attend(index, end))
        self._attending.add(task)
        task.add_done_callback(self._attending.discard)

    def _watches(self) -> Iterator[Coroutine[None, None, None]]:
        if self._orders.exit_with_parent:
            yield self._stop_with(os.getppid())
        if self._orders.heartbeat is not None:
            yield _beat(self._orders.heartbeat)

    async def _stop_with(self, parent: int) -> None:
        while os.getppid() == parent:  # noqa: ASYNC110 - no event says that a parent has died
            await asyncio.sleep(_PARENT_EVERY_S)
        log.warning("the parent process is gone: shutting down")
        self._stop(signal.SIGTERM)


async def _beat(heartbeat: int) -> None:
    while True:
        beat(heartbeat)
        await asyncio.sleep(HEARTBEAT_EVERY_S)
