"""Keeps the health that others see true: looks at the state twice a second, and probes a model that failed."""

import asyncio
import logging
import os
from collections.abc import Callable

from ml_inference_server.server.rpc.grpc_server import GrpcServer
from ml_inference_server.server.state import MAX_FAILURES_IN_A_ROW, ServerState
from ml_inference_server.utils.errors import ServiceError

log = logging.getLogger(__name__)

_INTERVAL_S = 0.5
_PROBE_EVERY = 10  # intervals


async def watch_health(state: ServerState, grpc_server: GrpcServer) -> None:
    """Runs until cancelled."""
    loop = asyncio.get_running_loop()
    turn = 0
    while True:
        await asyncio.sleep(_INTERVAL_S)
        turn += 1
        ready, why = state.readiness()
        if ready != grpc_server.serving:
            log.log(
                logging.INFO if ready else logging.ERROR, "health: %s (%s)", "SERVING" if ready else "NOT_SERVING", why
            )
            await grpc_server.set_serving(ready)
        failing = state.batcher is not None and state.batcher.failures_in_a_row >= MAX_FAILURES_IN_A_ROW
        if failing and turn % _PROBE_EVERY == 0:
            await _probe(state, loop.time() + _INTERVAL_S * _PROBE_EVERY)


async def _probe(state: ServerState, deadline: float) -> None:
    """A text through the real queue and the real model: its success resets the count of failures."""
    try:
        await state.require_service().embed(["health probe"], deadline)
    except ServiceError as error:
        log.info("health probe failed: %s", error)


async def watch_parent(stop: Callable[[], None]) -> None:
    """Calls `stop` once the process that started this one is gone."""
    parent = os.getppid()
    while os.getppid() == parent:  # noqa: ASYNC110 - no event tells that a parent has died
        await asyncio.sleep(_INTERVAL_S)
    log.warning("the parent process is gone: shutting down")
    stop()
