"""Exported folders: they answer as the model that they were made from, and what cannot be exported is refused."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ml_inference_server.backends import onnx as onnx_backend
from ml_inference_server.backends.base import Backend, Encoded, TokenBatch
from ml_inference_server.backends.exported.manifest import MANIFEST, Manifest, read_manifest
from ml_inference_server.backends.startup.resolve import title
from ml_inference_server.backends.startup.start import Started, load_resolved
from ml_inference_server.backends.startup.write_folder import STEPS
from ml_inference_server.server.space import spaces_of
from ml_inference_server.utils.errors import ConfigError, ModelError
from ml_inference_server.utils.installation import pip_install
from tests.parity.exported_kit import refused, serve, write
from tests.parity.families import PAIRS, TEXTS, built
from tests.parity.parts import change_json
from tests.parity.tiny_model import INT8, start

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("export_cache")]
ROOT = Path(__file__).resolve().parents[2]
# What the serving of a folder must do without.
VNNI, PLAIN = frozenset({"avx512_vnni"}), frozenset({"avx2"})
FORBIDDEN = (
    "torch",
    "transformers",
    "sentence_transformers",
    "scipy",
    "nncf",
    "onnx",
    "onnxscript",
    "sympy",
    "datasets",
)


def encoded(backend: Backend) -> list[Encoded]:
    """Odd texts under each prompt, or odd pairs."""
    tokenizer = backend.tokenizer
    if backend.info.task == "cross_encoder":
        return tokenizer.encode_pairs(PAIRS)
    return [row for name in [None, *tokenizer.prompts] for row in tokenizer.encode(TEXTS, name or None)]


def rows_of(backend: Backend, texts: list[Encoded]) -> np.ndarray:
    batches = [texts[start : start + 4] for start in range(0, len(texts), 4)]
    return np.concatenate([backend.infer(TokenBatch.of(batch)) for batch in batches])


def check_same(folder: Started, model: Started) -> None:
    """The served folder's texts, answers and description against those of the same backend served from the model."""
    ours, theirs = encoded(folder.backend), encoded(model.backend)
    assert [(each.ids.tolist(), each.truncated) for each in ours] == [
        (each.ids.tolist(), each.truncated) for each in theirs
    ]
    for our, their in zip(ours, theirs, strict=True):
        assert (our.type_ids is None) == (their.type_ids is None)
        assert our.type_ids is None or (our.type_ids == their.type_ids).all()
    np.testing.assert_allclose(rows_of(folder.backend, ours), rows_of(model.backend, theirs), rtol=0, atol=2e-6)
    assert dict(folder.tokenizer.prompts) == dict(model.tokenizer.prompts)
    assert folder.tokenizer.pad_id == model.tokenizer.pad_id
    differ = {"source": "exported folder", "versions": folder.info.versions}
    assert folder.info == dataclasses.replace(model.info, **differ)  # type: ignore[arg-type]
    assert title(folder.resolution, folder.info) == title(model.resolution, model.info)
    assert folder.pooling == model.pooling
    if model.info.task == "embedding":
        assert spaces_of(folder.info, folder.tokenizer) == spaces_of(model.info, model.tokenizer)


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("BERT, first token (BGE, Arctic)", "openvino"),
        ("Dense and LayerNorm behind the pooling", "onnx"),
        ("Shortened vectors (truncate_dim)", "onnx"),
        ("Prompts, one by default", "onnx"),
        ("BERT cross-encoder with a default prompt", "onnx"),
        pytest.param("BERT cross-encoder with a default prompt", "openvino", marks=pytest.mark.slow),
        pytest.param("Qwen3 decoder (Qwen3-Embedding)", "onnx", marks=pytest.mark.slow),
        pytest.param("CNN over BERT", "onnx", marks=pytest.mark.slow),
        pytest.param("Padding id in the last row, no special tokens", "onnx", marks=pytest.mark.slow),
        pytest.param("Dot product, not normalised", "openvino", marks=pytest.mark.slow),
    ],
)
def test_a_folder_answers_as_its_model(family: str, backend: str, tmp_path: Path) -> None:
    model = built(family, tmp_path)
    steps = write(model, tmp_path / "folder", backend)
    assert len(steps) == STEPS
    check_same(serve(tmp_path / "folder"), start(model, backend))


