"""One piece of work in a process of its own: its crash, its memory and its thread settings end with it."""

import logging
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ml_inference_server.backends.files.model_errors import one_line
from ml_inference_server.utils.child import begin_child
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)
T = TypeVar("T")

# Loading, with an export and a quantisation that no cache holds yet. What takes longer hangs.
_LIMIT_S = 600.0


def in_own_process(work: Callable[[ModelSettings], T], model: ModelSettings, limit_s: float = _LIMIT_S) -> T:
    """What `work` returns. ModelError if it raises, kills its process or takes longer than `limit_s`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, work, model), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(limit_s):
            raise ModelError(f"no answer after {limit_s:.0f} s")
        succeeded, result = here.recv()
    except EOFError:
        process.join()
        raise ModelError(f"its process died with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        here.close()
    if not succeeded:
        raise ModelError(result)
    answer: T = result
    return answer


def _child(connection: Connection, work: Callable[[ModelSettings], Any], model: ModelSettings) -> None:
    begin_child()
    try:
        connection.send((True, work(model)))
    except Exception as error:
        connection.send((False, one_line(error)))
