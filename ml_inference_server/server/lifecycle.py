"""A server's start and stop, in one list."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from ml_inference_server.backends.startup.resolve import title
from ml_inference_server.door.certificates import TlsFiles, open_tls
from ml_inference_server.door.door import Door, open_door
from ml_inference_server.door.exposure import warn_if_open
from ml_inference_server.metrics.http_server import Sidecar
from ml_inference_server.metrics.live import Live
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.metrics.tracing import Tracer
from ml_inference_server.metrics.view import View
from ml_inference_server.server.caller_limits import CallerLimits
from ml_inference_server.server.calls import Calls
from ml_inference_server.server.entrance import Foyer, OpenEntrance
from ml_inference_server.server.health import Health, watch_health
from ml_inference_server.server.http.api import HttpApi
from ml_inference_server.server.open_inference import OpenInference
from ml_inference_server.server.ready_model import Load, ReadyModel, assemble, load_model, same_limits
from ml_inference_server.server.rpc.grpc_server import GrpcServer, start_grpc
from ml_inference_server.server.rpc.method_handlers import MethodHandlers
from ml_inference_server.server.rpc.native import NativeServicer
from ml_inference_server.server.rpc.open_inference import OpenInferenceServicer
from ml_inference_server.server.rpc.tei import TeiServicer
from ml_inference_server.server.state import ServerState
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.cores import worker_count
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.worker_processes.member import WorkerView
from ml_inference_server.worker_processes.seat import Seat

log = logging.getLogger(__name__)

# Before gRPC, and HTTP, is stopped: a quiet period without a new call, and the longest wait for one.
_QUIET_S, _QUIET_LIMIT_S = 0.1, 1.0
# Time for replies that are already computed to reach the socket, and then to leave it.
_REPLY_GRACE_S, _SOCKET_S = 1.0, 0.1
# For the requests that do not hang, where others do in a thread and the process has to end.
_LOST_DRAIN_S = 5.0
# Servers whose connections the end of the process closes. Held, as grpc.aio stops a server that nobody holds.
_left_to_the_end: list[GrpcServer] = []


@dataclass(kw_only=True)
class Server:
    """A server that serves.

    health: the task that keeps its health true; it ends by itself only if it fails. cut_off: after the stop, how many
    requests were answered with UNAVAILABLE because the drain took too long.
    """

    state: ServerState
    metrics: Metrics
    model: ReadyModel
    health: asyncio.Task[None]
    grpc_port: int
    http_port: int
    cut_off: int = 0


@contextlib.asynccontextmanager
async def serving(
    settings: Settings,
    *,
    load: Load = load_model,
    quiet_s: float = _QUIET_S,
    ends_process: bool = False,
    seat: Seat | None = None,
    entrance: OpenEntrance | None = None,
) -> AsyncIterator[Server]:
    """A running server. StartError if it cannot start; a cancellation while it starts stops what was started.

    load: how the model comes to be. quiet_s: without a new call, before gRPC is stopped. ends_process: the caller ends
    the process right after, and that closes the gRPC port and its connections; until then calls are refused. seat: of
    one worker of several, whose ports are open once it can answer: until then, the others get its calls.
    entrance: where gRPC calls come in; None: through a port of its own.
    """
    if seat is None and worker_count(settings.server.workers) > 1:
        raise ConfigError("server.workers is for the program (mlis serve): in a process of your own set it to 1")
    state = ServerState(settings)
    metrics = Metrics(window_s=settings.metrics.window_s, enabled=settings.metrics.enabled)
    door, tls = open_door(settings.server), open_tls(settings.server.tls)
    warn_if_open(settings)
    calls = Calls(
        metrics,
        default_timeout_s=settings.server.default_timeout_ms / 1000,
        prefix=state.instance_id[:8],
        door=door,
    )
    foyer = Foyer(state, calls, door, tls, shares_port=seat is not None)
    # Started from top to bottom, stopped from bottom to top.
    async with contextlib.AsyncExitStack() as started:
        enter = started.enter_async_context
        view = await enter(_view(state, metrics, seat))
        await enter(_traces(settings, metrics))
        loading = _model(state, metrics, load, _limits_of(settings, metrics, door))
        model = await enter(loading) if seat is not None else None
        opened = entrance(foyer, view) if entrance else _grpc(foyer, view, None if ends_process else quiet_s)
        front = await enter(opened)
        http_port = await enter(_sidecar(foyer, view, _QUIET_S if ends_process else quiet_s))
        await enter(_watched_files(door, tls))
        if model is None:
            model = await enter(loading)
        health = await enter(_health(state, front))
        if isinstance(view, WorkerView):
            view.serves()
        server = Server(
            state=state,
            metrics=metrics,
            model=model,
            health=health,
            grpc_port=front.port,
            http_port=http_port,
        )
        try:
            yield server
        finally:
            server.cut_off = await _drain(state, model, front)
    log.info("stopped")


def _limits_of(settings: Settings, metrics: Metrics, door: Door | None) -> Callable[[str], CallerLimits]:
    """Those of a caller's key as they are now, and `server.limits` for what it does not say."""
    default_of = same_limits(settings.server.limits)
    if door is None:
        return default_of
    metrics.name_callers(door.keys.by_name)

    def of(caller: str) -> CallerLimits:
        default, key = default_of(caller), door.keys.by_name.get(caller)
        if key is None:  # the server itself, or taken back a moment ago
            return default
        metrics.name_callers([caller])  # it may be new in the file
        return default.changed(key.limits.requests_per_s, key.limits.tokens_per_s, key.limits.queue_share)

    return of


