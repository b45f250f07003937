"""What a running engine takes: memory over many shapes, and cores. Each runs in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ml_inference_server.utils.cpu import has_native_bf16

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.real, pytest.mark.slow]

MEMORY = """
import json, sys, numpy, psutil
from ml_inference_server.backends.base import Encoded, TokenBatch
from ml_inference_server.backends.startup.start import load_resolved
from ml_inference_server.backends.startup.resolve import resolve
from ml_inference_server.utils.config import ModelSettings
keys = json.loads(sys.argv[1]) | {"device": "cpu", "threads": 1, "streams": 1}
backend = load_resolved(resolve(ModelSettings.model_validate(keys)), lambda done, total: None)
def run(shapes):
    for shape in shapes:
        texts, length = shape
        backend.infer(TokenBatch.of([Encoded(numpy.full(length, 2003, numpy.int32))] * texts))
    return psutil.Process().memory_info().rss >> 20
before, new = json.loads(sys.argv[2])
shapes = [(texts, length) for texts in (1, 2, 3) for length in range(20, 220)]
shapes = [shapes[i] for i in numpy.random.default_rng(0).permutation(len(shapes))][: before + new]
print(run(shapes[:before]), run(shapes[before:]))
"""
CORES = """
import contextlib, json, os, sys, threading
os.sched_setaffinity(0, json.loads(sys.argv[2]))  # before a library starts its threads
from pathlib import Path
from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.backends.startup.start import load_resolved
from ml_inference_server.backends.startup.resolve import resolve
from ml_inference_server.utils.config import ModelSettings
keys = json.loads(sys.argv[1]) | {"device": "cpu", "streams": 2}
backend = load_resolved(resolve(ModelSettings.model_validate(keys)), lambda done, total: None)
batch = TokenBatch.of(backend.tokenizer.encode(["the price of bread in the town"] * 8))
stop = threading.Event()
def work():
    while not stop.is_set():
        backend.infer(batch)
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
seen = set()
for _ in range(100):
    for status in Path("/proc/self/task").glob("*/status"):
        with contextlib.suppress(OSError):  # the thread has ended
            lines = status.read_text().splitlines()
            seen |= {line.split()[1] for line in lines if line.startswith("Cpus_allowed_list")}
stop.set()
for thread in threads: thread.join()
print(*seen)
"""
ENGINES = [
    {"backend": "pytorch"},
    {"backend": "pytorch", "quantized": True, "quantization": "bf16"},
    {"backend": "pytorch", "quantized": True, "quantization": "int8"},
    {"backend": "onnx"},
    {"backend": "openvino"},
]


def name(engine: dict[str, object]) -> str:
    return " ".join(str(value) for value in engine.values() if value is not True)


def run(program: str, *arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *(json.dumps(each) for each in arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ".", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize("engine", ENGINES, ids=name)
def test_memory_does_not_grow_with_every_new_shape(engine: dict[str, object]) -> None:
    """Kernels that are kept for every shape took 1 to 2 MiB each in BF16; a bound is reached after some 300 shapes.

    OpenVINO keeps up to 1 MiB for each of the first 240, and 0.2 and less for those after them.
    """
    is_bf16 = engine.get("quantization") == "bf16"
    if is_bf16 and not has_native_bf16():
        pytest.skip("no BF16 instructions: PyTorch takes minutes for 500 batches without")
    shapes = [350, 150] if is_bf16 else [240, 80] if engine["backend"] == "openvino" else [80, 80]
    before_mib, after_mib = (int(each) for each in run(MEMORY, engine, shapes))
    assert after_mib - before_mib < 60


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no processor affinity to read")
@pytest.mark.parametrize("engine", ENGINES[:1] + ENGINES[3:], ids=name)
def test_no_engine_binds_its_threads_to_cores(engine: dict[str, object]) -> None:
    """Two processes or servers that bind themselves do it to the same cores, and share one."""
    cores = sorted(os.sched_getaffinity(0))
    for given in {tuple(cores), tuple(cores[-1:])}:
        shown = run(CORES, engine, given)
        assert len(shown) == 1, f"given {given}, threads run on {shown}"
        assert shown[0].endswith(str(given[-1]))
