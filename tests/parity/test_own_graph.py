"""Model folders that bring an ONNX graph of their own: used and named, or told why not."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.parity.tiny_model import INT8, TEXTS, WIDTH, embed, refused, start

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("own_cache")]


def rewrite(folder: Path, graph_file: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Give a model folder an onnx/model.onnx: the exported graph after `change`."""
    model = onnx.load(str(graph_file))
    change(model)
    (folder / "onnx").mkdir()
    onnx.save(model, str(folder / "onnx" / "model.onnx"))


def through_unknown_operator(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if "rows" in node.output:
            node.output[list(node.output).index("rows")] = "before"
    model.graph.node.append(helper.make_node("Unheard", ["before"], ["rows"], domain="nowhere"))
    model.opset_import.append(helper.make_opsetid("nowhere", 1))


@pytest.mark.parametrize(
    ("backend", "keys", "engine"),
    [
        ("onnx", {}, "ONNX Runtime cannot run"),
        ("openvino", {}, "OpenVINO cannot run"),
        ("onnx", INT8, "ONNX Runtime cannot run"),
        ("openvino", INT8, "OpenVINO cannot run"),
    ],
)
def test_an_operator_that_the_engine_does_not_know_is_told_with_a_remedy(
    copy: Path, graph_file: Path, backend: str, keys: dict[str, object], engine: str
) -> None:
    rewrite(copy, graph_file, through_unknown_operator)
    message = refused(copy, backend, **keys)
    assert message.startswith(f"{engine} onnx/model.onnx")
    assert "Unheard" in message
    assert "use model.backend pytorch" in message


def as_optimum(model: onnx.ModelProto) -> None:
    """Token embeddings first, then the sentence's, as optimum exports a sentence-transformers model."""
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            if name == "rows":
                node.output[i] = "sentence_embedding"
    model.graph.output[0].name = "sentence_embedding"
    model.graph.node.append(helper.make_node("Cast", ["input_ids"], ["flat"], to=TensorProto.FLOAT))
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [2])
    model.graph.initializer.append(axis)
    model.graph.node.append(helper.make_node("Unsqueeze", ["flat", "axis"], ["last_hidden_state"]))
    tokens = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "length", 1])
    model.graph.output.insert(0, tokens)


def only_tokens(model: onnx.ModelProto) -> None:
    as_optimum(model)
    del model.graph.output[1]


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize("keys", [{}, INT8], ids=["fp32", "int8"])
def test_a_graph_that_came_with_the_model_is_used_and_named(
    copy: Path, graph_file: Path, own_cache: Path, backend: str, keys: dict[str, object]
) -> None:
    rewrite(copy, graph_file, as_optimum)
    started = start(copy, backend, **keys)
    assert started.info.weights_file.startswith("onnx/model.onnx (sha256 ")
    assert ("quantised to model_int8" in started.info.weights_file) is bool(keys)
    assert not (own_cache / "onnx").exists()
    assert started.info.parity_min is not None
    assert started.info.parity_min > (0.95 if keys else 0.99999)
    assert embed(started.backend).shape == (len(TEXTS), WIDTH)


def fixed_length(model: onnx.ModelProto) -> None:
    for each in model.graph.input:
        each.type.tensor_type.shape.dim[1].dim_value = 16


def half(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def another_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "length"]))


def another_width(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (only_tokens, "no output is sentence_embedding or rows in FP32, it has last_hidden_state (3-D)"),
        (fixed_length, "its batch or length is fixed"),
        (half, "its weights are not FP32"),
        (another_input, "its inputs are input_ids, attention_mask, token_type_ids, position_ids, not input_ids"),
        (None, "it cannot be read (DecodeError)"),
        (another_width, "its rows have 7 numbers, the model's 32"),
    ],
)
def test_a_graph_that_does_not_fit_is_said_and_not_used(
    copy: Path,
    graph_file: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    filled_cache: Path,
    change: Callable[[onnx.ModelProto], None] | None,
    why: str,
) -> None:
    monkeypatch.setenv("MLIS_CACHE_DIR", str(filled_cache))  # the export itself is not what is tested here
    rewrite(copy, graph_file, change or (lambda model: None))
    if change is None:
        (copy / "onnx" / "model.onnx").write_bytes(b"\xff" * 100)
    with caplog.at_level(logging.WARNING):
        info = start(copy).info
    assert info.weights_file == "model.safetensors exported to model.onnx"
    said = [record.getMessage() for record in caplog.records if "onnx/model.onnx" in record.getMessage()]
    assert len(said) == 1
    assert why in said[0]
