"""How much processor this process may really use, and what its instruction set can do."""

import math
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

SHARE_VARIABLE = "ML_INFERENCE_SERVER_CPU_SHARE"
"""In the environment of a process that has no CPUs of its own: on how many of them it may count."""


def quota_cpus(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The cgroup's CPU quota in CPUs, or None where there is no limit: the least of its own and those above it.

    own: the cgroups of this process, as cgroups(7) describes the file. Both versions of cgroups are looked at. A
    container may see its own group as the root, whatever `own` says.
    """
    found = []
    for controllers, path in _cgroups(own):
        if not controllers:
            base, read = root, _quota_v2
        elif "cpu" in controllers.split(","):
            base, read = root / "cpu", _quota_v1
        else:
            continue
        group = base / path.lstrip("/")
        found += [read(folder) for folder in (group, *group.parents) if folder.is_relative_to(base)]
    return min((quota for quota in found if quota is not None), default=None)


def _cgroups(own: Path) -> list[tuple[str, str]]:
    """(controllers, path) of each, and of the root of both versions."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    return [("", "/"), ("cpu", "/"), *((line[1], line[2]) for line in lines if len(line) == 3)]


def _quota_v2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(group: Path) -> float | None:
    try:
        limit = int((group / "cpu.cfs_quota_us").read_text())
        return None if limit <= 0 else limit / int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None


def available_cpus(root: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: the smallest of affinity, cgroup quota (rounded up) and share, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota, share = quota_cpus(root), int(os.environ.get(SHARE_VARIABLE, affinity))
    return max(1, min(affinity, share, affinity if quota is None else math.ceil(quota)))


@cache
def cpu_flags() -> frozenset[str]:
    """Feature flags as the operating system names them; empty where it does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    if platform.system() == "Darwin":
        listed = subprocess.run(["sysctl", "-a"], capture_output=True, text=True, check=False, timeout=10).stdout
        return mac_flags(listed)
    return frozenset()


def mac_flags(listed: str) -> frozenset[str]:
    """Of `sysctl -a`: what this processor has. Newer features stand there with a 0 where it lacks them."""
    lines = (line.split(":", 1) for line in listed.splitlines() if line.startswith("hw.optional."))
    return frozenset(name.rsplit(".", 1)[-1].lower() for name, value in lines if value.strip() != "0")


def instruction_set(flags: frozenset[str] | None = None) -> str:
    """The widest extension that matters here, from AMX down to AVX2, NEON, or the bare architecture."""
    have = cpu_flags() if flags is None else flags
    for flag, name in (
        ("amx_tile", "AMX"),
        ("avx512_vnni", "AVX-512 VNNI"),
        ("avx512f", "AVX-512"),
        ("avx_vnni", "AVX-VNNI"),
        ("avx2", "AVX2"),
        ("asimd", "NEON"),
        ("neon", "NEON"),
    ):
        if flag in have:
            return name
    return "NEON" if platform.machine() in ("arm64", "aarch64") else platform.machine()


def has_native_bf16(flags: frozenset[str] | None = None) -> bool:
    """Whether BF16 matrix products run in hardware; without it they are many times slower than FP32."""
    have = cpu_flags() if flags is None else flags
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & have)


def has_int8_vectors(flags: frozenset[str] | None = None) -> bool:
    """Whether the operators of our own can compute INT8: they are written for AVX2, what came after it, and ARM."""
    have = cpu_flags() if flags is None else flags
    # ARM's products of bytes as Linux and as macOS name them.
    return {"avx2", "fma"} <= have or bool({"asimddp", "i8mm", "feat_dotprod", "feat_i8mm"} & have)


@cache
def cpu_name() -> str:
    """The processor's name for people."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    return platform.processor() or platform.machine()
