"""What the processes that we start need: memory in huge pages, and an end when they are no longer wanted."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator

from tqdm import tqdm

# glibc's malloc then asks for huge pages. A batch reads all weights; with pages of 4 KiB the processor spends a few
# percent of its time on looking up where they lie (docs/performance.md). Other C libraries do not read this.
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def has_huge_pages() -> bool:
    """Whether this process was started with them."""
    return _HUGE_PAGES in os.environ.get(_TUNABLES, "").split(":")


@contextlib.contextmanager
def huge_pages_for_children() -> Iterator[None]:
    """Processes started inside get them, if their C library and kernel can."""
    before = os.environ.get(_TUNABLES)
    os.environ[_TUNABLES] = ":".join(filter(None, (before, _HUGE_PAGES)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TUNABLES]
        else:
            os.environ[_TUNABLES] = before


def begin_child() -> None:
    """Leave the signals that may go to the whole group to the parent; end when the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Else libraries make one that is shared between processes, which is reported as leaked once this one is killed.
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    """The server may end without a farewell; nobody waits for the answer then."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
