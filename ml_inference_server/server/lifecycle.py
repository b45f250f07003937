"""Start order, signals, drain, stop order.

Start: ports, then model, then warm-up, then SERVING. Stop: NOT_SERVING, drain, workers, gRPC, sidecar, traces.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ml_inference_server.backends.startup.resolve import title
from ml_inference_server.backends.startup.start import Described, start_backend
from ml_inference_server.metrics.http_server import Sidecar
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.metrics.tracing import Tracer
from ml_inference_server.server.health import watch_health, watch_parent
from ml_inference_server.server.process_worker import ProcessWorker
from ml_inference_server.server.rpc.grpc_server import GrpcServer, start_grpc
from ml_inference_server.server.rpc.method_handlers import Shell
from ml_inference_server.server.rpc.native import NativeServicer
from ml_inference_server.server.scheduler import DynamicBatcher, batch_limits
from ml_inference_server.server.service import InferenceService
from ml_inference_server.server.state import ServerState
from ml_inference_server.server.workers import ThreadWorker, Worker
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import (
    EXIT_FAILED_RUN,
    EXIT_HUNG_UP,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    ConfigError,
)
from ml_inference_server.utils.files import replace_file
from ml_inference_server.utils.process import end_process, hangup_signal, leave_dead_streams

log = logging.getLogger(__name__)
T = TypeVar("T")

# Before the port closes: this long without a new call, or at most so long.
_QUIET_S, _QUIET_LIMIT_S = 0.1, 1.0
# Time for replies that are already computed to leave the socket.
_REPLY_GRACE_S = 1.0


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP: the first asks for a drain, a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.exit_code = EXIT_OK
        self.early_exit_code = EXIT_TERMINATED
        self._in_flight: Callable[[], int] = lambda: 0
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        if (hangup := hangup_signal()) is not None:
            loop.add_signal_handler(hangup, self._hang_up)

    def report(self, in_flight: Callable[[], int]) -> None:
        """From now on the first Ctrl-C says how many requests it waits for."""
        self._in_flight = in_flight

    def stop(self) -> None:
        self.asked.set()

    def _hang_up(self) -> None:
        leave_dead_streams()
        self.early_exit_code = EXIT_HUNG_UP
        self.stop()

    def _interrupt(self) -> None:
        if self.asked.is_set():
            end_process(EXIT_INTERRUPTED)
        self.exit_code = EXIT_INTERRUPTED
        print(
            f"\nfinishing {self._in_flight()} requests; press Ctrl-C again to stop at once", file=sys.stderr, flush=True
        )
        self.asked.set()


async def serve(settings: Settings, *, ready_file: Path | None = None, exit_with_parent: bool = False) -> int:
    """Run the server until it is told to stop; the process's exit code. Raises StartError if it cannot start."""
    signals = StopSignals()
    state = ServerState(settings)
    metrics = Metrics(window_s=settings.metrics.window_s, enabled=settings.metrics.enabled)
    if settings.metrics.otlp_endpoint:
        metrics.tracer = Tracer(settings.metrics.otlp_endpoint)
    shell = Shell(metrics, default_timeout_s=settings.server.default_timeout_ms / 1000, prefix=state.instance_id[:8])
    sidecar = Sidecar(
        settings.metrics,
        metrics,
        server_info=state.as_dict,
        readiness=state.readiness,
        liveness=lambda: (True, "the event loop turns"),
    )
    async with contextlib.AsyncExitStack() as stack:
        if metrics.tracer is not None:
            log.info("traces go to %s", settings.metrics.otlp_endpoint)
            stack.push_async_callback(asyncio.to_thread, metrics.tracer.close)
        grpc_server = await start_grpc(settings.server, NativeServicer(state, metrics, shell))
        stack.push_async_callback(grpc_server.server.stop, None)
        http_port = await sidecar.start()
        stack.push_async_callback(sidecar.stop)
        log.info("gRPC on %s:%d, dashboard and metrics on http://%s:%d",
                 settings.server.host, grpc_server.port, settings.metrics.host, http_port)  # fmt: skip
        if exit_with_parent:
            stack.callback(asyncio.create_task(watch_parent(signals.stop)).cancel)
        if not await _load(state, metrics, signals):
            return signals.exit_code or signals.early_exit_code
        # What is here now stays: full collections need not visit it again, which took 30 ms of silence each.
        gc.collect()
        gc.freeze()
        batcher = state.batcher
        assert batcher is not None  # noqa: S101 - _load has set it
        signals.report(lambda: batcher.accepted_requests)
        await grpc_server.set_serving(True)
        health = asyncio.create_task(watch_health(state, grpc_server))
        health.add_done_callback(lambda task: _health_ended(task, signals))
        stack.callback(health.cancel)
        if ready_file is not None:
            ports = {"grpc_port": grpc_server.port, "http_port": http_port, "pid": os.getpid()}
            try:
                replace_file(ready_file, json.dumps(ports) + "\n")
            except OSError as error:
                raise ConfigError(f"--ready-file {ready_file} cannot be written: {error.strerror}") from error
            stack.callback(ready_file.unlink, missing_ok=True)
        log.info("ready")
        await signals.asked.wait()
        return await _drain(state, batcher, grpc_server, shell) or signals.exit_code


