"""How much processor may be used: quota files as cgroup v2, v1 and a bare machine have them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ml_inference_server.utils import cpu


def cgroup(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "50000 100000\n", "cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "250000\n"}, None),
        ({"cpu.max": ""}, None),
        ({"cpu.max": "rubbish 1\n"}, None),
        ({}, None),
    ],
)
def test_quota_is_read_from_either_cgroup_version(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu.quota_cpus(cgroup(tmp_path, files), tmp_path / "a system that does not tell") == quota


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        # A unit of systemd with CPUQuota=, in a slice that has a larger one, or a smaller one.
        ("0::/a.slice/b\n", {"a.slice/b/cpu.max": "200000 100000", "a.slice/cpu.max": "400000 100000"}, 2),
        ("0::/a.slice/b\n", {"a.slice/b/cpu.max": "400000 100000", "a.slice/cpu.max": "50000 100000"}, 0.5),
        ("0::/a.slice/b\n", {"a.slice/b/cpu.max": "max 100000", "a.slice/cpu.max": "max 100000"}, None),
        # The groups of others.
        ("0::/a.slice/b\n", {"a.slice/c/cpu.max": "50000 100000", "cpu.max": "max 100000"}, None),
        # A container of version 1: the path is that of the host, the files are its own.
        (
            "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000", "memory/cpu.max": "1 100000"},
            1.5,
        ),
        ("2:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 0.5),
        ("rubbish\n", {"cpu.max": "150000 100000"}, 1.5),
    ],
)
def test_the_least_quota_of_the_groups_that_hold_this_process_counts(
    tmp_path: Path, own: str, files: dict[str, str], quota: float | None
) -> None:
    (tmp_path / "own").write_text(own)
    assert cpu.quota_cpus(cgroup(tmp_path / "root", files), tmp_path / "own") == quota


def test_available_cpus_is_the_smaller_of_quota_and_affinity(tmp_path: Path) -> None:
    everything = cpu.available_cpus(tmp_path)
    assert 1 <= everything <= (os.cpu_count() or 1)
    assert cpu.available_cpus(cgroup(tmp_path / "a", {"cpu.max": "1000 100000"})) == 1, "never none at all"
    assert cpu.available_cpus(cgroup(tmp_path / "b", {"cpu.max": "99999999 100000"})) == everything
    assert cpu.available_cpus(cgroup(tmp_path / "c", {"cpu.max": "150000 100000"})) == min(2, everything), "rounded up"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_affinity_counts_not_the_hosts_cores(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from ml_inference_server.utils.cpu import available_cpus; print(available_cpus(pathlib.Path(sys.argv[1])))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert told.stdout == "1\n"


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"avx2", "avx512f", "avx512_vnni", "amx_tile"}, "AMX"),
        ({"avx2", "avx512f", "avx512_vnni"}, "AVX-512 VNNI"),
        ({"avx2", "avx512f"}, "AVX-512"),
        ({"avx2", "avx_vnni"}, "AVX-VNNI"),
        ({"sse4_2", "avx2"}, "AVX2"),
        ({"asimd", "bf16"}, "NEON"),
    ],
)
def test_the_widest_extension_is_named(flags: set[str], name: str) -> None:
    assert cpu.instruction_set(frozenset(flags)) == name


def test_without_known_flags_the_architecture_is_named() -> None:
    import platform

    bare = cpu.instruction_set(frozenset())
    assert bare == ("NEON" if platform.machine() in ("arm64", "aarch64") else platform.machine())


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ({"amx_bf16", "amx_tile"}, True),
        ({"avx512_bf16"}, True),
        ({"bf16", "asimd"}, True),
        ({"avx512f", "avx512_vnni"}, False),
        (set(), False),
    ],
)
def test_native_bf16_is_told_by_the_flags(flags: set[str], native: bool) -> None:
    assert cpu.has_native_bf16(frozenset(flags)) is native


@pytest.mark.parametrize(
    ("flags", "can"),
    [
        ({"avx2", "fma", "avx512bw", "avx512_vnni"}, True),
        ({"avx2", "fma"}, True),
        ({"avx", "fma"}, False),
        ({"asimd", "asimddp"}, True),
        ({"asimd", "asimddp", "i8mm"}, True),
        ({"neon", "feat_dotprod"}, True),
        ({"neon", "feat_dotprod", "feat_i8mm"}, True),
        ({"asimd", "asimdhp", "bf16"}, False),
    ],
)
def test_int8_operators_are_told_by_the_flags(flags: set[str], can: bool) -> None:
    assert cpu.has_int8_vectors(frozenset(flags)) is can


def test_what_a_mac_lists_with_a_zero_it_has_not() -> None:
    """As an M1 tells it: dot products, but no matrix products."""
    listed = (
        "kern.ostype: Darwin\nhw.optional.neon: 1\nhw.optional.arm.FEAT_DotProd: 1\n"
        "hw.optional.arm.FEAT_I8MM: 0\nhw.optional.arm.caps: 868066517 # 1\nmachdep.user_idle_level: 0\n"
    )
    assert cpu.mac_flags(listed) == {"neon", "feat_dotprod", "caps"}


def test_this_machine_can_be_described() -> None:
    assert cpu.cpu_name()
    assert cpu.instruction_set()
    if Path("/proc/cpuinfo").exists():
        assert cpu.cpu_flags()
