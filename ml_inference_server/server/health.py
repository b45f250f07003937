"""Keeps the health that others see true: looks at the state twice a second, and probes a model that failed."""

import asyncio
import logging
import os
from typing import Protocol

from ml_inference_server.server.call import Call
from ml_inference_server.server.state import MAX_FAILURES_IN_A_ROW, ServerState
from ml_inference_server.utils.errors import ServiceError

log = logging.getLogger(__name__)

_INTERVAL_S = 0.5
_PROBE_EVERY = 10  # intervals


class Health(Protocol):
    """What is said to those who ask for the server's health."""

    @property
    def serving(self) -> bool: ...

    async def set_serving(self, serving: bool) -> None: ...


class EngineLost(Exception):
    """Only a new process of the server can help."""


async def watch_health(state: ServerState, health: Health) -> None:
    """Runs until cancelled, or until the engine is lost and everybody has heard that the server is not ready."""
    turn = 0
    while True:
        await asyncio.sleep(_INTERVAL_S)
        turn += 1
        ready, why = state.readiness()
        if ready != health.serving:
            log.log(
                logging.INFO if ready else logging.ERROR, "health: %s (%s)", "SERVING" if ready else "NOT_SERVING", why
            )
            await health.set_serving(ready)
        if state.model is not None and state.model.worker.lost and not health.serving:
            raise EngineLost(state.model.worker.lost)
        failing = state.model is not None and state.model.batcher.failures_in_a_row >= MAX_FAILURES_IN_A_ROW
        if failing and turn % _PROBE_EVERY == 0:
            await _probe(state)


async def _probe(state: ServerState) -> None:
    """A text through the real queue and the real model: its success resets the count of failures."""
    now = asyncio.get_running_loop().time()
    call = Call("health-probe", received_at=now, deadline=now + _INTERVAL_S * _PROBE_EVERY, fresh=True)
    try:
        await state.require_model().service.embed(["health probe"], call)
    except ServiceError as error:
        log.info("health probe failed: %s", error)


async def parent_ended() -> None:
    """Returns once the process that started this one is gone."""
    parent = os.getppid()
    while os.getppid() == parent:  # noqa: ASYNC110 - no event says that a parent has died
        await asyncio.sleep(_INTERVAL_S)
    log.warning("the parent process is gone: shutting down")
