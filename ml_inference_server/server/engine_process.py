"""A process that runs a backend: the child's side, the frames between the two, and the server's hold on it.

A frame is a kind and a length, then the payload, over a socket pair. A batch travels as the arrays that it is.
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

_FRAME = struct.Struct("<BQ")
_RUN = struct.Struct("<I??xx")  # texts, whether segments follow the ids, and then variants
_ROWS = struct.Struct("<IIdd")  # rows, dimension, started_at, ended_at


class _Kind(IntEnum):
    PHASE = 1  # a sentence: what the start is busy with
    READY = 2  # a pickled Described
    REFUSED = 3  # the pickled error that ended the start
    RUN = 4
    ROWS = 5
    RAISED = 6  # a sentence
    PING = 7  # are you there?
    PONG = 8


class EngineDied(RuntimeError):
    """The process ended, or was ended because it hung, while a batch ran in it.

    is_killed: by somebody else, with SIGKILL: where memory runs out, the kernel does so.
    """

    def __init__(self, message: str, *, is_killed: bool = False) -> None:
        super().__init__(message)
        self.is_killed = is_killed


def pack_batch(batch: TokenBatch) -> bytes:
    """`batch` as the payload of a frame."""
    parts = [_RUN.pack(len(batch), batch.type_ids is not None, batch.variants is not None), batch.starts.tobytes()]
    parts += [each.tobytes() for each in (batch.variants, batch.ids, batch.type_ids) if each is not None]
    return b"".join(parts)


def unpack_batch(payload: bytes | bytearray) -> TokenBatch:
    """What `pack_batch` packed; its arrays may be written to, as those of a batch that did not travel."""
    texts, has_types, has_variants = _RUN.unpack_from(payload)
    payload = bytearray(payload)
    ends = itertools.accumulate([_RUN.size, 8 * (texts + 1), 8 * texts * has_variants])
    starts_at, variants_at, ids_at = ends
    starts = np.frombuffer(payload, np.int64, texts + 1, starts_at)
    variants = np.frombuffer(payload, np.int64, texts, variants_at) if has_variants else None
    numbers = np.frombuffer(payload, np.int32, -1, ids_at)
    tokens = int(starts[-1])
    return TokenBatch(numbers[:tokens], starts, numbers[tokens:] if has_types else None, variants)


def _child(
    connection: socket.socket, asked: ModelSettings | Resolution, faults: bool, log_level: str, log_format: LogFormat
) -> None:
    """Load, say so, and answer batches until the other side closes. `asked`: a resolution was checked before."""
    begin_child()
    set_up_logging(log_level, log_format)
    connection.setblocking(True)
    stream = connection.makefile("rb")
    try:
        backend, described = _load(asked, lambda text: _send(connection, _Kind.PHASE, text.encode()))
        if faults:
            enable_faults(backend)
    except StartError as error:
        _send(connection, _Kind.REFUSED, pickle.dumps(error))
        return
    _send(connection, _Kind.READY, pickle.dumps(described))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            kind, request = _receive(stream)
            _send(connection, *((_Kind.PONG, b"") if kind is _Kind.PING else _answer(backend, request)))
    os._exit(0)  # threads of a library must not keep it


def _load(asked: ModelSettings | Resolution, phase: Callable[[str], None]) -> tuple[Backend, Described | None]:
    if isinstance(asked, Resolution):
        return load_resolved(asked, lambda done, total: None), None
    started = start_backend(asked, phase)
    return started.backend, started.described()


def _answer(backend: Backend, request: bytes) -> tuple[_Kind, bytes]:
    started_at = time.monotonic()
    try:
        rows = np.ascontiguousarray(backend.infer(unpack_batch(request)), np.float32)
        head = _ROWS.pack(len(rows), rows.shape[1], started_at, time.monotonic())
        return _Kind.ROWS, head + rows.tobytes()
    except Exception as error:
        log.debug("a batch raised", exc_info=error)
        return _Kind.RAISED, f"{type(error).__name__}: {error}".encode(errors="replace")


def _send(connection: socket.socket, kind: _Kind, payload: bytes) -> None:
    connection.sendall(_FRAME.pack(kind, len(payload)) + payload)


def _receive(stream: BinaryIO) -> tuple[_Kind, bytes]:
    head = stream.read(_FRAME.size)
    if len(head) < _FRAME.size:
        raise EOFError
    kind, length = _FRAME.unpack(head)
    return _Kind(kind), stream.read(length)


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
        self._answer: asyncio.Future[tuple[_Kind, bytes]] | None = None
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
        if kind is _Kind.REFUSED:
            self.kill()
            raise content
        described: Described | None = content
        return described

    async def run(self, batch: TokenBatch, limit_s: float) -> Output:
        """EngineDied if the process ends or takes longer than `limit_s`, which ends it; RuntimeError if it raised."""
        late = f"a batch ran for {limit_s:.3g} s (server.hang_timeout_ms is the most): its process was ended"
        kind, content = await self._ask(_Kind.RUN, pack_batch(batch), limit_s, late)
        if kind is _Kind.RAISED:
            raise RuntimeError(content.decode())
        count, dimension, started_at, ended_at = _ROWS.unpack_from(content)
        rows: NDArray[np.float32] = np.frombuffer(content, np.float32, offset=_ROWS.size).reshape(count, dimension)
        return Output(rows, started_at, ended_at)

    async def ping(self, limit_s: float) -> None:
        """EngineDied if it does not answer within `limit_s`, which ends it."""
        await self._ask(_Kind.PING, b"", limit_s, f"it was idle and did not answer for {limit_s:.3g} s: it was ended")

    async def _ask(self, kind: _Kind, payload: bytes, limit_s: float, late: str) -> tuple[_Kind, bytes]:
        if self._writer is None or not self.alive:
            raise EngineDied("the process of the engine has ended")
        self._answer = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(_FRAME.pack(kind, len(payload)) + payload)
            return await self._within(limit_s, late)
        except asyncio.CancelledError:
            self.kill()  # its answer would be taken for that of the next batch
            raise

    async def _within(self, limit_s: float, late: str) -> tuple[_Kind, bytes]:
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
        # ValueError: what came is no frame of ours. Whatever ends the reading ends the process, which is then replaced.
        with contextlib.suppress(asyncio.IncompleteReadError, OSError, ValueError):
            while True:
                number, length = _FRAME.unpack(await reader.readexactly(_FRAME.size))
                kind, payload = _Kind(number), await reader.readexactly(length)
                if kind is _Kind.PHASE:
                    self._phase(payload.decode())
                elif self._answer is not None and not self._answer.done():
                    self._answer.set_result((kind, payload))
        by_itself = self.alive
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
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """At once, whatever it is doing."""
        self.alive = False
        if self.pid and self._exit_code is None:
            self._process.kill()
        (self._writer or self._here).close()
