"""The server's HTTP port: counters that a row's share is made of, and where the progress is told."""

import asyncio
import logging
import time
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from ml_inference_server.utils.connection import IN_THE_CLEAR, Connection

log = logging.getLogger(__name__)

_TIMEOUT = aiohttp.ClientTimeout(total=3.0)
_ANNOUNCE_EVERY_S = 1.0
# Sums since the start; what a row did is the difference.
COUNTERS = (
    "mlis_tokens_total",
    "mlis_padding_tokens_total",
    "mlis_batch_texts_sum",
    "mlis_batch_texts_count",
    "mlis_shared_texts_total",
    "mlis_cache_hits_total",
)
# Servers of earlier versions lack these: they compute every text.
_SINCE_SHARING = {"mlis_shared_texts_total", "mlis_cache_hits_total"}


class ServerCounters:
    """`port` 0: not known, and then every question goes without an answer."""

    def __init__(self, host: str, port: int, connection: Connection = IN_THE_CLEAR) -> None:
        self._connection = connection
        self._url = f"{connection.scheme}://[{host}]:{port}" if ":" in host else f"{connection.scheme}://{host}:{port}"
        self._known = bool(port)
        self._session: aiohttp.ClientSession | None = None
        self._announced_s = 0.0
        self._telling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "ServerCounters":
        connector = aiohttp.TCPConnector(ssl=self._connection.context()) if self._connection.tls else None
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._connection.headers(), timeout=_TIMEOUT, trust_env=False
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._telling is not None:
            await self._telling
        if self._session is not None:
            await self._session.close()

    async def counters(self) -> dict[str, float] | None:
        """The sums of COUNTERS; None where the port is not known, does not answer, or is no server of ours."""
        if not self._known or self._session is None:
            return None
        try:
            async with self._session.get(f"{self._url}/metrics/prometheus") as answer:
                text = await answer.text() if answer.status == 200 else ""
            sums = dict.fromkeys(COUNTERS, 0.0)
            seen = set()
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name in sums:
                        sums[sample.name] += sample.value
                        seen.add(sample.name)
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            log.debug("no counters from %s: %s", self._url, error)
            return None
        return sums if seen | _SINCE_SHARING == set(COUNTERS) else None

    def announce(self, progress: dict[str, Any]) -> None:
        """Tell the server's dashboard how far the benchmark is, at most once a second; nobody waits for it."""
        now_s = time.monotonic()
        if not self._known or self._session is None or now_s - self._announced_s < _ANNOUNCE_EVERY_S:
            return
        if self._telling is not None and not self._telling.done():
            return
        self._announced_s = now_s
        self._telling = asyncio.create_task(self._tell(progress))

    async def finish(self, progress: dict[str, Any]) -> None:
        """The last word, which is not left out."""
        if self._known and self._session is not None:
            if self._telling is not None:
                await self._telling
            await self._tell(progress)

    async def _tell(self, progress: dict[str, Any]) -> None:
        assert self._session is not None  # noqa: S101 - the callers looked
        try:
            async with self._session.post(f"{self._url}/api/v1/benchmark", json=progress) as answer:
                if answer.status >= 400:
                    log.debug("progress not taken by %s: status %d", self._url, answer.status)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.debug("progress not taken by %s: %s", self._url, error)


def difference(before: dict[str, float] | None, after: dict[str, float] | None) -> dict[str, float] | None:
    if before is None or after is None:
        return None
    return {name: after[name] - before[name] for name in COUNTERS}
