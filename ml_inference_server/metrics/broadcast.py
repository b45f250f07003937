"""One text each second for everybody who listens."""

import asyncio
from collections.abc import AsyncIterator


class Broadcast:
    """Made inside the event loop."""

    def __init__(self) -> None:
        self._next: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def publish(self, text: str) -> None:
        """Nothing happens after `close`."""
        if not self._next.done():
            waited_for, self._next = self._next, asyncio.get_running_loop().create_future()
            waited_for.set_result(text)

    def close(self) -> None:
        """End every `following`."""
        self._next.cancel()

    async def following(self) -> AsyncIterator[str]:
        """Each text from now on. Who is slow misses some."""
        while not self._next.cancelled():
            try:
                yield await asyncio.shield(self._next)
            except asyncio.CancelledError:
                if self._next.cancelled():
                    return
                raise
