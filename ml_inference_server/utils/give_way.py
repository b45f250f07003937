"""Threads that leave the processor to others where both want it."""

import contextlib
import os
import sys
import threading

# Of the processor's time beside a thread of the normal priority, a tenth (kernel/sched/core.c, sched_prio_to_weight).
_NICER = 10
_NICEST = 19


def give_way() -> None:
    """From now on the calling thread, and threads that it starts, get what others leave: Linux has this per thread.

    There is no way back without a right that a server should not have. Elsewhere nothing happens.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, min(_NICEST, os.getpriority(os.PRIO_PROCESS, thread) + _NICER))
