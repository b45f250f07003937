"""A model whose export takes a second, and how it is started."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import AutoTokenizer, PreTrainedModel

from ml_inference_server.backends.base import Backend, TokenBatch
from ml_inference_server.backends.files.model_files import find_model
from ml_inference_server.backends.startup.start import Started, start_backend
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import EXIT_MODEL, ModelError

WIDTH = 32
SHAPE: dict[str, Any] = {"vocab_size": 30522, "hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 64}
TEXTS = ["the price of bread", "a river", "one two three four five six seven eight nine ten"]
INT8: dict[str, Any] = {"quantized": True, "quantization": "int8"}


def save(transformer: PreTrainedModel, folder: Path) -> Path:
    """A whole sentence-transformers model round `transformer`: mean pooling and normalisation."""
    transformer.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(find_model(ModelSettings().name).folder).save_pretrained(folder / "base")
    parts = [
        modules.Transformer(str(folder / "base"), max_seq_length=48),
        modules.Pooling(transformer.config.hidden_size),
        modules.Normalize(),
    ]
    SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


def settings(name: Path, backend: str = "onnx", **keys: object) -> ModelSettings:
    keys = {"device": "cpu", "threads": 1, "streams": 1, **keys}
    return ModelSettings.model_validate({"name": str(name), "backend": backend, **keys})


def start(name: Path, backend: str = "onnx", **keys: object) -> Started:
    return start_backend(settings(name, backend, **keys), lambda phase: None)


def embed(backend: Backend) -> np.ndarray:
    return backend.infer(TokenBatch.of(backend.tokenizer.encode(TEXTS)))


def refused(name: Path, backend: str, **keys: object) -> str:
    """The one line that the server would end with."""
    with pytest.raises(ModelError) as caught:
        start(name, backend, **keys)
    assert caught.value.exit_code == EXIT_MODEL
    assert "\n" not in str(caught.value)
    return str(caught.value)
