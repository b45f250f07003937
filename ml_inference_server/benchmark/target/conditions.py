"""What else went on while a row was measured: steal time, other programs, clock, heat."""

from pathlib import Path
from typing import Any

import psutil

from ml_inference_server.benchmark.result.document import MachineConditions

STEAL_SHARE = 0.02
OTHERS_SHARE = 0.10
CLOCK_DROP = 0.85


class Conditions:
    """Begins when it is made; `end` says what happened since. server_pid: of a server on this machine."""

    def __init__(self, server_pid: int | None) -> None:
        self._server_pid = server_pid
        self._server_cpu_s = process_cpu_s(server_pid)
        self._times = psutil.cpu_times()
        self._throttled = _throttle_count()
        self._clock_mhz = _clock_mhz()

    def end(self, client_cpu_s: float) -> MachineConditions:
        """steal_share, others_share: of all CPU time of the machine, 0..1; None where the system does not tell, and
        for what lasted less than a tick of its CPU clock (10 ms on Linux).

        client_cpu_s: what the benchmark itself used in between.
        """
        server_cpu_s = process_cpu_s(self._server_pid)
        ours_cpu_s = None
        if server_cpu_s is not None and self._server_cpu_s is not None:
            ours_cpu_s = client_cpu_s + server_cpu_s - self._server_cpu_s
        now, before = psutil.cpu_times(), self._times
        total_s = _total(now) - _total(before)
        steal = getattr(now, "steal", None)
        stolen_s = None if steal is None else steal - before.steal
        busy_s = total_s - sum(
            getattr(now, name, 0.0) - getattr(before, name, 0.0) for name in ("idle", "iowait", "steal")
        )
        after_mhz, throttled = _clock_mhz(), _throttle_count()
        return MachineConditions(
            steal_share=None if stolen_s is None or total_s <= 0 else round(stolen_s / total_s, 4),
            others_share=None
            if ours_cpu_s is None or total_s <= 0
            else round(max(busy_s - ours_cpu_s, 0) / total_s, 4),
            clock_mhz=(self._clock_mhz, after_mhz) if self._clock_mhz and after_mhz else None,
            throttled=None if throttled is None or self._throttled is None else throttled - self._throttled,
        )


def trouble(conditions: MachineConditions) -> dict[str, tuple[float, str]]:
    """What of it casts doubt on the row: kind -> (how bad, in words)."""
    found: dict[str, tuple[float, str]] = {}
    steal, others = conditions.steal_share or 0.0, conditions.others_share or 0.0
    if steal > STEAL_SHARE:
        found["steal"] = (steal, f"the host took {steal:.0%} of the CPU time away (steal)")
    if others > OTHERS_SHARE:
        found["others"] = (others, f"other programs used {others:.0%} of the machine")
    if conditions.throttled:
        times = conditions.throttled
        found["heat"] = (times, f"the CPU was throttled for heat {times} times")
    clock = conditions.clock_mhz
    if clock and clock[1] < clock[0] * CLOCK_DROP:
        fell = 1 - clock[1] / clock[0]
        found["clock"] = (fell, f"the CPU's clock fell from {clock[0]:.0f} to {clock[1]:.0f} MHz")
    return found


def process_cpu_s(pid: int | None) -> float | None:
    """What a process and its children have used so far; None where it cannot be told."""
    if not pid:
        return None
    total_s = 0.0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            times = process.cpu_times()
            total_s += times.user + times.system
    except psutil.Error:
        return None
    return total_s


def _total(times: Any) -> float:
    # guest times are part of user and nice already
    return float(sum(value for name, value in times._asdict().items() if not name.startswith("guest")))


def _clock_mhz() -> float | None:
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        return None
    return round(frequency.current, 1) if frequency and frequency.current else None


def _throttle_count() -> int | None:
    """Events since the start of the machine, over all cores; None where the kernel does not count them."""
    counts = []
    for file in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        try:
            counts.append(int(file.read_text()))
        except (OSError, ValueError):
            continue
    return sum(counts) if counts else None
