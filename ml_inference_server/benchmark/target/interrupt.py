"""Ctrl-C, SIGTERM and a hang-up as something that a coroutine can be raced against."""

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ml_inference_server.benchmark.load.loops import event_loop
from ml_inference_server.utils.errors import EXIT_HUNG_UP, EXIT_INTERRUPTED, EXIT_TERMINATED, StartError
from ml_inference_server.utils.process import begin_process, hangup_signal, leave_dead_streams

T = TypeVar("T")


class Interrupted(Exception):
    """The user or the system asked for the end; what was measured so far is still good."""

    def __init__(self, exit_code: int = EXIT_INTERRUPTED) -> None:
        super().__init__("interrupted")
        self.exit_code = exit_code


class Stop:
    """Set by the first SIGINT, SIGTERM or SIGHUP; the second one means at once."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.at_once = asyncio.Event()
        self.exit_code = EXIT_INTERRUPTED

    def listen(self) -> None:
        """Take over the signals for the rest of the running loop's life."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self.request, EXIT_INTERRUPTED)
        loop.add_signal_handler(signal.SIGTERM, self.request, EXIT_TERMINATED)
        if (hangup := hangup_signal()) is not None:
            loop.add_signal_handler(hangup, self._hang_up)

    def _hang_up(self) -> None:
        leave_dead_streams()
        if not self.requested.is_set():  # a shell and its terminal may both send one
            self.request(EXIT_HUNG_UP)

    def request(self, exit_code: int) -> None:
        if self.requested.is_set():
            self.at_once.set()
            return
        self.exit_code = exit_code
        self.requested.set()

    async def race(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; Interrupted, with `work` cancelled and ended, when the stop comes first."""
        task = asyncio.create_task(work)
        stopped = asyncio.create_task(self.requested.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Interrupted(self.exit_code)
        finally:
            stopped.cancel()
            task.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)


def run_stoppable(work: Callable[[Stop], Coroutine[Any, Any, int]]) -> int:
    """Run `work` with the signals under control; every expected failure is one line on stderr and its exit code."""

    async def listening() -> int:
        stop = Stop()
        stop.listen()
        return await work(stop)

    try:
        begin_process()
        with asyncio.Runner(loop_factory=event_loop) as runner:
            return runner.run(listening())
    except StartError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as interrupted:
        print("Interrupted before anything was measured.", file=sys.stderr)
        return interrupted.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
