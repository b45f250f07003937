"""What can be asked about a server's figures, of one process by itself or of all its workers together."""

from collections.abc import AsyncIterator
from typing import Any, Protocol

from ml_inference_server.metrics.model_figures import ModelFigures


class View(Protocol):
    """Any method may raise Unavailable where others have to be asked and do not answer."""

    def start(self) -> None: ...

    async def stop(self) -> None:
        """End every `listen`. Safe to call twice."""

    async def figures(self) -> dict[str, Any]:
        """The JSON of GET /metrics."""
        ...

    async def prometheus(self, accept: str) -> tuple[bytes, str]:
        """Body and content type: OpenMetrics where the Accept header names it, else Prometheus text."""
        ...

    async def model_figures(self) -> ModelFigures:
        """What the model did since the start."""
        ...

    async def readiness(self) -> tuple[bool, str]:
        """(whether calls are answered, the reason)."""
        ...

    async def workers(self) -> list[dict[str, Any]]:
        """Each worker as /info tells it; none where one process serves alone."""
        ...

    async def message(self) -> str:
        """The JSON of the last tick. RuntimeError if that one failed: the log has the cause."""
        ...

    async def history(self) -> str:
        """The JSON of GET /api/v1/history."""
        ...

    def listen(self) -> AsyncIterator[str]:
        """The last message, then each new one; ends with `stop`. Who is slow misses some."""
        ...

    async def announce(self, body: bytes) -> None:
        """Take the progress of a benchmark in; ValueError says in one line what is wrong with it."""
        ...
