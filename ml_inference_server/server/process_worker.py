"""A backend in processes of its own, one for each stream, and the worker that watches over them.

Python's lock then stands between no batch and the requests, and a batch that crashes or hangs costs its process, not
the server. What ran there fails like a batch that raised; the process is started anew, from the cache.

Both sides speak in frames over a socket pair: a kind and a length, then the payload.
"""

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import Backend, Encoded, collate
from ml_inference_server.backends.startup.resolve import Resolution
from ml_inference_server.backends.startup.start import Described, load_resolved, start_backend
from ml_inference_server.server.workers import Output
from ml_inference_server.utils.child import begin_child, huge_pages_for_children
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError, StartError
from ml_inference_server.utils.logging import LogFormat, logging_choice, set_up_logging

log = logging.getLogger(__name__)

_MOST_BACKOFF_S = 30.0
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


class EngineDied(RuntimeError):
    """The process ended, or was ended because it hung, while a batch ran in it."""


# The child's side


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
            backend.enable_faults()  # type: ignore[attr-defined] # Settings allow this with the fake backend only
    except StartError as error:
        _send(connection, _Kind.REFUSED, pickle.dumps(error))
        return
    _send(connection, _Kind.READY, pickle.dumps(described))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            _send(connection, *_answer(backend, _receive(stream)))
    os._exit(0)  # threads of a library must not keep it


def _load(asked: ModelSettings | Resolution, phase: Callable[[str], None]) -> tuple[Backend, Described | None]:
    if isinstance(asked, Resolution):
        return load_resolved(asked, lambda done, total: None), None
    started = start_backend(asked, phase)
    return started.backend, started.described()


def _answer(backend: Backend, request: bytes) -> tuple[_Kind, bytes]:
    started_at = time.monotonic()
    try:
        texts = unpack_texts(request)
        rows = np.ascontiguousarray(backend.infer(collate(texts, backend.tokenizer.pad_id)), np.float32)
        head = _ROWS.pack(len(rows), rows.shape[1], started_at, time.monotonic())
        return _Kind.ROWS, head + rows.tobytes()
    except Exception as error:
        log.debug("a batch raised", exc_info=error)
        return _Kind.RAISED, f"{type(error).__name__}: {error}".encode(errors="replace")


def _send(connection: socket.socket, kind: _Kind, payload: bytes) -> None:
    connection.sendall(_FRAME.pack(kind, len(payload)) + payload)


def _receive(stream: BinaryIO) -> bytes:
    head = stream.read(_FRAME.size)
    if len(head) < _FRAME.size:
        raise EOFError
    return stream.read(_FRAME.unpack(head)[1])


def pack_texts(texts: Sequence[Encoded]) -> bytes:
    """`texts` as the payload of a frame; their order is kept, `truncated` is not."""
    lengths = np.array([text.length for text in texts], np.int32)
    has_types = any(text.type_ids is not None for text in texts)
    has_variants = any(text.variant for text in texts)
    parts = [_RUN.pack(len(texts), has_types, has_variants), lengths.tobytes()]
    parts += [text.ids.tobytes() for text in texts]
    if has_types:
        parts += [bytes(4 * text.length) if text.type_ids is None else text.type_ids.tobytes() for text in texts]
    if has_variants:
        parts.append(np.array([text.variant for text in texts], np.int32).tobytes())
    return b"".join(parts)


def unpack_texts(payload: bytes) -> list[Encoded]:
    count, has_types, has_variants = _RUN.unpack_from(payload)
    numbers = np.frombuffer(payload, np.int32, -1, _RUN.size)
    ends = np.cumsum(numbers[:count])
    parts = np.split(numbers[count:], np.cumsum([ends[-1]] * (1 + has_types)))
    ids = np.split(parts[0], ends[:-1])
    types: Sequence[NDArray[np.int32] | None] = np.split(parts[1], ends[:-1]) if has_types else [None] * count
    variants = parts[-1].tolist() if has_variants else [0] * count
    return [Encoded(*each[:2], variant=each[2]) for each in zip(ids, types, variants, strict=True)]


# The server's side


