"""Work in a process of its own: its crash, its memory and its thread settings end with it."""

import contextlib
import functools
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from ml_inference_server.backends.files.model_errors import one_line
from ml_inference_server.utils.child import begin_child
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)
T = TypeVar("T")

# Loading, with an export and a quantisation that no cache holds yet. What takes longer hangs.
_LIMIT_S = 600.0


class OwnProcess(Generic[T]):
    """Runs `work(model)`, which gives one result each time that it is asked, and stands still in between."""

    def __init__(self, work: Callable[[ModelSettings], Iterator[T]], model: ModelSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_child, args=(there, work, model), daemon=True)
        self._process.start()
        there.close()
        self._is_asked = False

    def begin(self) -> None:
        """Let it work on the next result, for which `ask` is called later."""
        with contextlib.suppress(OSError):  # it has died: `ask` says so
            self._connection.send(None)
        self._is_asked = True

    def ask(self, limit_s: float = _LIMIT_S) -> T:
        """The next result. ModelError if `work` raises, kills its process or takes longer than `limit_s`."""
        if not self._is_asked:
            self.begin()
        self._is_asked = False
        try:
            if not self._connection.poll(limit_s):
                raise ModelError(f"no answer after {limit_s:.0f} s")
            succeeded, result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ModelError(f"its process died with exit code {self._process.exitcode}") from None
        if not succeeded:
            raise ModelError(result)
        answer: T = result
        return answer

    def close(self) -> None:
        """End the process. A second time does nothing."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def __enter__(self) -> "OwnProcess[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def in_own_process(work: Callable[[ModelSettings], T], model: ModelSettings, limit_s: float = _LIMIT_S) -> T:
    """What `work` returns. ModelError if it raises, kills its process or takes longer than `limit_s`."""
    with OwnProcess(functools.partial(_once, work), model) as process:
        return process.ask(limit_s)


def _once(work: Callable[[ModelSettings], T], model: ModelSettings) -> Iterator[T]:
    yield work(model)


def _child(connection: Connection, work: Callable[[ModelSettings], Iterator[Any]], model: ModelSettings) -> None:
    begin_child()
    results: Iterator[Any] | None = None
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        try:
            results = work(model) if results is None else results
            connection.send((True, next(results)))
        except Exception as error:
            connection.send((False, one_line(error)))
