"""Before HTTP is stopped: a moment without a request, which does not have to come."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ml_inference_server.metrics.http_connections import Connections
from tests.conftest import virtual_time


async def requests(connections: Connections, count: int, every_s: float) -> None:
    request: Any = SimpleNamespace(protocol=object())
    for _ in range(count):
        await asyncio.sleep(every_s)
        with connections.working(request):
            pass


@virtual_time
async def test_a_lull_is_waited_for_but_not_for_ever() -> None:
    loop = asyncio.get_running_loop()
    connections = Connections()
    began_at = loop.time()
    await connections.quiet(0.1, 1.0)
    assert loop.time() == began_at  # there was no request ever

    for count, ends_after_s in ((5, 5 * 0.08 + 0.1), (1000, 1.0)):
        began_at = loop.time()
        coming = asyncio.create_task(requests(connections, count, 0.08))
        await asyncio.sleep(0.1)
        await connections.quiet(0.1, 0.9)
        assert loop.time() - began_at == pytest.approx(ends_after_s)
        coming.cancel()
        await asyncio.sleep(1)
