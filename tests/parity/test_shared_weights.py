"""Processes of one model share its weights where the engine can: mapped from a file, and the answers are the same."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.parity.tiny_model import INT8, embed, start

pytestmark = [
    pytest.mark.real,
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads what is mapped from /proc"),
]


def mapped_files() -> set[Path]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split(maxsplit=5)[5]) for line in lines if len(line.split(maxsplit=5)) == 6}


@pytest.mark.parametrize("precision", [{}, INT8], ids=["fp32", "int8"])
def test_onnx_runtime_maps_weights_that_are_laid_out_already(
    tiny: Path, own_cache: Path, precision: dict[str, object]
) -> None:
    alone = start(tiny, "onnx", min_parity=0.9, **precision)
    shared = start(tiny, "onnx", min_parity=0.9, process_per_stream=True, **precision)
    (weights,) = own_cache.glob("onnx-prepacked/*/model.onnx.data")
    assert weights in mapped_files()
    np.testing.assert_array_equal(embed(shared.backend), embed(alone.backend))
    assert shared.info.weights_file == alone.info.weights_file


def test_a_cache_that_cannot_take_them_costs_memory_and_not_the_start(
    tiny: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_cache.mkdir()
    (own_cache / "onnx-prepacked").touch()  # where a folder should be
    started = start(tiny, "onnx", process_per_stream=True)
    assert len(embed(started.backend)) > 0
    assert "each process holds the weights for itself: the cache " in caplog.text


def test_the_server_does_not_import_torch_for_what_an_engine_says(tiny: Path, tmp_path: Path) -> None:
    """It would hold torch's memory once more, for nothing."""
    said = tmp_path / "said"
    said.write_bytes(pickle.dumps(start(tiny, "pytorch", process_per_stream=True).described()))
    program = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, str(said)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_openvino_maps_the_weights_of_an_export(tiny: Path, own_cache: Path) -> None:
    started = start(tiny, "openvino", process_per_stream=True)
    (weights,) = own_cache.glob("onnx/*/model.onnx.data")
    assert weights in mapped_files()
    assert started.backend is not None