@contextlib.asynccontextmanager
async def _watched_files(door: Door | None, tls: TlsFiles | None) -> AsyncIterator[None]:
    """Keys and certificates are read anew when they change."""
    watchers = [asyncio.create_task(each.watch.run()) for each in (door, tls) if each is not None]
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)


@contextlib.asynccontextmanager
async def _traces(settings: Settings, metrics: Metrics) -> AsyncIterator[None]:
    if not settings.metrics.otlp_endpoint:
        yield
        return
    metrics.tracer = tracer = Tracer(settings.metrics.otlp_endpoint)
    log.info("traces go to %s", settings.metrics.otlp_endpoint)
    try:
        yield
    finally:
        await asyncio.to_thread(tracer.close)


@contextlib.asynccontextmanager
async def _view(state: ServerState, metrics: Metrics, seat: Seat | None) -> AsyncIterator[View]:
    """Of this process by itself, or of all workers."""
    if seat is None:
        yield Live(metrics, state.as_dict, state.readiness, observe_lag=metrics.observe_loop_lag)
        return
    view = WorkerView(metrics, state)
    async with view.linked(seat):
        yield view


@contextlib.asynccontextmanager
async def _grpc(foyer: Foyer, view: View, quiet_s: float | None) -> AsyncIterator[GrpcServer]:
    """The port is open, and calls are answered, before there is a model: with MODEL_LOADING.

    quiet_s: None leaves the port to the end of the process. grpc.aio's `stop` answers calls that arrive during it with
    CANCELLED, which no client repeats; a connection that ends is UNAVAILABLE, which is safe to repeat.
    """
    state, calls, tls = foyer.state, foyer.calls, foyer.tls
    settings = state.settings.server
    open_inference = OpenInference(state, view)
    servicers = (
        NativeServicer(state, view, MethodHandlers(calls)),
        OpenInferenceServicer(open_inference, calls, settings.max_message_bytes),
        TeiServicer(state, calls),
    )
    grpc_server = await start_grpc(settings, servicers, foyer.door, tls, shares_port=foyer.shares_port)
    log.info("gRPC on %s:%d%s", settings.host, grpc_server.port, " with TLS" if tls else "")
    if tls is not None:
        log.info("certificate: %s", tls.describe())
    try:
        yield grpc_server
    finally:
        state.draining.set()
        if quiet_s is None:
            _left_to_the_end.append(grpc_server)
            await calls.until_sent(_REPLY_GRACE_S)
            await asyncio.sleep(_SOCKET_S)
        else:
            await _quiet(calls, quiet_s)
            await grpc_server.server.stop(_REPLY_GRACE_S)


@contextlib.asynccontextmanager
async def _sidecar(foyer: Foyer, view: View, quiet_s: float) -> AsyncIterator[int]:
    state = foyer.state
    sidecar = Sidecar(
        state.settings.metrics,
        view,
        server_info=state.as_dict,
        liveness=lambda: (True, "the event loop turns"),
        api=HttpApi(state, foyer.calls, view),
        door=foyer.door,
        tls=foyer.tls,
        shares_port=foyer.shares_port,
        is_draining=state.draining.is_set,
    )
    port = await sidecar.start()
    scheme = "https" if foyer.tls else "http"
    log.info("dashboard and metrics on %s://%s:%d", scheme, state.settings.metrics.host, port)
    try:
        yield port
    finally:
        await sidecar.stop(quiet_s)


@contextlib.asynccontextmanager
async def _model(
    state: ServerState, metrics: Metrics, load: Load, limits_of: Callable[[str], CallerLimits]
) -> AsyncIterator[ReadyModel]:
    """Resolved, loaded, warm, and behind the batcher and the service."""

    def phase(text: str) -> None:
        state.phase = text

    described, worker = await load(state.settings, phase)
    try:
        model = state.model = assemble(state.settings, described, worker, metrics, limits_of=limits_of)
    except BaseException:
        worker.close()
        raise
    try:
        info = described.info
        log.info("running %s", title(described.resolution, info, state.settings.cache.max_mb))
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
        yield model
    finally:
        model.close()


@contextlib.asynccontextmanager
async def _health(state: ServerState, front: Health) -> AsyncIterator[asyncio.Task[None]]:
    front.set_serving(True)
    watcher = asyncio.create_task(watch_health(state, front))
    try:
        yield watcher
    finally:
        watcher.cancel()


async def _drain(state: ServerState, model: ReadyModel, front: Health) -> int:
    """Health first, then refuse new calls, then finish what was let in; how many requests could not be finished."""
    settings = state.settings.server
    state.draining.set()
    front.set_serving(False)
    if model.worker.lost:
        model.admission.refuse_new()
        return await model.admission.drained(0.0 if model.worker.stuck else _LOST_DRAIN_S)
    if settings.drain_delay_ms:
        log.info("draining: accepting for another %d ms", settings.drain_delay_ms)
        await asyncio.sleep(settings.drain_delay_ms / 1000)
    model.admission.refuse_new()
    log.info("draining: %d requests in flight", model.admission.requests)
    left = await model.admission.drained(settings.drain_timeout_ms / 1000)
    if left:
        log.error("drain timeout: %d requests are answered with UNAVAILABLE", left)
    return left


async def _quiet(calls: Calls, quiet_s: float) -> None:
    """Wait for a moment without new calls: grpc.aio answers those that arrive during `stop` with CANCELLED."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + _QUIET_LIMIT_S
    while (now := loop.time()) < min(give_up_at, calls.last_call_at + quiet_s):  # noqa: ASYNC110 - it is a lull
        await asyncio.sleep(min(give_up_at, calls.last_call_at + quiet_s) - now)