def test_a_folder_cuts_texts_where_its_model_does(copy: Path, tmp_path: Path) -> None:
    for file in copy.rglob("tokenizer_config.json"):
        change_json(file, truncation_side="left")
    write(copy, tmp_path / "folder")
    assert read_manifest(tmp_path / "folder").text.truncation_side == "left"
    check_same(serve(tmp_path / "folder"), start(copy))


@pytest.mark.parametrize("backend", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_int8_stays_int8(tiny: Path, tmp_path: Path, backend: str) -> None:
    write(tiny, tmp_path / "folder", backend, **INT8)
    served = serve(tmp_path / "folder")
    check_same(served, start(tiny, backend, **INT8))
    assert (served.info.dtype, served.info.quantized_layers > 0) == ("int8", True)
    assert served.resolution.requested.backend == backend
    assert "int8" in title(served.resolution, served.info)
    assert "requested" not in title(served.resolution, served.info)
    full = start(tiny, "pytorch")  # another engine and another precision, the same space
    assert spaces_of(served.info, served.tokenizer) == spaces_of(full.info, full.tokenizer)


@pytest.mark.parametrize(
    ("exported_on", "served_on", "warns"), [(VNNI, PLAIN, True), (VNNI, VNNI, False), (PLAIN, PLAIN, False)]
)
def test_int8_weights_that_saturate_here_are_told(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    exported_on: frozenset[str],
    served_on: frozenset[str],
    warns: bool,
) -> None:
    monkeypatch.setattr(onnx_backend, "cpu_flags", lambda: exported_on)
    write(tiny, tmp_path / "folder", **INT8)
    monkeypatch.setattr(onnx_backend, "cpu_flags", lambda: served_on)
    caplog.clear()
    serve(tmp_path / "folder")
    assert ("weights have 8 bits" in caplog.text) is warns


def test_the_manifest_says_what_the_folder_is(exported: Path, tiny: Path) -> None:
    manifest = read_manifest(exported)
    assert (manifest.backend, manifest.task, manifest.source.model) == ("onnx", "embedding", str(tiny))
    assert set(manifest.files) == {each.name for each in exported.iterdir()} - {MANIFEST}
    for name, digest in manifest.files.items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    assert manifest.parity is not None
    assert manifest.parity.least > 0.9999
    assert manifest.made_with.keys() >= {"ml-inference-server", "torch", "onnxruntime"}


def test_no_path_of_the_machine_that_exported_is_in_the_graph(exported: Path) -> None:
    assert str(ROOT).encode() not in (exported / "model.onnx").read_bytes()


def test_serving_tries_no_forbidden_import(exported: Path) -> None:
    program = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise AssertionError(f"{{name}} must not be imported")

sys.meta_path.insert(0, Refuse())
from ml_inference_server.backends.startup.start import start_backend
from ml_inference_server.server import lifecycle
from ml_inference_server.utils.config import ModelSettings
started = start_backend(ModelSettings(name={str(exported)!r}), lambda phase: None)
print(sorted({set(FORBIDDEN)!r} & set(sys.modules)), started.info.parity_min > 0.9999)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.returncode) == ("[] True\n", 0), done.stderr


