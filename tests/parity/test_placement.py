"""Where engines run: on the CPUs that the server may use, all of them, and on no core of their own choice."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ml_inference_server.backends import create_backend
from ml_inference_server.backends.startup.own_process import in_own_process
from ml_inference_server.backends.startup.resolve import resolve
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.cpu import available_cpus
from tests.parity.tiny_model import INT8, embed, settings

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux tells where threads may run")

ENGINES = [("pytorch", {}), ("pytorch", {"compile": True}), ("onnx", {}), ("openvino", {}), ("openvino", INT8)]


def _placed(model: ModelSettings) -> set[frozenset[int]]:
    """The CPUs of each thread of an engine that has run a batch in this process."""
    backend = create_backend(resolve(model).model)
    backend.load_model()
    embed(backend)
    found = set()
    for thread in Path("/proc/self/task").iterdir():
        found.add(frozenset(os.sched_getaffinity(int(thread.name))))
    return found


@pytest.mark.parametrize(("backend", "keys"), ENGINES)
def test_no_engine_pins_its_threads(backend: str, keys: dict[str, object], tiny: Path) -> None:
    """Two engines that both choose the first core would share it, and leave the others idle."""
    allowed = frozenset(os.sched_getaffinity(0))
    found = in_own_process(_placed, settings(tiny, backend, threads=0, streams=2, **keys))
    assert found == {allowed}


@pytest.mark.parametrize(("backend", "keys"), [("pytorch", {"compile": True}), ("openvino", INT8)])
def test_engines_stay_where_taskset_has_put_the_server(backend: str, keys: dict[str, object], tiny: Path) -> None:
    allowed = os.sched_getaffinity(0)
    one = {max(allowed)}
    os.sched_setaffinity(0, one)
    try:
        found = in_own_process(_placed, settings(tiny, backend, threads=0, streams=2, **keys))
    finally:
        os.sched_setaffinity(0, allowed)
    assert found == {frozenset(one)}


def _threads(model: ModelSettings) -> tuple[int, int]:
    """How many streams an engine has in this process, and how many threads each of them."""
    resolved = resolve(model).model
    return resolved.streams, resolved.threads


@contextlib.contextmanager
def _quota_of(cpus: float) -> Iterator[None]:
    """This process, and those that it starts, under a quota. Skips where it may not make one."""
    period_us = 100_000
    root, file, limit = Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us", f"{int(cpus * period_us)}"
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        root, file, limit = root.parent, "cpu.max", f"{limit} {period_us}"
    group = root / f"mlis-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error.strerror}")
    try:
        try:
            (group / file).write_text(limit)
            before = _group(root)
            (before / "cgroup.procs").write_text(str(os.getpid()))  # it can be gone back to
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            pytest.skip(f"no CPU quota can be set here: {error.strerror}")
        try:
            yield
        finally:
            (before / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def _group(root: Path) -> Path:
    """That of this process."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(",") or (not controllers and root.name == "cgroup"):
            return root / path.lstrip("/")
    return root


def test_a_quota_of_one_cpu_leaves_one_thread_for_all_engines(tiny: Path) -> None:
    """More threads than the quota pays for would be stopped together, in the middle of a batch."""
    cpus = available_cpus()
    if cpus < 2:
        pytest.skip("one CPU: a quota of one takes nothing away")
    asked = settings(tiny, "pytorch", threads=0, streams=0)
    assert in_own_process(_threads, asked) == (2, cpus // 2)
    with _quota_of(1):
        assert in_own_process(_threads, asked) == (1, 1)