async def _load(state: ServerState, metrics: Metrics, signals: StopSignals) -> bool:
    """Resolve, load, warm up; False if the process was told to stop before that was done."""
    loading = asyncio.create_task(load(state))
    stopped = asyncio.create_task(signals.asked.wait())
    waiting: set[asyncio.Future[Any]] = {loading, stopped}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not loading.done():
        log.warning("told to stop while the model was loading")
        loading.cancel()
        await asyncio.wait([loading])
        return False
    described, worker = loading.result()
    attach(state, described, worker, metrics)
    info = described.info
    log.info("running %s", title(described.resolution, info))
    if info.parity_mean is not None and info.parity_min is not None:
        log.info("parity to FP32: mean %.5f, lowest %.5f", info.parity_mean, info.parity_min)
    log.info(
        "weights %s (%s), source: %s; %d streams of %d threads%s",
        info.weights_file or "none",
        info.weights_sha256[:12] or "-",
        info.source,
        info.concurrency,
        info.threads,
        ", each in a process of its own" if state.settings.model.process_per_stream else "",
    )
    return True


async def load(state: ServerState) -> tuple[Described, Worker]:
    """A loaded, warm model and the worker that runs it: processes of its own or threads of this one."""
    model = state.settings.model
    faults = state.settings.server.enable_test_faults  # Settings allow this with the fake backend only

    def phase(text: str) -> None:
        state.phase = text

    if model.process_per_stream:
        worker = ProcessWorker(hang_timeout_s=state.settings.server.hang_timeout_ms / 1000, faults=faults)
        return await worker.start(model, phase), worker
    started = await _in_daemon_thread(lambda: start_backend(model, phase))
    if faults:
        started.backend.enable_faults()  # type: ignore[attr-defined]
    return started, ThreadWorker(started.backend)


def attach(state: ServerState, described: Described, worker: Worker, metrics: Metrics) -> None:
    """Put a loaded, warm model behind the batcher and the service. ConfigError where settings and model disagree."""
    settings, info = state.settings, described.info
    if settings.batching.max_batch_tokens and settings.batching.max_batch_tokens < info.max_tokens:
        raise ConfigError(
            f"batching.max_batch_tokens is {settings.batching.max_batch_tokens}, but one text may have "
            f"{info.max_tokens} tokens: raise it, or lower model.max_tokens"
        )
    limits = batch_limits(settings.batching, info)
    state.resolution, state.info, state.auto_choice = described.resolution, info, described.auto_choice
    state.batcher = DynamicBatcher(worker, limits, settings.batching, metrics)
    state.service = InferenceService(described.tokenizer, info, state.batcher, settings.server, metrics)


def _in_daemon_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Like run_in_executor, but the interpreter does not wait for it at exit: loading can take minutes."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            result, error = work(), None
        except BaseException as caught:
            result, error = None, caught
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return future


async def _drain(state: ServerState, batcher: DynamicBatcher, grpc_server: GrpcServer, shell: Shell) -> int:
    """Health first, then refuse new calls, then finish what was accepted; EXIT_FAILED_RUN if some was cut off."""
    state.draining.set()
    await grpc_server.set_serving(False)
    if state.settings.server.drain_delay_ms:
        log.info("draining: accepting for another %d ms", state.settings.server.drain_delay_ms)
        await asyncio.sleep(state.settings.server.drain_delay_ms / 1000)
    batcher.refuse_new()
    log.info("draining: %d requests in flight", batcher.accepted_requests)
    left = await batcher.drained(state.settings.server.drain_timeout_ms / 1000)
    if left:
        log.error("drain timeout: %d requests are answered with UNAVAILABLE", left)
    batcher.close()
    await _quiet(shell)
    await grpc_server.server.stop(_REPLY_GRACE_S)
    if state.service is not None:
        state.service.close()
    log.info("stopped")
    return EXIT_FAILED_RUN if left else EXIT_OK


async def _quiet(shell: Shell) -> None:
    """Wait for a moment without new calls: grpc.aio answers those that arrive during `stop` with CANCELLED."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + _QUIET_LIMIT_S
    while (now := loop.time()) < min(give_up_at, shell.last_call_at + _QUIET_S):  # noqa: ASYNC110 - it is a lull
        await asyncio.sleep(min(give_up_at, shell.last_call_at + _QUIET_S) - now)


def _health_ended(task: asyncio.Task[None], signals: StopSignals) -> None:
    """The watcher never ends by itself; if a bug ends it, health could lie, so the server stops."""
    if not task.cancelled():
        log.critical("the health watcher failed: shutting down", exc_info=task.exception())
        signals.exit_code = EXIT_FAILED_RUN
        signals.stop()
