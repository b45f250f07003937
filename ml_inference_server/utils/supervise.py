"""Keeps a server running: starts it again when it crashes, hangs, or says that only a new process can help."""

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

from ml_inference_server.utils.errors import (
    EXIT_CONFIG,
    EXIT_HUNG_UP,
    EXIT_INTERRUPTED,
    EXIT_MODEL,
    EXIT_OK,
    EXIT_PORT,
    EXIT_TERMINATED,
)
from ml_inference_server.utils.process import hangup_signal

log = logging.getLogger(__name__)

HEARTBEAT_FLAG = "--heartbeat"
HEARTBEAT_EVERY_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
# After a life of that length the next fault is the first one again.
_SOUND_LIFE_S = 60.0
# Somebody stopped the server itself, or nothing will be better the next time.
_FINAL = (EXIT_OK, EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_HUNG_UP)
# Final at the first start. Later ones are tried again: a port or a device may be held a moment longer.
_FINAL_AT_FIRST = (EXIT_MODEL, EXIT_PORT)


Equipment = Callable[[], AbstractContextManager[tuple[Sequence[str], Sequence[int]]]]
"""Made for each life: further arguments, and descriptors that the process inherits. Left once it has begun."""


class KeptProcess:
    """Runs `command` until it ends for good or is told to stop. `run` may have a thread of its own.

    The command gets HEARTBEAT_FLAG and a descriptor into which it writes something every HEARTBEAT_EVERY_S; once it has
    begun, a silence of `silence_s` ends it. ready_file: removed after a life that could not do so itself. name: in the
    log. final, final_at_first: exit codes after which it is not started again.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        ready_file: Path | None = None,
        exit_with_parent: bool = False,
        silence_s: float = 60.0,
        first_pause_s: float = _FIRST_PAUSE_S,
        name: str = "the server",
        final: Sequence[int] = _FINAL,
        final_at_first: Sequence[int] = _FINAL_AT_FIRST,
        equipment: Equipment = lambda: contextlib.nullcontext(((), ())),
    ) -> None:
        self._command = command
        self._ready_file = ready_file
        self._parent = os.getppid() if exit_with_parent else None
        self._silence_s = silence_s
        self._first_pause_s = first_pause_s
        self._name = name
        self._final, self._final_at_first = final, final_at_first
        self._equipment = equipment
        self._asked = threading.Event()
        self._signal = signal.SIGTERM
        self._child: subprocess.Popen[bytes] | None = None
        self.restarts = 0

    def run(self) -> int | None:
        """The exit code of the last life; None where it was told to stop between two of them."""
        pause_s, has_served = self._first_pause_s, False
        while True:
            began_at = time.monotonic()
            code = self._live()
            if self._asked.is_set() or code in self._final or (code in self._final_at_first and not has_served):
                return code if code >= 0 else 128 - code
            has_served = True
            if time.monotonic() - began_at > _SOUND_LIFE_S:
                pause_s = self._first_pause_s
            log.error("%s ended (%s): starting it again in %.3g s", self._name, _end(code), pause_s)
            if self._asked.wait(pause_s):
                return None
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            self.restarts += 1

    def stop(self, number: signal.Signals) -> None:
        """Send it the signal, and start it no more."""
        self._signal = number
        self._asked.set()
        if self._child is not None:
            self._child.send_signal(number)

    def _live(self) -> int:
        """One life of the process; its exit code, or minus the signal that ended it."""
        beats, its_end = os.pipe()
        os.set_blocking(its_end, False)
        try:
            with self._equipment() as (arguments, descriptors):
                # In a session of its own: a signal of the terminal comes through here, and once.
                self._child = child = subprocess.Popen(
                    [*self._command, *arguments, HEARTBEAT_FLAG, str(its_end)],
                    pass_fds=(its_end, *descriptors),
                    start_new_session=True,
                )
            os.close(its_end)
            if self._asked.is_set():
                child.send_signal(self._signal)
            self._listen(child, beats)
            code = child.wait()
        finally:
            self._child = None
            os.close(beats)
        if self._ready_file is not None:
            self._ready_file.unlink(missing_ok=True)
        return code

    def _listen(self, child: subprocess.Popen[bytes], beats: int) -> None:
        """Until the process has ended, or was ended for its silence."""
        has_begun, silent_s = False, 0.0
        while True:
            looked_at = time.monotonic()
            ready, _, _ = select.select([beats], [], [], HEARTBEAT_EVERY_S)
            if ready:
                if not os.read(beats, 4096):
                    return
                has_begun, silent_s = True, 0.0
            elif has_begun:
                # Time in which this process stood still, and the other one perhaps with it, does not count.
                silent_s += min(time.monotonic() - looked_at, 2 * HEARTBEAT_EVERY_S)
                if silent_s > self._silence_s:
                    log.critical("%s has been silent for %.3g s: it is ended", self._name, silent_s)
                    child.kill()
                    return
            if self._parent is not None and os.getppid() != self._parent and not self._asked.is_set():
                self.stop(signal.SIGTERM)


class Supervisor:
    """Keeps one server running in this process's main thread, and hands its signals on; for the rest a KeptProcess."""

    def __init__(self, command: Sequence[str], **how: Any) -> None:
        self._kept = KeptProcess(command, **how)
        self._signal = signal.SIGTERM

    def run(self) -> int:
        """The exit code of the server."""
        for number in filter(None, (signal.SIGTERM, signal.SIGINT, hangup_signal())):
            signal.signal(number, self._forward)
        code = self._kept.run()
        return 128 + self._signal if code is None else code

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        self._kept.stop(self._signal)


def supervised_command(flag: str) -> list[str]:
    """This process's own command without `flag`, for a child that ends with this one."""
    rest = [each for each in sys.orig_argv[1:] if not (flag.startswith(each) and len(each) > len("--s"))]
    return [sys.executable, *rest, "--exit-with-parent"]


def beat(descriptor: int) -> None:
    """Say to the supervisor that the event loop turns. Nothing happens where nobody listens any more."""
    with contextlib.suppress(OSError):
        os.write(descriptor, b".")


def _end(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
