"""A process that runs a backend: the child's side.

A bulk batch runs in a thread of its own, which gives way where both want the processor: others run beside it.
"""

import contextlib
import logging
import os
import pickle
import socket
import threading
import time
from queue import SimpleQueue

import numpy as np

from ml_inference_server.backends.base import Backend, enable_faults
from ml_inference_server.backends.startup.resolve import Resolution
from ml_inference_server.backends.startup.start import Described, load_resolved, start_backend
from ml_inference_server.server.engine_frames import ROWS_HEAD, FrameKind, receive_frame, send_frame, unpack_batch
from ml_inference_server.utils.child import begin_child
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import StartError
from ml_inference_server.utils.give_way import give_way
from ml_inference_server.utils.logging import LogFormat, set_up_logging

log = logging.getLogger(__name__)


class _Child:
    """Reads questions, and answers all but bulk batches at once."""

    def __init__(self, connection: socket.socket, backend: Backend) -> None:
        self._connection, self._backend = connection, backend
        self._sends = threading.Lock()
        self._bulk: SimpleQueue[tuple[int, bytes]] = SimpleQueue()

    def answer_all(self) -> None:
        """Until the other side closes."""
        threading.Thread(target=self._answer_bulk, name="bulk", daemon=True).start()
        with contextlib.suppress(EOFError, ConnectionError), self._connection.makefile("rb") as stream:
            while True:
                kind, question, request = receive_frame(stream)
                if kind is FrameKind.RUN_BULK:
                    self._bulk.put((question, request))
                elif kind is FrameKind.PING:
                    self._send(FrameKind.PONG, b"", question)
                else:
                    self._run(question, request)

    def _answer_bulk(self) -> None:
        give_way()
        with contextlib.suppress(ConnectionError):
            while True:
                self._run(*self._bulk.get())

    def _run(self, question: int, request: bytes) -> None:
        self._send(*_answer(self._backend, request), question)

    def _send(self, kind: FrameKind, payload: bytes, question: int) -> None:
        with self._sends:
            send_frame(self._connection, kind, payload, question)


def run_child(
    connection: socket.socket, asked: ModelSettings | Resolution, faults: bool, log_level: str, log_format: LogFormat
) -> None:
    """Load, say so, and answer batches until the other side closes. `asked`: a resolution was checked before."""
    begin_child()
    set_up_logging(log_level, log_format)
    connection.setblocking(True)
    try:
        backend, described = _load(asked, connection)
        if faults:
            enable_faults(backend)
    except StartError as error:
        send_frame(connection, FrameKind.REFUSED, pickle.dumps(error))
        return
    send_frame(connection, FrameKind.READY, pickle.dumps(described))
    _Child(connection, backend).answer_all()
    os._exit(0)  # threads of a library must not keep it


def _load(asked: ModelSettings | Resolution, connection: socket.socket) -> tuple[Backend, Described | None]:
    if isinstance(asked, Resolution):
        return load_resolved(asked, lambda done, total: None), None
    started = start_backend(
        asked,
        phase=lambda text: send_frame(connection, FrameKind.PHASE, text.encode()),
        loaded=lambda resolution: send_frame(connection, FrameKind.LOADED, pickle.dumps(resolution)),
    )
    return started.backend, started.described()


def _answer(backend: Backend, request: bytes) -> tuple[FrameKind, bytes]:
    started_at = time.monotonic()
    try:
        rows = np.ascontiguousarray(backend.infer(unpack_batch(request)), np.float32)
        head = ROWS_HEAD.pack(len(rows), rows.shape[1], started_at, time.monotonic())
        return FrameKind.ROWS, head + rows.tobytes()
    except Exception as error:
        log.debug("a batch raised", exc_info=error)
        return FrameKind.RAISED, f"{type(error).__name__}: {error}".encode(errors="replace")
