"""Keeps the health that others see true: looks at the state twice a second, and probes a model that failed."""

import asyncio
import logging
import os
from typing import Protocol

from ml_inference_server.server.call import Call
from ml_inference_server.server.ready_model import ReadyModel
from ml_inference_server.server.state import MAX_FAILURES_IN_A_ROW, ServerState
from ml_inference_server.utils.errors import BackendFailure, ServiceError

log = logging.getLogger(__name__)

INTERVAL_S = 0.5
_PROBE_EVERY = 10  # intervals
# In a row. A driver that has failed, say, stays so for the whole life of a process.
_MOST_FAILED_PROBES = 3


class Health(Protocol):
    """What is said to those who ask for the server's health."""

    @property
    def serving(self) -> bool: ...

    def set_serving(self, serving: bool) -> None: ...


class EngineLost(Exception):
    """Only a new process of the server can help."""


async def watch_health(state: ServerState, health: Health) -> None:
    """Runs until cancelled, or until the engine is lost and everybody has heard that the server is not ready."""
    turn = failed_probes = 0
    while True:
        await asyncio.sleep(INTERVAL_S)
        turn += 1
        if state.model is not None:
            state.model.batcher.look_after()
        ready, why = state.readiness()
        if ready != health.serving:
            log.log(
                logging.INFO if ready else logging.ERROR, "health: %s (%s)", "SERVING" if ready else "NOT_SERVING", why
            )
            health.set_serving(ready)
        if state.model is not None and state.model.worker.lost and not health.serving:
            raise EngineLost(state.model.worker.lost)
        if state.model is None or state.model.batcher.failures_in_a_row < MAX_FAILURES_IN_A_ROW:
            failed_probes = 0
        elif turn % _PROBE_EVERY == 0:
            failed_probes += await _model_fails(state.model)
            if failed_probes == _MOST_FAILED_PROBES:
                failed_probes = 0
                log.error("the model failed on %d probes in a row: the engine is started anew", _MOST_FAILED_PROBES)
                state.model.worker.renew()


async def _model_fails(model: ReadyModel) -> bool:
    """On a text through the real queue and the real model. Its success resets the count of failures."""
    now = asyncio.get_running_loop().time()
    call = Call("health-probe", received_at=now, deadline=now + INTERVAL_S * _PROBE_EVERY, fresh=True)
    try:
        await model.service.embed(["health probe"], call)
    except ServiceError as error:
        log.info("health probe failed: %s", error)
        return isinstance(error, BackendFailure) or error.reason == ServiceError.reason
    return False


async def parent_ended() -> None:
    """Returns once the process that started this one is gone."""
    parent = os.getppid()
    while os.getppid() == parent:  # noqa: ASYNC110 - no event says that a parent has died
        await asyncio.sleep(INTERVAL_S)
    log.warning("the parent process is gone: shutting down")
