"""A process that runs a backend: the child's side, the frames between the two, and the server's hold on it.

A frame says what it is, which question it belongs to and how long it is; then comes the payload, over a socket pair. A
batch travels as the arrays that it is. What is no frame, or answers another question than the one that is open, ends
the process: from then on nobody could tell which answer belongs to whom.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import time
from collections.abc import Callable
from enum import IntEnum
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import Backend, TokenBatch, enable_faults
from ml_inference_server.backends.startup.resolve import Resolution
from ml_inference_server.backends.startup.start import Described, load_resolved, start_backend
from ml_inference_server.server.patience import Patience
from ml_inference_server.server.workers import Output
from ml_inference_server.utils.child import begin_child, huge_pages_for_children
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import StartError
from ml_inference_server.utils.logging import LogFormat, logging_choice, set_up_logging

log = logging.getLogger(__name__)

_MAGIC = b"MLE1"
_FRAME = struct.Struct("<4sBIQ")  # magic, kind, number of the question, bytes of the payload
_NO_QUESTION, _MOST_QUESTIONS = 0, 2**32 - 1
_RUN = struct.Struct("<I??xx")  # texts, whether segments follow the ids, and then variants
_ROWS = struct.Struct("<IIdd")  # rows, dimension, started_at, ended_at
# Far more than the largest batch has: a head that tells of more is none.
_MOST_PAYLOAD_BYTES = 2**36


class FrameKind(IntEnum):
    """What a frame holds."""

    PHASE = 1  # a sentence: what the start is busy with
    READY = 2  # a pickled Described
    REFUSED = 3  # the pickled error that ended the start
    RUN = 4
    ROWS = 5
    RAISED = 6  # a sentence
    PING = 7  # are you there?
    PONG = 8


_KINDS = frozenset(FrameKind)


class EngineDied(RuntimeError):
    """The process ended, or was ended because it hung, while a batch ran in it.

    is_killed: by somebody else, with SIGKILL: where memory runs out, the kernel does so.
    """

    def __init__(self, message: str, *, is_killed: bool = False) -> None:
        super().__init__(message)
        self.is_killed = is_killed


class BrokenFrame(ValueError):
    """What came is no frame, or no answer to the question that is open."""


def pack_frame(kind: int, question: int, payload: bytes) -> bytes:
    """question: the number of the one that it asks or answers; 0 for what the start says."""
    return _FRAME.pack(_MAGIC, kind, question, len(payload)) + payload


def frame_head(head: bytes) -> tuple[FrameKind, int, int]:
    """(kind, question, bytes of the payload). BrokenFrame where these bytes are the head of no frame."""
    magic, kind, question, length = _FRAME.unpack(head)
    if magic != _MAGIC or kind not in _KINDS or length > _MOST_PAYLOAD_BYTES:
        raise BrokenFrame("it sent what is no frame")
    return FrameKind(kind), question, length


def pack_batch(batch: TokenBatch) -> bytes:
    """`batch` as the payload of a frame."""
    parts = [_RUN.pack(len(batch), batch.type_ids is not None, batch.variants is not None), batch.starts.tobytes()]
    parts += [each.tobytes() for each in (batch.variants, batch.ids, batch.type_ids) if each is not None]
    return b"".join(parts)


def unpack_batch(payload: bytes | bytearray) -> TokenBatch:
    """What `pack_batch` packed; its arrays may be written to, as those of a batch that did not travel.

    ValueError where the payload has another length than the batch that it tells of.
    """
    if len(payload) < _RUN.size:
        raise ValueError("the payload is no batch")
    texts, has_types, has_variants = _RUN.unpack_from(payload)
    payload = bytearray(payload)
    ends = itertools.accumulate([_RUN.size, 8 * (texts + 1), 8 * texts * has_variants])
    starts_at, variants_at, ids_at = ends
    starts = np.frombuffer(payload, np.int64, texts + 1, starts_at)
    variants = np.frombuffer(payload, np.int64, texts, variants_at) if has_variants else None
    numbers = np.frombuffer(payload, np.int32, -1, ids_at)
    tokens = int(starts[-1])
    if tokens < 0 or len(numbers) != tokens * (1 + has_types):
        raise ValueError(f"{len(numbers)} numbers for a batch of {tokens} tokens")
    return TokenBatch(numbers[:tokens], starts, numbers[tokens:] if has_types else None, variants)


def unpack_rows(payload: bytes) -> Output:
    """What the child answered to a batch. ValueError where the payload has another length than its head tells."""
    if len(payload) < _ROWS.size:
        raise ValueError("the payload is no rows")
    count, dimension, started_at, ended_at = _ROWS.unpack_from(payload)
    rows: NDArray[np.float32] = np.frombuffer(payload, np.float32, offset=_ROWS.size).reshape(count, dimension)
    return Output(rows, started_at, ended_at)


def _child(
    connection: socket.socket, asked: ModelSettings | Resolution, faults: bool, log_level: str, log_format: LogFormat
) -> None:
    """Load, say so, and answer batches until the other side closes. `asked`: a resolution was checked before."""
    begin_child()
    set_up_logging(log_level, log_format)
    connection.setblocking(True)
    stream = connection.makefile("rb")
    try:
        backend, described = _load(asked, lambda text: _send(connection, FrameKind.PHASE, text.encode()))
        if faults:
            enable_faults(backend)
    except StartError as error:
        _send(connection, FrameKind.REFUSED, pickle.dumps(error))
        return
    _send(connection, FrameKind.READY, pickle.dumps(described))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            kind, question, request = _receive(stream)
            answer = (FrameKind.PONG, b"") if kind is FrameKind.PING else _answer(backend, request)
            _send(connection, *answer, question)
    os._exit(0)  # threads of a library must not keep it


def _load(asked: ModelSettings | Resolution, phase: Callable[[str], None]) -> tuple[Backend, Described | None]:
    if isinstance(asked, Resolution):
        return load_resolved(asked, lambda done, total: None), None
    started = start_backend(asked, phase)
    return started.backend, started.described()


def _answer(backend: Backend, request: bytes) -> tuple[FrameKind, bytes]:
    started_at = time.monotonic()
    try:
        rows = np.ascontiguousarray(backend.infer(unpack_batch(request)), np.float32)
        head = _ROWS.pack(len(rows), rows.shape[1], started_at, time.monotonic())
        return FrameKind.ROWS, head + rows.tobytes()
    except Exception as error:
        log.debug("a batch raised", exc_info=error)
        return FrameKind.RAISED, f"{type(error).__name__}: {error}".encode(errors="replace")


def _send(connection: socket.socket, kind: FrameKind, payload: bytes, question: int = _NO_QUESTION) -> None:
    connection.sendall(pack_frame(kind, question, payload))


def _receive(stream: BinaryIO) -> tuple[FrameKind, int, bytes]:
    head = stream.read(_FRAME.size)
    if len(head) < _FRAME.size:
        raise EOFError
    kind, question, length = frame_head(head)
    return kind, question, stream.read(length)


class EngineProcess:
    """One process. `start` first, then one `run` at a time."""

    def __init__(
        self,
        asked: ModelSettings | Resolution,
        faults: bool,
        phase: Callable[[str], None],
        died: Callable[["EngineProcess"], None],
    ) -> None:
        self._phase, self._died = phase, died
        self._here, self._there = socket.socketpair()
        level, log_format = logging_choice()
        if isinstance(asked, Resolution) and level == "INFO":
            level = "WARNING"  # the first process has logged all of it already
        # Not daemonic: choosing a backend starts processes of its own.
        self._process = multiprocessing.get_context("spawn").Process(
            target=_child, args=(self._there, asked, faults, level, log_format), name="engine", daemon=False
        )
        self._answer: asyncio.Future[tuple[FrameKind, bytes]] | None = None
        self._question = _NO_QUESTION
        self._broken = ""  # what it sent in place of an answer
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._exit_code: int | None = None  # once it has ended
        self.pid = 0
        self.alive = False
        self.is_killed = False

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
            self._answer = asyncio.get_running_loop().create_future()
            self._reading = asyncio.create_task(self._read(self.reader))
            kind, payload = await self._within(limit_s, f"it was not ready after {limit_s:.3g} s")
        except BaseException:
            self.kill()
            raise
        content = pickle.loads(payload)  # noqa: S301 - of our own child
        if kind is FrameKind.REFUSED:
            self.kill()
            raise content
        described: Described | None = content
        return described

    async def run(self, batch: TokenBatch, limit_s: float) -> Output:
        """EngineDied if the process ends or takes longer than `limit_s`, which ends it; RuntimeError if it raised."""
        late = f"a batch ran for {limit_s:.3g} s (server.hang_timeout_ms is the most): its process was ended"
        kind, content = await self._ask(FrameKind.RUN, pack_batch(batch), limit_s, late)
        if kind is FrameKind.RAISED:
            raise RuntimeError(content.decode())
        try:
            return unpack_rows(content)
        except ValueError as error:
            self._broken = "its answer to a batch holds no rows"
            self.kill()
            raise EngineDied(f"the process of the engine was ended: {self._broken}") from error

    async def ping(self, limit_s: float) -> None:
        """EngineDied if it does not answer within `limit_s`, which ends it."""
        await self._ask(
            FrameKind.PING, b"", limit_s, f"it was idle and did not answer for {limit_s:.3g} s: it was ended"
        )

    async def _ask(self, kind: FrameKind, payload: bytes, limit_s: float, late: str) -> tuple[FrameKind, bytes]:
        if self._writer is None or not self.alive:
            raise EngineDied("the process of the engine has ended")
        self._answer = asyncio.get_running_loop().create_future()
        self._question = self._question % _MOST_QUESTIONS + 1
        try:
            self._writer.write(pack_frame(kind, self._question, payload))
            return await self._within(limit_s, late)
        except asyncio.CancelledError:
            self.kill()  # its answer would be taken for that of the next batch
            raise

    async def _within(self, limit_s: float, late: str) -> tuple[FrameKind, bytes]:
        """The answer that is waited for; after `limit_s` the process is ended and EngineDied says why."""
        answer = self._answer
        assert answer is not None  # noqa: S101 - whoever asks waits for one

        def give_up() -> None:
            self.kill()
            if not answer.done():
                answer.set_exception(EngineDied(late))

        patience = Patience(limit_s, give_up)
        try:
            return await answer
        finally:
            patience.end()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Until it ends, or sends what ends it. It is replaced then."""
        try:
            while True:
                kind, question, length = frame_head(await reader.readexactly(_FRAME.size))
                payload = await reader.readexactly(length)
                if kind is FrameKind.PHASE:
                    self._phase(payload.decode(errors="replace"))
                elif question == self._question and self._answer is not None and not self._answer.done():
                    self._answer.set_result((kind, payload))
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
        if self._answer is not None and not self._answer.done():
            message = f"the process of the engine ended ({self.end})"
            self._answer.set_exception(EngineDied(message, is_killed=self.is_killed))
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
