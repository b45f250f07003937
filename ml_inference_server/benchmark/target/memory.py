"""What the processes of a server hold in memory; GPU memory is not part of it."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from ml_inference_server.benchmark.result.document import Memory


class ProcessMemory(NamedTuple):
    """Of one process. What only Linux tells is None elsewhere.

    pss_bytes: of each page its part among all processes on the machine that map it. private_bytes: pages that no other
    process maps. peak_rss_bytes: the most that it held at a time.
    """

    pid: int
    rss_bytes: int
    pss_bytes: int | None
    private_bytes: int | None
    peak_rss_bytes: int | None


def memory_of_server(pid: int) -> Memory | None:
    """Of a server and all processes that it has started; None if it has ended."""
    found = list(memory_of_processes(pid))
    if not found or found[0].pid != pid:
        return None
    return Memory(
        processes=len(found),
        rss_bytes=sum(process.rss_bytes for process in found),
        pss_bytes=_sum(process.pss_bytes for process in found),
        peak_rss_bytes=_sum(process.peak_rss_bytes for process in found),
    )


def memory_of_processes(pid: int) -> Iterator[ProcessMemory]:
    """The process and its descendants; those that end meanwhile are left out."""
    try:
        root = psutil.Process(pid)
        processes = (root, *root.children(recursive=True))
    except psutil.Error:
        return
    for process in processes:
        with contextlib.suppress(psutil.Error):
            rss_bytes = process.memory_info().rss
            if not rss_bytes:  # it has ended, and nobody has asked how
                continue
            rollup, status = _kib(process.pid, "smaps_rollup"), _kib(process.pid, "status")
            private = [rollup.get(name) for name in ("Private_Clean", "Private_Dirty", "Private_Hugetlb")]
            yield ProcessMemory(
                process.pid, rss_bytes, _bytes(rollup.get("Pss")), _bytes(_sum(private)), _bytes(status.get("VmHWM"))
            )


def _kib(pid: int, name: str) -> dict[str, int]:
    """The fields of a file in /proc that are given in kB, which are KiB; none where it cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {
        key: int(value.removesuffix("kB")) for key, _, value in (x.partition(":") for x in lines) if value[-2:] == "kB"
    }


def _bytes(kib: int | None) -> int | None:
    return None if kib is None else kib * 1024


def _sum(values: Iterable[int | None]) -> int | None:
    """None if one of them is."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)
