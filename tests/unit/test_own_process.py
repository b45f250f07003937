"""Work in a process of its own: whatever happens there comes back as an answer or as one sentence."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from ml_inference_server.backends.startup.own_process import OwnProcess, in_own_process
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError


def identity(model: ModelSettings) -> tuple[int, str]:
    return os.getpid(), model.name


def die(model: ModelSettings) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count(model: ModelSettings) -> Iterator[tuple[int, int]]:
    for number in range(2):
        yield number, os.getpid()
    raise ModelError("no more")


def hang(model: ModelSettings) -> None:
    threading.Event().wait()


def refuse(model: ModelSettings) -> None:
    raise ModelError("not this one") if model.backend == "fake" else ValueError("odd\nmore of it")


@pytest.mark.slow
def test_work_is_done_in_another_process() -> None:
    pid, name = in_own_process(identity, ModelSettings(name="x"))
    assert (pid != os.getpid(), name) == (True, "x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "backend", "message"),
    [
        (die, "fake", "its process died with exit code -9"),
        (refuse, "fake", "^not this one$"),
        (refuse, "pytorch", "^ValueError: odd more of it$"),
    ],
)
def test_a_failure_in_the_process_is_told_and_does_not_spread(
    work: Callable[[ModelSettings], None], backend: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        in_own_process(work, ModelSettings(backend=backend))


@pytest.mark.slow
def test_a_process_that_hangs_is_ended() -> None:
    before = multiprocessing.active_children()
    with pytest.raises(ModelError, match="no answer after 0 s"):
        in_own_process(hang, ModelSettings(), limit_s=0.01)
    assert multiprocessing.active_children() == before


@pytest.mark.slow
def test_work_stands_still_until_it_is_asked_again() -> None:
    with OwnProcess(count, ModelSettings()) as process:
        (first, pid), (second, same) = process.ask(), process.ask()
        assert (first, second, same) == (0, 1, pid)
        with pytest.raises(ModelError, match="no more"):
            process.ask()
    assert not multiprocessing.active_children()
