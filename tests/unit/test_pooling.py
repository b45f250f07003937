import json
from pathlib import Path
from typing import Any

import pytest

from ml_inference_server.backends.files.model_kind import ModelKind
from ml_inference_server.backends.files.pooling import pooling_of

EMBEDDING = ModelKind("embedding", "an embedding model")
LEGACY = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}


def folder(place: Path, config: Any, kinds: tuple[str, ...] = ("Transformer", "Pooling", "Normalize")) -> Path:
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}"} for i, kind in enumerate(kinds)]
    (place / "modules.json").write_text(json.dumps(modules))
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (LEGACY | {"pooling_mode_mean_tokens": True}, "mean"),
        (LEGACY | {"pooling_mode_cls_token": True}, "cls"),
        (LEGACY | {"pooling_mode_lasttoken": True}, "last_token"),
        (LEGACY | {"pooling_mode_max_tokens": True}, ""),
        (LEGACY | {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ""),
        (LEGACY, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "last_token"),
        ({"pooling_mode": ["cls", "mean"]}, ""),
        ({"pooling_mode": 3}, ""),
        ([], ""),
    ],
)
def test_the_word_for_a_pooling(tmp_path: Path, config: Any, word: str) -> None:
    assert pooling_of(folder(tmp_path, config), EMBEDDING) == word


def test_a_model_of_other_modules_has_no_word(tmp_path: Path) -> None:
    assert pooling_of(folder(tmp_path, {}, ("Transformer", "Pooling", "Pooling")), EMBEDDING) == ""
    (tmp_path / "modules.json").write_text("[]")
    assert pooling_of(tmp_path, EMBEDDING) == ""


def test_a_folder_without_modules_is_pooled_as_its_kind_says(tmp_path: Path) -> None:
    assert pooling_of(tmp_path, EMBEDDING) == "mean"
    assert pooling_of(tmp_path, ModelKind("cross_encoder", "a cross-encoder")) == ""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    assert pooling_of(tmp_path, EMBEDDING) == "last_token"
