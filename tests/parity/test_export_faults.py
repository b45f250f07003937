"""Exports that go wrong: recovery, or one sentence that helps."""

import importlib
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LongformerConfig,
    LongformerModel,
)

from ml_inference_server import backends
from ml_inference_server.backends.files.model_files import find_model
from ml_inference_server.backends.model.export import export
from ml_inference_server.utils.config import ModelSettings
from tests.parity.tiny_model import INT8, SHAPE, embed, refused, save, settings, start

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("own_cache")]


# Packages that are not there.


@pytest.mark.parametrize(
    ("package", "backend", "keys"),
    [
        ("onnxruntime", "onnx", {}),
        ("onnx", "onnx", {}),
        ("openvino", "openvino", {}),
        ("onnx", "openvino", {}),
        ("onnxscript", "onnx", {}),
        ("onnxscript", "openvino", {}),
        ("nncf", "openvino", INT8),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(
    tiny: Path, filled_cache: Path, monkeypatch: pytest.MonkeyPatch, package: str, backend: str, keys: dict[str, Any]
) -> None:
    if package == "nncf":
        monkeypatch.setenv("MLIS_CACHE_DIR", str(filled_cache))
    module = importlib.import_module(f"ml_inference_server.backends.{backend}")
    monkeypatch.setattr(backends, backend, module)  # another import would leave its own module there
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does for "must not be imported"
    message = refused(tiny, backend, **keys)
    assert f"needs the package {package}: pip install" in message


def test_a_graph_in_the_cache_needs_no_exporter(
    tiny: Path, filled_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLIS_CACHE_DIR", str(filled_cache))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert start(tiny).info.backend == "onnx"


# The cache.


@pytest.mark.parametrize("keys", [{}, INT8], ids=["fp32", "int8"])
def test_a_damaged_graph_is_noticed_and_made_again(
    tiny: Path, own_cache: Path, caplog: pytest.LogCaptureFixture, keys: dict[str, Any]
) -> None:
    before = embed(start(tiny, **keys).backend)
    files = list(own_cache.glob("onnx*/*/*.onnx"))
    assert len(files) == (2 if keys else 1)
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    np.testing.assert_array_equal(embed(start(tiny, **keys).backend), before)
    assert caplog.text.count("is damaged: making it again") == len(files)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_cache_that_cannot_be_written_still_serves(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "file"))
    started = start(tiny, backend)
    assert started.info.parity_min is not None
    assert started.info.parity_min > 0.9999
    assert "cannot be written" in caplog.text


def _export_at_once(name: Path, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    barrier.wait()
    results.put((str(export(settings(name)).file), embed(start(name).backend).tolist()))


def test_two_processes_may_export_the_same_model_at_once(tiny: Path, own_cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_export_at_once, args=(tiny, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = (results.get(timeout=150) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1], second[1])
    assert [entry.name for entry in (own_cache / "onnx").iterdir()] == [Path(first[0]).parent.name]


# What cannot be exported, or not be run.


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_model_that_cannot_be_exported_names_the_backend_that_runs_it(tmp_path: Path, backend: str) -> None:
    """Longformer looks at its data to decide what to compute: no graph can hold that."""
    config = LongformerConfig(
        attention_window=[8], num_hidden_layers=1, max_position_embeddings=64, pad_token_id=0, **SHAPE
    )
    model = save(LongformerModel(config), tmp_path)
    message = refused(model, backend)
    assert "cannot be exported to ONNX" in message
    assert message.endswith("use model.backend pytorch")


def test_a_cross_encoders_head_can_be_quantised(tmp_path: Path) -> None:
    """Its Gemm is the one product whose weights ONNX Runtime transposes."""
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(num_hidden_layers=1, initializer_range=0.3, **{"num_labels": 1, **SHAPE})
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(find_model(ModelSettings().name).folder).save_pretrained(tmp_path)
    info = start(tmp_path, task="cross_encoder", min_parity=0, **INT8).info
    assert (info.dtype, info.dimension) == ("int8", 1)
    assert info.parity_mean is not None
    assert info.parity_mean > 0.9
