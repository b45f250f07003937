"""One piece of work in a process of its own: its crash, its memory and its thread settings end with it."""

import contextlib
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ml_inference_server.utils.child import begin_child
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError, StartError

log = logging.getLogger(__name__)
T = TypeVar("T")

# Loading, with an export and a quantisation that no cache holds yet. What takes longer hangs.
_LIMIT_S = 600.0
# Of what a library says, and of a name.
_MOST_CHARACTERS = 240


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


def one_line(error: BaseException) -> str:
    """What happened, in one line; an error that is not ours is named, and cut where it goes on for long."""
    if isinstance(error, StartError):
        return str(error)
    words = " ".join(str(error).split())
    short = words if len(words) <= _MOST_CHARACTERS else words[:_MOST_CHARACTERS] + "..."
    return f"{type(error).__name__}: {short}" if short else type(error).__name__


@contextlib.contextmanager
def start_errors(model: ModelSettings) -> Iterator[None]:
    """ModelError, in one line, for whatever a library raises over a model's files or too large a number."""
    try:
        yield
    except StartError:
        raise
    except Exception as error:
        log.debug("starting failed", exc_info=error)
        raise ModelError(
            f"model {shown(model.name)} cannot be started with backend {model.backend} ({one_line(error)}): check its "
            f"files and the model settings; --log-level DEBUG shows where it failed"
        ) from error


def shown(name: str) -> str:
    """A model's name or path as it can stand in a sentence."""
    return name if len(name) <= _MOST_CHARACTERS else name[:_MOST_CHARACTERS] + "..."
