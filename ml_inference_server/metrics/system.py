"""What the server's processes and the machine use: CPU, memory, GPU memory."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

SAMPLE_EVERY_S = 1.0


@dataclass(frozen=True)
class SystemFigures:
    """One sample. CPU figures cover the time since the sample before; in the first one, since the process (or the
    machine) started."""

    cpu_percent: float  # of the server's processes; 100 is one core kept busy
    machine_cpu_percent: float  # of all cores together, 0..100
    cpu_count: int  # logical CPUs of the machine
    cpu_seconds: float  # of the server's processes, since they started
    rss_bytes: int  # of the server's processes
    gpu: dict[str, Any] | None


class SystemSampler:
    """Takes a sample when the last one is older than SAMPLE_EVERY_S, and repeats the last one otherwise.

    pids: which processes, besides this one, belong to the server now.
    """

    def __init__(self, now_s: float) -> None:
        self.pids: Callable[[], Sequence[int]] = tuple
        self._process = psutil.Process()
        self._others: dict[int, psutil.Process] = {}
        self._others_cpu_s: dict[int, float] = {}  # also of those that have ended: a counter must not fall
        self._sampled_s = now_s - max(time.time() - self._process.create_time(), SAMPLE_EVERY_S)
        self._cpu_seconds = self._machine_busy_s = self._machine_total_s = 0.0
        self._machine_percent = 0.0
        self._cpu_count = psutil.cpu_count() or 1
        self._figures = self._take(now_s)

    def sample(self, now_s: float) -> SystemFigures:
        if now_s - self._sampled_s >= SAMPLE_EVERY_S:
            self._figures = self._take(now_s)
        return self._figures

    def _take(self, now_s: float) -> SystemFigures:
        others_rss_bytes, earlier_cpu_s = self._look_at_others()
        cpu_seconds = time.process_time() + sum(self._others_cpu_s.values())
        percent = 100 * (cpu_seconds - earlier_cpu_s - self._cpu_seconds) / (now_s - self._sampled_s)
        self._sampled_s, self._cpu_seconds = now_s, cpu_seconds
        return SystemFigures(
            cpu_percent=percent,
            machine_cpu_percent=self._machine_cpu_percent(),
            cpu_count=self._cpu_count,
            cpu_seconds=cpu_seconds,
            rss_bytes=self._process.memory_info().rss + others_rss_bytes,
            gpu=gpu_figures(sys.modules.get("torch")),
        )

    def _look_at_others(self) -> tuple[int, float]:
        """Notes their CPU time; their resident memory, and what those seen for the first time had computed before."""
        rss_bytes, earlier_cpu_s = 0, 0.0
        for pid in self.pids():
            with contextlib.suppress(psutil.Error):  # it has just ended
                process = self._others.setdefault(pid, psutil.Process(pid))
                cpu_s = sum(process.cpu_times()[:2])
                earlier_cpu_s += 0.0 if pid in self._others_cpu_s else cpu_s
                self._others_cpu_s[pid] = cpu_s
                rss_bytes += process.memory_info().rss
        return rss_bytes, earlier_cpu_s

    def _machine_cpu_percent(self) -> float:
        times = psutil.cpu_times()
        # Linux counts the guests' time inside user and nice as well.
        total_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        busy_s = total_s - times.idle - getattr(times, "iowait", 0.0)
        spent_s, busy_spent_s = total_s - self._machine_total_s, busy_s - self._machine_busy_s
        if spent_s > 0:  # the kernel's counters move in hundredths of a second
            self._machine_percent = min(100.0, max(0.0, 100 * busy_spent_s / spent_s))
            self._machine_total_s, self._machine_busy_s = total_s, busy_s
        return self._machine_percent


def gpu_figures(torch: Any) -> dict[str, Any] | None:
    """GPU memory by `torch` (the loaded module, or None); None where no GPU is in use.

    {"kind", "name", "memory_bytes", "reserved_bytes", "total_bytes"}: what tensors hold, what the allocator holds for
    them, and what there is. CUDA is asked only once something runs on it, because asking would take memory there.
    """
    # A module that another thread is still importing lacks its later attributes.
    cuda, mps = getattr(torch, "cuda", None), getattr(torch, "mps", None)
    is_initialized = getattr(cuda, "is_initialized", None)
    if cuda is not None and is_initialized is not None and is_initialized():
        properties = cuda.get_device_properties(cuda.current_device())
        return {
            "kind": "cuda",
            "name": properties.name,
            "memory_bytes": cuda.memory_allocated(),
            "reserved_bytes": cuda.memory_reserved(),
            "total_bytes": properties.total_memory,
        }
    backend = getattr(getattr(torch, "backends", None), "mps", None)
    if mps is not None and backend is not None and backend.is_available():
        allocated_bytes = mps.current_allocated_memory()
        if allocated_bytes:
            return {
                "kind": "mps",
                "name": "Apple GPU",
                "memory_bytes": allocated_bytes,
                "reserved_bytes": mps.driver_allocated_memory(),
                "total_bytes": mps.recommended_max_memory(),
            }
    return None
