"""What is said of the server's health follows what the server knows of itself, within one interval."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ml_inference_server.server.health import INTERVAL_S, EngineLost, watch_health
from ml_inference_server.server.ready_model import ReadyModel
from ml_inference_server.server.state import MAX_FAILURES_IN_A_ROW, ServerState
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import BackendFailure
from tests.conftest import virtual_time
from tests.unit.scheduler_kit import POISON, Rig


class Told:
    """What was said, in order."""

    def __init__(self) -> None:
        self.serving = True
        self.said: list[bool] = []

    def set_serving(self, serving: bool) -> None:
        self.serving = serving
        self.said.append(serving)


def ready_state() -> tuple[ServerState, Rig]:
    """The server's state over a batcher whose worker the test controls."""
    rig = Rig()
    model: Any = SimpleNamespace(batcher=rig.batcher, worker=rig.worker)
    return ServerState(Settings(), model=cast(ReadyModel, model)), rig


@asynccontextmanager
async def watched(state: ServerState) -> AsyncIterator[tuple[Told, asyncio.Task[None]]]:
    told = Told()
    task = asyncio.create_task(watch_health(state, told))
    try:
        yield told, task
    finally:
        task.cancel()


async def intervals(count: int = 1) -> None:
    await asyncio.sleep((count + 0.5) * INTERVAL_S)


async def fail(rig: Rig, ids: Sequence[int]) -> None:
    for text in ids:
        with pytest.raises(BackendFailure):
            await rig.call(text)


@virtual_time
async def test_health_follows_the_trouble_of_the_engine_and_its_end() -> None:
    state, rig = ready_state()
    async with watched(state) as (told, _):
        await intervals(3)
        assert told.said == []
        rig.worker.trouble = "a batch hangs"
        await intervals()
        assert told.said == [False]
        assert state.readiness() == (False, "a batch hangs")
        rig.worker.trouble = ""
        await intervals()
        assert told.said == [False, True]


@virtual_time
async def test_health_turns_while_texts_fail_one_after_the_other() -> None:
    state, rig = ready_state()
    async with watched(state) as (told, _):
        await fail(rig, [POISON] * (MAX_FAILURES_IN_A_ROW - 1))
        await intervals()
        assert told.said == []
        await fail(rig, [POISON])
        await intervals()
        assert told.said == [False]
        assert await rig.call(1) == [1.0]
        await intervals()
        assert told.said == [False, True]


@virtual_time
async def test_health_turns_when_the_server_drains_or_has_no_model() -> None:
    for change in ("draining", "no model"):
        state, _ = ready_state()
        async with watched(state) as (told, _):
            if change == "draining":
                state.draining.set()
            else:
                state.model = None
            await intervals()
            assert told.said == [False]


@virtual_time
async def test_an_engine_that_is_lost_ends_the_watch_after_health_said_so() -> None:
    state, rig = ready_state()
    async with watched(state) as (told, task):
        rig.worker.trouble = rig.worker.lost = "it hangs for good"
        await intervals()
        assert told.said == [False]
        with pytest.raises(EngineLost, match="it hangs for good"):
            await task
