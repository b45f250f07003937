"""How a model makes one vector of its tokens' vectors, as far as one word can say it."""

from pathlib import Path
from typing import Any

from ml_inference_server.backends.files.file_checks import read_json
from ml_inference_server.backends.files.model_kind import ModelKind

# sentence-transformers' words to those of Text Embeddings Inference, which its clients check.
_WORDS = {"cls": "cls", "mean": "mean", "lasttoken": "last_token"}
_LEGACY = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
_LEGACY_START = "pooling_mode_"


def pooling_of(folder: Path, kind: ModelKind) -> str:
    """cls, mean or last_token; empty for any other way, for several at once, and for a cross-encoder."""
    if kind.task != "embedding":
        return ""
    modules = read_json(folder / "modules.json")
    if modules is None:
        config = read_json(folder / "config.json")
        listed = config.get("architectures") if isinstance(config, dict) else None
        architecture = str(listed[0]) if isinstance(listed, list) and listed else ""
        # What sentence-transformers does without a modules.json.
        return "last_token" if architecture.endswith(_LANGUAGE_MODELS) else "mean"
    pooling = [each for each in modules if str(each.get("type", "")).rpartition(".")[2] == "Pooling"]
    if len(pooling) != 1:
        return ""
    config = read_json(folder / str(pooling[0].get("path", "")) / "config.json")
    return _word(config) if isinstance(config, dict) else ""


def _word(config: dict[str, Any]) -> str:
    mode = config.get("pooling_mode")
    if mode is None:
        modes = [name for name, on in config.items() if name.startswith(_LEGACY_START) and on is True]
        mode = [_LEGACY.get(name.removeprefix(_LEGACY_START), "") for name in modes] or "mean"
    if isinstance(mode, list):
        mode = mode[0] if len(mode) == 1 else ""
    return _WORDS.get(mode, "") if isinstance(mode, str) else ""
