"""A worker's side: it reports to its supervisor, and asks it about the whole server."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from typing import Any, Protocol, cast

from ml_inference_server.metrics.broadcast import Broadcast
from ml_inference_server.metrics.live import probe_lag
from ml_inference_server.metrics.model_figures import ModelFigures
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.utils.errors import Unavailable
from ml_inference_server.worker_processes.link import Link
from ml_inference_server.worker_processes.seat import Seat
from ml_inference_server.worker_processes.words import Message, Question, Serving, Told

_TIMEOUT_S = 5.0


class OwnState(Protocol):
    """What a worker says of itself."""

    @property
    def instance_id(self) -> str: ...

    def readiness(self) -> tuple[bool, str]: ...

    def as_dict(self) -> dict[str, Any]: ...


class WorkerView:
    """A `View` of all workers, as the supervisor sees them."""

    def __init__(self, metrics: Metrics, state: OwnState) -> None:
        self._metrics = metrics
        self._state = state
        self._link = Link(self._answer, self._take)
        self._broadcast: Broadcast | None = None
        self._message = ""
        self._lag: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def linked(self, seat: Seat) -> AsyncIterator[None]:
        """Answers the supervisor inside; tells it the last figures at the end."""
        running = asyncio.create_task(self._link.run(_own_end(seat)))
        await self._link.ready()
        try:
            yield
        finally:
            with contextlib.suppress(Unavailable, ConnectionError):
                self._link.tell(self._told())
                await self._link.sent()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def serves(self) -> None:
        """Tell the supervisor that calls are answered from now on."""
        info = self._state.as_dict()
        self._link.tell(Serving(pid=os.getpid(), instance_id=self._state.instance_id, server_info=info))

    def start(self) -> None:
        self._broadcast = Broadcast()
        self._lag = asyncio.create_task(probe_lag(self._metrics.observe_loop_lag))

    async def stop(self) -> None:
        if self._broadcast is not None:
            self._broadcast.close()
        if self._lag is not None:
            self._lag.cancel()
            await asyncio.gather(self._lag, return_exceptions=True)

    async def figures(self) -> dict[str, Any]:
        return cast(dict[str, Any], await self._ask("figures"))

    async def prometheus(self, accept: str) -> tuple[bytes, str]:
        return cast(tuple[bytes, str], await self._ask("prometheus", accept))

    async def model_figures(self) -> ModelFigures:
        return cast(ModelFigures, await self._ask("model_figures"))

    async def readiness(self) -> tuple[bool, str]:
        return cast(tuple[bool, str], await self._ask("readiness"))

    async def workers(self) -> list[dict[str, Any]]:
        return cast(list[dict[str, Any]], await self._ask("workers"))

    async def message(self) -> str:
        return self._message or cast(str, await self._ask("message"))

    async def history(self) -> str:
        return cast(str, await self._ask("history"))

    async def announce(self, body: bytes) -> None:
        await self._ask("announce", body)

    async def listen(self) -> AsyncIterator[str]:
        yield await self.message()
        if self._broadcast is not None:
            async for message in self._broadcast.following():
                yield message

    async def _ask(self, method: str, argument: str | bytes | None = None) -> Any:
        return await self._link.ask(Question(method, argument), _TIMEOUT_S)

    async def _answer(self, question: Any) -> Told:
        return self._told()

    def _told(self) -> Told:
        ready, reason = self._state.readiness()
        return Told(report=self._metrics.report(), ready=ready, reason=reason)

    def _take(self, word: Any) -> None:
        if isinstance(word, Message):
            self._message = word.text
            if self._broadcast is not None:
                self._broadcast.publish(word.text)


def _own_end(seat: Seat) -> socket.socket:
    end = socket.socket(fileno=seat.link)
    end.set_inheritable(False)  # the model may get processes of its own
    end.setblocking(False)
    return end