class _Engine:
    """One process. `start` first, then one `run` at a time."""

    def __init__(
        self,
        asked: ModelSettings | Resolution,
        faults: bool,
        phase: Callable[[str], None],
        died: Callable[["_Engine"], None],
    ) -> None:
        self._phase, self._died = phase, died
        self._here, self._there = socket.socketpair()
        level, log_format = logging_choice()
        if isinstance(asked, Resolution) and level == "INFO":
            level = "WARNING"  # the first process has told all of it already
        # Not daemonic: choosing a backend starts processes of its own.
        self._process = multiprocessing.get_context("spawn").Process(
            target=_child, args=(self._there, asked, faults, level, log_format), name="engine", daemon=False
        )
        self._answer: asyncio.Future[tuple[_Kind, bytes]] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self.alive = False

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    async def start(self) -> Described | None:
        """Until it is loaded and warm. Raises what the child refused with, or EngineDied."""
        with huge_pages_for_children():
            self._process.start()
        self._there.close()
        self.alive = True
        try:
            self._here.setblocking(False)
            reader, self._writer = await asyncio.open_connection(sock=self._here)
            self._answer = asyncio.get_running_loop().create_future()
            self._reading = asyncio.create_task(self._read(reader))
            kind, payload = await self._answer
        except BaseException:
            self.kill()
            raise
        content = pickle.loads(payload)  # noqa: S301 - of our own child
        if kind is _Kind.REFUSED:
            self.kill()
            raise content
        described: Described | None = content
        return described

    async def run(self, texts: Sequence[Encoded], limit_s: float) -> Output:
        """EngineDied if the process ends or takes longer than `limit_s`, which ends it; RuntimeError if it raised."""
        if self._writer is None or not self.alive:
            raise EngineDied("the process of the engine has ended")
        payload = pack_texts(texts)
        self._answer = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(_FRAME.pack(_Kind.RUN, len(payload)) + payload)
            async with asyncio.timeout(limit_s):
                kind, content = await self._answer
        except TimeoutError:
            self.kill()
            raise EngineDied(f"a batch ran for {limit_s:g} s (server.hang_timeout_ms): its process was ended") from None
        except asyncio.CancelledError:
            self.kill()  # its answer would be taken for that of the next batch
            raise
        if kind is _Kind.RAISED:
            raise RuntimeError(content.decode())
        count, dimension, started_at, ended_at = _ROWS.unpack_from(content)
        rows: NDArray[np.float32] = np.frombuffer(content, np.float32, offset=_ROWS.size).reshape(count, dimension)
        return Output(rows, started_at, ended_at)

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
        self.kill()
        await asyncio.to_thread(self._process.join)
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(EngineDied(f"the process of the engine ended ({self.end})"))
        self._died(self)

    @property
    def end(self) -> str:
        """How it ended."""
        code = self._process.exitcode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """At once, whatever it is doing."""
        self.alive = False
        if self._process.pid is not None:
            self._process.kill()
        (self._writer or self._here).close()


class ProcessWorker:
    """A process for each slot; one that ends is started anew. `start` first."""

    def __init__(self, *, hang_timeout_s: float, faults: bool) -> None:
        """faults: let the fake backend obey its fault words."""
        self._hang_timeout_s = hang_timeout_s
        self._faults = faults
        self._resolution: Resolution | None = None
        self._engines: set[_Engine] = set()
        # The last one to end a batch has the weights in its cache.
        self._idle: asyncio.LifoQueue[_Engine] = asyncio.LifoQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.slots = 0
        self.restarts = 0

    async def start(self, model: ModelSettings, phase: Callable[[str], None]) -> Described:
        """The first process chooses, checks and fills the caches; then the others load. ModelError if one cannot."""
        try:
            described = await self._launch(model, phase)
            assert described is not None  # noqa: S101 - the first one tells what it loaded
            self._resolution = described.resolution
            self.slots = described.resolution.model.streams
            phase(f"starting {self.slots} processes")
            await asyncio.gather(*(self._launch(self._resolution) for _ in range(self.slots - 1)))
        except EngineDied as error:
            self.close()
            raise ModelError(f"the model could not be loaded: {error}") from error
        except BaseException:
            self.close()
            raise
        return described

    async def _launch(
        self, asked: ModelSettings | Resolution, phase: Callable[[str], None] = lambda text: None
    ) -> Described | None:
        engine = _Engine(asked, self._faults, phase, self._replace)
        described = await engine.start()
        if self._closed:
            engine.kill()
        if not engine.alive:
            raise EngineDied(f"the process of the engine ended ({engine.end})")
        self._engines.add(engine)
        self._idle.put_nowait(engine)
        return described

    def _replace(self, dead: _Engine) -> None:
        """Called once for each process that has ended."""
        if dead in self._engines and not self._closed:
            log.error("a process of the engine ended (%s): starting a new one", dead.end)
            self.restarts += 1
            task = asyncio.create_task(self._launch_until_it_runs())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._engines.discard(dead)

    async def _launch_until_it_runs(self) -> None:
        for tries in itertools.count():
            try:
                assert self._resolution is not None  # noqa: S101 - `start` has set it
                await self._launch(self._resolution)
            except (EngineDied, StartError, OSError) as error:
                wait_s = min(2.0**tries, _MOST_BACKOFF_S)
                log.error("the engine did not start (%s): trying again in %.0f s", error, wait_s)
                await asyncio.sleep(wait_s)
            else:
                log.info("a new process of the engine runs")
                return

    async def run(self, rows: Sequence[Encoded]) -> Output:
        """Run one batch; waits while there is no process for it. Raises EngineDied, or RuntimeError if it raised."""
        engine = await self._idle.get()
        while not engine.alive:
            engine = await self._idle.get()
        try:
            return await engine.run(rows, self._hang_timeout_s)
        finally:
            if engine.alive:
                self._idle.put_nowait(engine)

    @property
    def pids(self) -> Sequence[int]:
        return [engine.pid for engine in self._engines if engine.alive]

    @property
    def trouble(self) -> str:
        return "" if self.pids else "no process of the engine runs; it is being started anew"

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for engine in list(self._engines):
            engine.kill()