@pytest.mark.parametrize("package", ["torch", "sentence_transformers"])
def test_any_other_model_says_how_to_do_without_torch(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for backend in ("onnx", "auto"):
        message = refused(tiny, backend=backend)
        assert f"needs the package {package}" in message
        assert f"mlis export {tiny}" in message
        assert pip_install("torch") in message


# What is set besides the folder.


@pytest.mark.parametrize(
    "keys",
    [
        {"backend": "auto"},
        {"backend": "auto", "quantized": True, "quantization": "auto"},
        {"backend": "onnx", "quantized": False},
        {"task": "embedding", "device": "cpu"},
    ],
)
def test_what_agrees_or_is_left_open_runs_what_the_folder_holds(exported: Path, keys: dict[str, object]) -> None:
    info = serve(exported, **keys).info
    assert (info.backend, info.dtype) == ("onnx", "float32")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"backend": "pytorch"}, "model.backend is pytorch"),
        ({"backend": "openvino"}, "model.backend is openvino"),
        (INT8, "model.quantization is int8"),
        ({"task": "cross_encoder"}, "model.task is cross_encoder"),
        ({"compile": True}, "model.compile is for backend pytorch"),
        ({"compile": True, "allow_fallback": True}, "model.compile is for backend pytorch"),
        ({"random_weights": True}, "model.random_weights is true"),
        ({"max_tokens": 49}, "exported for at most 48 tokens"),
    ],
    ids=lambda value: "-".join(f"{key}" for key in value) if isinstance(value, dict) else None,
)
def test_what_contradicts_the_folder_is_refused(exported: Path, keys: dict[str, object], says: str) -> None:
    assert says in refused(exported, ConfigError, **keys)


def test_texts_can_be_cut_shorter_than_at_the_export(exported: Path, tiny: Path) -> None:
    served = serve(exported, max_tokens=9)
    assert served.info.max_tokens == 9
    whole = serve(exported)
    assert (served.info.parity_mean, served.info.parity_min) == (whole.info.parity_mean, whole.info.parity_min)
    ours, theirs = encoded(served.backend), encoded(start(tiny, max_tokens=9).backend)
    assert [each.ids.tolist() for each in ours] == [each.ids.tolist() for each in theirs]
    assert max(each.length for each in ours) == 9


def test_a_process_of_the_engine_loads_the_folder_again(exported: Path) -> None:
    served = serve(exported)
    again = load_resolved(served.resolution, lambda done, total: None)
    texts = encoded(again)
    np.testing.assert_array_equal(rows_of(again, texts), rows_of(served.backend, texts))


# Where it is written, and what cannot be.


def test_a_former_export_is_replaced_only_when_asked(changeable: Path, tiny: Path, tmp_path: Path) -> None:
    before = read_manifest(changeable)
    with pytest.raises(ConfigError, match="holds an export already.*--force"):
        write(tiny, changeable)
    assert read_manifest(changeable) == before
    write(tiny, changeable, force=True, max_tokens=20)
    assert read_manifest(changeable).text.max_tokens == 20
    assert sorted(each.name for each in tmp_path.iterdir()) == ["changeable"]


@pytest.mark.parametrize("force", [False, True])
def test_nothing_of_others_is_replaced(tiny: Path, changeable: Path, tmp_path: Path, force: bool) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        write(tiny, tmp_path / "notes", force=force)
    with pytest.raises(ConfigError, match="is a file"):
        write(tiny, tmp_path / "file", force=force)
    (changeable / "mine.txt").touch()
    with pytest.raises(ConfigError, match=r"also holds mine.txt" if force else "holds an export already"):
        write(tiny, changeable, force=force)
    assert (changeable / "mine.txt").exists()


def test_an_empty_folder_is_filled(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tiny, tmp_path / "empty")
    assert isinstance(read_manifest(tmp_path / "empty"), Manifest)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("Decoder with a chat template", "because it has a chat template"),
        ("Router (queries static, documents BERT)", "because it begins with a Router"),
        ("StaticEmbedding (model2vec, potion)", "because it begins with a StaticEmbedding"),
        ("Prompts that pooling leaves out (Instructor)", "because its pooling leaves prompts out"),
    ],
)
def test_a_kind_that_no_folder_can_hold_says_why(family: str, why: str, tmp_path: Path) -> None:
    model = built(family, tmp_path)
    with pytest.raises(ModelError) as caught:
        write(model, tmp_path / "folder")
    assert f"{model} cannot be exported, {why}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "folder").exists()


def test_only_a_model_can_be_exported_and_only_for_some_backends(exported: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is an exported folder already"):
        write(exported, tmp_path / "folder")
    with pytest.raises(ConfigError, match="backend pytorch cannot be exported for: use one of onnx, openvino"):
        write(tiny, tmp_path / "folder", "pytorch")
    with pytest.raises(ModelError, match="fp16 is not available on cpu with backend onnx"):
        write(tiny, tmp_path / "folder", quantized=True, quantization="fp16")
