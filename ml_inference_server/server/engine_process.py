"""The server's hold on a process that runs a backend (engine_child.py)."""

import asyncio
import math
import multiprocessing
import pickle
import signal
import socket
from collections.abc import Callable
from typing import NamedTuple

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.backends.startup.resolve import Resolution
from ml_inference_server.backends.startup.start import Described
from ml_inference_server.server.engine_child import run_child
from ml_inference_server.server.engine_frames import (
    FRAME_BYTES,
    MOST_QUESTIONS,
    NO_QUESTION,
    BrokenFrame,
    FrameKind,
    frame_head,
    pack_batch,
    pack_frame,
    unpack_rows,
)
from ml_inference_server.server.patience import Patience
from ml_inference_server.server.workers import Output
from ml_inference_server.utils.child import huge_pages_for_children
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.logging import logging_choice


class EngineDied(RuntimeError):
    """The process ended, or was ended because it hung, while a batch ran in it.

    is_killed: by somebody else, with SIGKILL: where memory runs out, the kernel does so.
    """

    def __init__(self, message: str, *, is_killed: bool = False) -> None:
        super().__init__(message)
        self.is_killed = is_killed


class StartListener(NamedTuple):
    """Who hears of a start. phase: what it is busy with. loaded: what it has loaded, before it is warm and checked."""

    phase: Callable[[str], None] = lambda text: None
    loaded: Callable[[Resolution], None] = lambda resolution: None


