"""Where engines run: on the CPUs that the server may use, all of them, and on no core of their own choice."""

import os
from pathlib import Path

import pytest

from ml_inference_server.backends import create_backend
from ml_inference_server.backends.startup.own_process import in_own_process
from ml_inference_server.backends.startup.resolve import resolve
from ml_inference_server.utils.config import ModelSettings
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
