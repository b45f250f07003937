"""Which HTTP connections are open, and which one goes when there are too many: probes must always get in."""

import asyncio
import contextlib
import math
from collections.abc import Iterator

from aiohttp import web

MAX_CONNECTIONS = 256
# Above them, where all of those are at work: for probes only.
PROBE_CONNECTIONS = 16
FIRST_REQUEST_TIMEOUT_S = 10.0


class Connections:
    """A connection is idle while it has no complete request head, and at work from then to its answer.

    There are at most MAX_CONNECTIONS. For a new one above that, the one that is idle for longest is closed; if none is,
    the one that has been sending the body of its request for longest.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # Both in the order in which the connections came to be so.
        self._idle: dict[web.RequestHandler, None] = {}
        self._at_work: dict[web.RequestHandler, web.BaseRequest] = {}
        self._extra: set[web.RequestHandler] = set()
        self._timers: dict[web.RequestHandler, asyncio.TimerHandle] = {}
        self._last_request_at = -math.inf

    def __len__(self) -> int:
        return len(self._idle) + len(self._at_work)

    def has_room(self) -> bool:
        """Room for one more, made by closing another where it has to be. False only where all are at work."""
        if len(self) >= MAX_CONNECTIONS:
            self._forget_closed()
        if len(self) >= MAX_CONNECTIONS and (closed := self._least_wanted()) is not None:
            self.close(closed)
        return len(self) < MAX_CONNECTIONS + PROBE_CONNECTIONS

    def add(self, connection: web.RequestHandler) -> None:
        """One begins. aiohttp itself would wait for ever for its first request."""
        if len(self) >= MAX_CONNECTIONS:
            self._extra.add(connection)
        self._idle[connection] = None
        self._timers[connection] = self._loop.call_later(FIRST_REQUEST_TIMEOUT_S, self.close, connection)

    def is_extra(self, connection: web.RequestHandler) -> bool:
        """Whether it came when there was no room, and may only ask for the server's health."""
        return connection in self._extra

    @contextlib.contextmanager
    def working(self, request: web.BaseRequest) -> Iterator[None]:
        """Its connection is at work on the request."""
        connection = request.protocol
        if (timer := self._timers.pop(connection, None)) is not None:
            timer.cancel()
        self._idle.pop(connection, None)
        self._at_work[connection] = request
        self._last_request_at = self._loop.time()
        try:
            yield
        finally:
            if self._at_work.pop(connection, None) is not None:
                self._idle[connection] = None

    async def quiet(self, for_s: float, limit_s: float) -> None:
        """Until no request has come `for_s` long, at most `limit_s`."""
        give_up_at = self._loop.time() + limit_s
        while (left_s := min(give_up_at, self._last_request_at + for_s) - self._loop.time()) > 0:  # noqa: ASYNC110 - a lull
            await asyncio.sleep(left_s)

    def close(self, connection: web.RequestHandler) -> None:
        """At once. A second time does nothing."""
        self._forget(connection)
        connection.force_close()

    def stop(self) -> None:
        """No connection is closed for being late any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _least_wanted(self) -> web.RequestHandler | None:
        if self._idle:
            return next(iter(self._idle))
        return next((each for each, request in self._at_work.items() if not request.content.is_eof()), None)

    def _forget_closed(self) -> None:
        for connection in [*self._idle, *self._at_work]:
            transport = connection.transport
            # One that waits for its first request may be too young to have a transport; its timer forgets it.
            is_closed = connection not in self._timers if transport is None else transport.is_closing()
            if is_closed:
                self._forget(connection)

    def _forget(self, connection: web.RequestHandler) -> None:
        if (timer := self._timers.pop(connection, None)) is not None:
            timer.cancel()
        self._idle.pop(connection, None)
        self._at_work.pop(connection, None)
        self._extra.discard(connection)
