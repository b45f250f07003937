"""The supervisor's side: what each worker says, added up, for whichever of them is asked."""

import asyncio
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_inference_server.metrics.live import Live
from ml_inference_server.metrics.merged import MergedMetrics
from ml_inference_server.utils.errors import Unavailable
from ml_inference_server.worker_processes.link import Link
from ml_inference_server.worker_processes.words import REPORT, Message, Question, Serving, Told

# A worker that stands still is not waited for: its last figures stand until it goes on, or is ended for it.
_REPORT_TIMEOUT_S = 0.5
_MOST_UNANSWERED = 3

log = logging.getLogger(__name__)


@dataclass
class Member:
    """One worker. serving: from its word that it answers calls to the end of that life; it is None outside of that."""

    index: int
    cpus: Sequence[int]
    lives: int = 0
    link: Link | None = None
    serving: Serving | None = None
    ready: bool = False
    reason: str = "starting"
    has_served: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def restarts(self) -> int:
        return max(0, self.lives - 1)

    def as_dict(self) -> dict[str, Any]:
        """As pb.Worker."""
        serving = self.serving
        return {
            "index": self.index,
            "pid": serving.pid if serving else 0,
            "instance_id": serving.instance_id if serving else "",
            "ready": self.ready,
            "reason": self.reason,
            "restarts": self.restarts,
            "cpus": list(self.cpus),
        }


class Hub:
    """Made inside the event loop. cpus: of each worker, empty where the system places it."""

    def __init__(self, cpus: Sequence[Sequence[int]], window_s: int) -> None:
        self.members = [Member(index, own) for index, own in enumerate(cpus)]
        self.is_stopping = False
        self._metrics = MergedMetrics(
            window_s=window_s,
            ready=lambda: sum(member.ready for member in self.members),
            restarts=lambda: sum(member.restarts for member in self.members),
        )
        self._live = Live(
            self._metrics,
            self._server_info,
            self._readiness,
            refresh=self._refresh,
            workers=lambda: [member.as_dict() for member in self.members],
        )
        self._sending: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._live.start()
        self._sending = asyncio.create_task(self._send_messages())

    async def stop(self) -> None:
        await self._live.stop()
        if self._sending is not None:
            await self._sending

    async def attend(self, index: int, end: socket.socket) -> None:
        """To one life of a worker, until it has closed its end."""
        member = self.members[index]
        member.lives += 1
        link = member.link = Link(self._answer, lambda word: self._take(member, word))
        try:
            await link.run(end)
        finally:
            member.link = member.serving = None
            member.ready, member.reason = False, "starting again"
            self._metrics.retire(index)

    def _server_info(self) -> dict[str, Any]:
        return next((dict(member.serving.server_info) for member in self.members if member.serving), {})

    def _readiness(self) -> tuple[bool, str]:
        """Of the whole: while one of them answers calls, those that come by another one can be repeated."""
        if self.is_stopping:
            return False, "draining"
        ready = sum(member.ready for member in self.members)
        if ready == len(self.members):
            return True, "ready"
        reasons = "; ".join(f"worker {each.index}: {each.reason}" for each in self.members if not each.ready)
        return ready > 0, f"{ready} of {len(self.members)} workers are ready ({reasons})"

    async def _refresh(self) -> None:
        """The figures of this moment, of every worker that does not stand still."""
        await asyncio.gather(*(self._ask(member) for member in self.members))

    async def _ask(self, member: Member) -> None:
        link = member.link
        if link is None or link.waiting >= _MOST_UNANSWERED:
            return
        try:
            await link.ask(REPORT, _REPORT_TIMEOUT_S, lambda told: self._take(member, told))
        except (Unavailable, RuntimeError) as error:  # its own log has the cause of the latter
            log.debug("worker %d: %s", member.index, error)

    def _take(self, member: Member, word: Any) -> None:
        if isinstance(word, Serving):
            member.serving = word
            member.ready, member.reason = True, "ready"
            member.has_served.set()
        elif isinstance(word, Told):
            self._metrics.put(member.index, word.report)
            if member.serving is not None:
                member.ready, member.reason = word.ready, word.reason

    async def _answer(self, question: Question) -> Any:
        method = getattr(self._live, question.method)
        return await (method() if question.argument is None else method(question.argument))

    async def _send_messages(self) -> None:
        """To every worker, whose pages they are for; ends with `stop`."""
        async for message in self._live.listen():
            for member in self.members:
                if member.link is not None and member.link.waiting < _MOST_UNANSWERED and member.serving is not None:
                    try:
                        member.link.tell(Message(message))
                    except Unavailable:
                        log.debug("worker %d has ended", member.index)
