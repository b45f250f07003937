"""However a right request is changed: it is answered, or refused in its dialect's own form, and the server goes on."""

import asyncio
import logging
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.budget import BATCH, FACTOR, HTTP_REQUESTS, fuzzing
from tests.fuzz.http_mutations import http_requests, words_of
from tests.fuzz.http_wire import PostRoute, quiet_wire
from tests.fuzz.on_loop import entered


@pytest.mark.parametrize(
    ("task", "requests"), [("embedding", HTTP_REQUESTS * 3 // 4), ("cross_encoder", HTTP_REQUESTS // 4)]
)
def test_changed_bodies(
    caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None], task: str, requests: int
) -> None:
    context = quiet_wire(caplog, model={"task": task}, server={"accept_any_model": True})
    with asyncio.Runner() as runner, entered(runner, context) as wire:
        statuses: set[int] = set()

        @fuzzing(requests)
        @given(st.lists(http_requests(wire.routes, words_of(wire.described)), min_size=BATCH, max_size=BATCH))
        def property_(batch: list[tuple[PostRoute, bytes]]) -> None:
            replies = runner.run(wire.ask_all([request for _, request in batch]))
            for (route, _), reply in zip(batch, replies, strict=True):
                route.check(reply)
                statuses.add(reply.status)
            assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
            assert wire.server.model.admission.requests == 0
            wire.server.backend.log.clear()

        property_()
    record_property("requests", wire.sent)
    assert wire.sent >= requests * FACTOR
    assert {200, 400, 422, 424} <= statuses <= {200, 400, 404, 412, 422, 424, 429, 503, 504}