class EngineProcess:
    """One process. `start` first, then at most one `run` of bulk and one of other batches at a time."""

    def __init__(
        self,
        asked: ModelSettings | Resolution,
        faults: bool,
        told: StartListener,
        died: Callable[["EngineProcess"], None],
    ) -> None:
        self._told, self._died = told, died
        self._here, self._there = socket.socketpair()
        level, log_format = logging_choice()
        if isinstance(asked, Resolution) and level == "INFO":
            level = "WARNING"  # the first process has logged all of it already
        # Not daemonic: choosing a backend starts processes of its own.
        self._process = multiprocessing.get_context("spawn").Process(
            target=run_child, args=(self._there, asked, faults, level, log_format), name="engine", daemon=False
        )
        self._open: dict[int, _Question] = {}  # by their numbers
        self._last_question = NO_QUESTION
        self._broken = ""  # what it sent in place of an answer
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._exit_code: int | None = None  # once it has ended
        self.pid = 0
        self.alive = False
        self.is_killed = False
        self.ended_at = 0.0  # its last batch, by the event loop's clock

    async def start(self, limit_s: float = math.inf) -> Described | None:
        """Until it is loaded and warm. Raises what the child refused with, or EngineDied, also after `limit_s`."""
        with huge_pages_for_children():
            self._process.start()
        self.pid = self._process.pid or 0
        self._there.close()
        self.alive = True
        try:
            self._here.setblocking(False)
            self.reader, self._writer = await asyncio.open_connection(sock=self._here)
            self._reading = asyncio.create_task(self._read(self.reader))
            late = f"it was not ready after {limit_s:.3g} s"
            kind, payload = await self._answer_to(NO_QUESTION, _Question(FrameKind.READY), limit_s, late)
        except BaseException:
            self.kill()
            raise
        content = pickle.loads(payload)  # noqa: S301 - of our own child
        if kind is FrameKind.REFUSED:
            self.kill()
            raise content
        described: Described | None = content
        return described

    @property
    def questions(self) -> int:
        """How many it has not answered yet."""
        return len(self._open)

    def has_room(self, *, is_bulk: bool) -> bool:
        """Whether it can take a batch of this kind now."""
        return self.alive and all((each.kind is FrameKind.RUN_BULK) != is_bulk for each in self._open.values())

    async def run(self, batch: TokenBatch, limit_s: float, *, is_bulk: bool = False) -> Output:
        """EngineDied if the process ends or takes longer than `limit_s`, which ends it; RuntimeError if it raised."""
        late = f"a batch ran for {limit_s:.3g} s (server.hang_timeout_ms is the most): its process was ended"
        kind = FrameKind.RUN_BULK if is_bulk else FrameKind.RUN
        said, content = await self._ask(kind, pack_batch(batch), limit_s, late)
        self.ended_at = asyncio.get_running_loop().time()
        if said is FrameKind.RAISED:
            raise RuntimeError(content.decode())
        try:
            return unpack_rows(content)
        except ValueError as error:
            self._broken = "its answer to a batch holds no rows"
            self.kill()
            raise EngineDied(f"the process of the engine was ended: {self._broken}") from error

    async def ping(self, limit_s: float) -> None:
        """EngineDied if it does not answer within `limit_s`, which ends it."""
        late = f"it was idle and did not answer for {limit_s:.3g} s: it was ended"
        await self._ask(FrameKind.PING, b"", limit_s, late)

    async def _ask(self, kind: FrameKind, payload: bytes, limit_s: float, late: str) -> tuple[FrameKind, bytes]:
        if self._writer is None or not self.alive:
            raise EngineDied("the process of the engine has ended")
        self._last_question = number = self._last_question % MOST_QUESTIONS + 1
        try:
            self._writer.write(pack_frame(kind, number, payload))
            return await self._answer_to(number, _Question(kind), limit_s, late)
        except asyncio.CancelledError:
            self.kill()  # its answer would be taken for that of the next batch
            raise

    async def _answer_to(
        self, number: int, question: "_Question", limit_s: float, late: str
    ) -> tuple[FrameKind, bytes]:
        """Waits for it; after `limit_s` the process is ended and EngineDied says why."""

        def give_up() -> None:
            self.kill()
            question.fail(EngineDied(late))

        self._open[number] = question
        patience = Patience(limit_s, give_up)
        try:
            return await question.answer
        finally:
            patience.end()
            del self._open[number]

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Until it ends, or sends what ends it. It is replaced then."""
        try:
            while True:
                kind, number, length = frame_head(await reader.readexactly(FRAME_BYTES))
                payload = await reader.readexactly(length)
                question = self._open.get(number)
                if kind is FrameKind.PHASE:
                    self._told.phase(payload.decode(errors="replace"))
                elif kind is FrameKind.LOADED and NO_QUESTION in self._open:
                    self._told.loaded(_resolution(payload))
                elif question is not None and not question.answer.done():
                    question.answer.set_result((kind, payload))
                else:
                    raise BrokenFrame(f"it sent {kind.name}, for which nobody had asked")
        except BrokenFrame as error:
            self._broken = self._broken or str(error)
        except (asyncio.IncompleteReadError, OSError):
            pass  # it has ended
        by_itself = self.alive and not self._broken
        self.kill()
        await asyncio.to_thread(self._process.join)
        self._exit_code = self._process.exitcode or 0
        self._process.close()  # its descriptors would stay until a collection of garbage
        self.is_killed = by_itself and self._exit_code == -signal.SIGKILL
        for question in self._open.values():
            message = f"the process of the engine ended ({self.end})"
            question.fail(EngineDied(message, is_killed=self.is_killed))
        self._died(self)

    @property
    def end(self) -> str:
        """How it ended."""
        code = self._exit_code or 0
        if self.is_killed:
            return "signal SIGKILL of somebody else: where memory runs out, the kernel sends it"
        if self._broken:
            return f"{self._broken}, and was ended"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """At once, whatever it is doing."""
        self.alive = False
        if self.pid and self._exit_code is None:
            self._process.kill()
        (self._writer or self._here).close()


def _resolution(payload: bytes) -> Resolution:
    """BrokenFrame where that is none."""
    try:
        found = pickle.loads(payload)  # noqa: S301 - of our own child
    except Exception as error:
        raise BrokenFrame("what it says of its start cannot be read") from error
    if not isinstance(found, Resolution):
        raise BrokenFrame("what it says of its start is no resolution")
    return found


class _Question:
    """kind: what was asked for; READY for the start, which nobody asks for."""

    def __init__(self, kind: FrameKind) -> None:
        self.kind = kind
        self.answer: asyncio.Future[tuple[FrameKind, bytes]] = asyncio.get_running_loop().create_future()

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
