"""Files that are read anew when they change."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from ml_inference_server.utils.errors import ConfigError

log = logging.getLogger(__name__)

POLL_S = 1.0

Fingerprint = tuple[tuple[int, ...] | None, ...]


class FileWatch:
    """Calls `reload` after the files have changed. What it refuses is logged once, and what was there stays.

    The files are asked for rather than listened to: mounted secrets and network folders send no events.
    after: awaited after each reload that went well.
    """

    def __init__(self, paths: Sequence[Path], reload: Callable[[], str]) -> None:
        """reload: says in a few words what it has done, or raises ConfigError."""
        self._paths = paths
        self._reload = reload
        self._seen = self._fingerprint()
        self.after: list[Callable[[], Awaitable[None]]] = []

    async def look(self) -> None:
        """Read them if they are others than at the last look."""
        found = self._fingerprint()
        if found == self._seen:
            return
        self._seen = found
        try:
            log.info("%s", self._reload())
        except ConfigError as error:
            log.error("%s; what was read before stays in force", error)
            return
        for each in self.after:
            await each()

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(POLL_S)
            await self.look()

    def _fingerprint(self) -> Fingerprint:
        """Of what the paths lead to: a mounted secret is a link that is turned to another folder."""
        found: list[tuple[int, ...] | None] = []
        for path in self._paths:
            try:
                stat = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return tuple(found)
