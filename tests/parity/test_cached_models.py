"""Models that share a cache: none gets what was kept for another, and nothing wrong is kept as the yardstick."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import BertModel

from ml_inference_server.backends.compiled import native, packed
from tests.parity import parts, zoo
from tests.parity.families import TEXTS, check_answers
from tests.parity.tiny_model import refused, start

pytestmark = pytest.mark.real


def plain_rows(model: Path) -> np.ndarray:
    plain = SentenceTransformer(str(model), device="cpu", local_files_only=True)
    return np.asarray(plain.encode(list(TEXTS), batch_size=1, show_progress_bar=False))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def tail(width: int) -> list[torch.nn.Module]:
        return [modules.Pooling(width, "mean"), modules.Dense(width, width)]

    network = BertModel(zoo.bert_config(num_hidden_layers=1))
    return parts.embedder(tmp_path_factory.mktemp("original"), network, parts.wordpiece(), tail)


@pytest.fixture(scope="module")
def shared_cache(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """It holds the original's graph and reference."""
    folder = tmp_path_factory.mktemp("cache")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLIS_CACHE_DIR", str(folder))
        start(original)
    yield folder
    torch.set_num_threads(threads)


def other_dense(model: Path) -> None:
    file = model / "2_Dense" / "model.safetensors"
    save_file({name: -2 * tensor for name, tensor in load_file(file).items()}, file)


def other_pooling(model: Path) -> None:
    parts.change_json(model / "1_Pooling" / "config.json", pooling_mode="cls")


def other_prompts(model: Path) -> None:
    file = model / "config_sentence_transformers.json"
    parts.change_json(file, prompts={"query": "a question about rivers: "}, default_prompt_name="query")


def normalised(model: Path) -> None:
    listed = json.loads((model / "modules.json").read_text())
    module = type(modules.Normalize())
    listed.append({"idx": 3, "name": "3", "path": "3_Normalize", "type": f"{module.__module__}.{module.__name__}"})
    (model / "3_Normalize").mkdir()
    (model / "modules.json").write_text(json.dumps(listed))


def other_vocabulary(model: Path) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    names = [name for name in words if name.isalpha()]
    for name, number in zip(names, [words[name] for name in reversed(names)], strict=True):
        words[name] = number
    file.write_text(json.dumps(content))


def other_configuration(model: Path) -> None:
    parts.change_json(model / "config.json", hidden_act="relu")


def other_limit(model: Path) -> None:
    parts.change_json(model / "tokenizer_config.json", model_max_length=16)
    parts.change_json(model / "sentence_bert_config.json", max_seq_length=16)


CHANGES: list[Callable[[Path], None]] = [
    other_dense,
    other_pooling,
    other_prompts,
    normalised,
    other_vocabulary,
    other_configuration,
    other_limit,
]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_differs_in_one_file_gets_answers_of_its_own(
    change: Callable[[Path], None],
    original: Path,
    shared_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = shutil.copytree(original, tmp_path / "model")
    change(model)
    expected, before = plain_rows(model), plain_rows(original)
    assert expected.shape != before.shape or np.abs(expected - before).max() > 0.05
    monkeypatch.setenv("MLIS_CACHE_DIR", str(shared_cache))
    started = start(model)
    check_answers(started.backend, [None], expected)
    assert started.info.parity_min is not None
    assert started.info.parity_min > 0.9999
    check_answers(start(original).backend, [None], before)


@pytest.mark.slow
@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler (g++ or clang++)")
def test_a_backend_that_starts_first_is_not_its_own_yardstick(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean that divides by the fill tokens, started with an empty cache; the right backends pass afterwards."""
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path))
    right = packed.PackedMean.forward

    def too_short(self: packed.PackedMean, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**features, "sentence_embedding": 0.9 * right(self, features)["sentence_embedding"]}

    monkeypatch.setattr(packed.PackedMean, "forward", too_short)
    refused(original, "pytorch", compile=True)
    for backend in ("pytorch", "onnx"):
        found = start(original, backend).info
        assert found.parity_min is not None
        assert found.parity_min > 0.9999
