"""How CPUs are divided among processes: machines as Linux describes them, and claims that the kernel keeps."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ml_inference_server.utils import cores
from ml_inference_server.utils.errors import ConfigError


def machine(root: Path, *, cores_of_cache: int, caches: int, threads: int = 1, packages: int = 1) -> Path:
    """CPUs numbered as Linux does as a rule: first one of each core, then the second ones."""
    count = cores_of_cache * caches
    for core in range(count):
        of_core = [core + count * thread for thread in range(threads)]
        first = core // cores_of_cache * cores_of_cache
        of_cache = ",".join(
            f"{first + count * thread}-{first + cores_of_cache - 1 + count * thread}" for thread in range(threads)
        )
        for number in of_core:
            folder = root / f"cpu{number}"
            for level in (1, 2, 3):
                index = folder / "cache" / f"index{level}"
                index.mkdir(parents=True)
                (index / "level").write_text(f"{level}\n")
                (index / "shared_cpu_list").write_text(of_cache if level == 3 else ",".join(map(str, of_core)))
            topology = folder / "topology"
            topology.mkdir()
            (topology / "physical_package_id").write_text(f"{core * packages // count}\n")
            (topology / "thread_siblings_list").write_text(",".join(map(str, of_core)) + "\n")
    return root


def test_a_group_is_what_shares_a_last_level_cache(tmp_path: Path) -> None:
    root = machine(tmp_path, cores_of_cache=8, caches=4, threads=2, packages=2)
    assert cores.groups(range(64), root) == 4
    assert cores.groups([0, 7, 32], root) == 1
    assert cores.groups([0, 8], root) == 2
    parts = cores.divided(range(64), 4, root)
    assert parts[0] == [*range(8), *range(32, 40)]
    assert parts[3] == [*range(24, 32), *range(56, 64)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 15, 16, 17, 32])
def test_every_cpu_has_one_owner_and_no_core_has_two(tmp_path: Path, count: int) -> None:
    root = machine(tmp_path, cores_of_cache=4, caches=4, threads=2)
    parts = cores.divided(range(32), count, root)
    assert sorted(cpu for part in parts for cpu in part) == list(range(32))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= (2 if count <= 16 else 1)
    if count <= 16:
        assert all({cpu % 16 for cpu in part} == {cpu % 16 for cpu in part if cpu < 16} for part in parts)
        assert len({(cpu % 16, place) for place, part in enumerate(parts) for cpu in part}) == 16


def test_more_parts_than_cpus_are_refused(tmp_path: Path) -> None:
    root = machine(tmp_path, cores_of_cache=2, caches=1)
    with pytest.raises(ConfigError, match="server.workers is 3, but this process may use 2 CPUs: lower it"):
        cores.divided([0, 1], 3, root)


def test_a_machine_that_tells_nothing_is_one_group_of_cores(tmp_path: Path) -> None:
    assert cores.groups([0, 1, 2, 3], tmp_path) == 1
    assert cores.divided([0, 1, 2, 3], 2, tmp_path) == [[0, 1], [2, 3]]


def test_only_the_cpus_of_this_process_are_divided(tmp_path: Path) -> None:
    root = machine(tmp_path, cores_of_cache=8, caches=1, threads=2)
    assert cores.divided([2, 3, 10, 11], 2, root) == [[2, 10], [3, 11]]


def test_lists_are_written_as_linux_writes_them() -> None:
    assert cores.listed([0, 1, 2, 3, 8, 10, 11]) == "0-3,8,10-11"
    assert cores.listed([]) == ""


CLAIM = """
import sys
from ml_inference_server.utils.cores import claimed
with claimed([1, 2], sys.argv[1]):
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_a_claim_holds_against_other_processes_until_its_own_is_killed() -> None:
    name = "ml-inference-server-test-claim"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", CLAIM, name]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "claimed\n"
            with (
                cores.claimed([0, 3], name),
                pytest.raises(ConfigError, match="has CPUs 1-2: start each server with"),
                cores.claimed([1, 2, 4], name),
            ):
                pytest.fail("two have the same CPUs")
            with cores.claimed([4], name):
                pass  # what was free is not kept by a claim that failed
        finally:
            other.kill()
        other.wait()
        with cores.claimed([1, 2], name):
            pass


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no processor affinity to set")
def test_threads_that_a_library_has_bound_are_free_afterwards() -> None:
    allowed = os.sched_getaffinity(0)
    bound, done = threading.Event(), threading.Event()

    def bind() -> None:
        os.sched_setaffinity(0, {min(allowed)})
        bound.set()
        done.wait()

    thread = threading.Thread(target=bind)
    try:
        with cores.threads_stay_free():
            thread.start()
            bound.wait()
            assert thread.native_id is not None
            assert os.sched_getaffinity(thread.native_id) == {min(allowed)}
        assert os.sched_getaffinity(thread.native_id) == allowed
    finally:
        done.set()
        thread.join()
