"""Every backend and precision against FP32 PyTorch, for an embedding model and for a cross-encoder."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ml_inference_server.backends import create_backend
from ml_inference_server.backends.base import Backend, TokenBatch
from ml_inference_server.backends.startup.resolve import resolve
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.sample import PAIRS

pytestmark = pytest.mark.real
CROSS_ENCODER = "cross-encoder/ms-marco-MiniLM-L6-v2"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own, so that the export itself is tested and nothing is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLIS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    rows = [line.split("\t") for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    return [(row[2], row[3]) for row in rows[::6]]


def load(**keys: object) -> Backend:
    resolution = resolve(ModelSettings.model_validate({"device": "cpu", "threads": 2, "streams": 1, **keys}))
    backend = create_backend(resolution.model)
    backend.load_model()
    resolution.check(backend.info)
    backend.warmup(lambda done, total: None)
    return backend


def embed(backend: Backend, texts: list[str]) -> np.ndarray:
    encoded = backend.tokenizer.encode(texts)
    return np.concatenate([backend.infer(TokenBatch.of(encoded[i : i + 7])) for i in range(0, len(texts), 7)])


@pytest.fixture(scope="module")
def reference(pairs: list[tuple[str, str]]) -> np.ndarray:
    return embed(load(), [passage for _, passage in pairs])


@pytest.mark.parametrize(
    ("keys", "mean", "least", "dtype"),
    [
        ({"backend": "onnx"}, 0.99999, 0.99999, "float32"),
        ({"backend": "openvino"}, 0.99999, 0.99999, "float32"),
        ({"backend": "pytorch", "quantized": True, "quantization": "int8"}, 0.98, 0.94, "int8"),
        ({"backend": "onnx", "quantized": True, "quantization": "int8"}, 0.97, 0.9, "int8"),
        ({"backend": "openvino", "quantized": True, "quantization": "int8"}, 0.97, 0.9, "int8"),
    ],
    ids=lambda value: "-".join(str(v) for v in value.values()) if isinstance(value, dict) else None,
)
def test_embeddings_stay_close_to_fp32_and_the_info_is_true(
    pairs: list[tuple[str, str]], reference: np.ndarray, keys: dict[str, object], mean: float, least: float, dtype: str
) -> None:
    backend = load(**keys)
    assert backend.info.dtype == dtype
    assert (backend.info.quantized_layers >= 30) is (dtype == "int8")
    assert backend.info.backend == keys["backend"]
    rows = embed(backend, [passage for _, passage in pairs])
    cosine = (rows * reference).sum(axis=1) / np.linalg.norm(rows, axis=1)
    assert cosine.mean() >= mean
    assert cosine.min() >= least
    if dtype == "int8":
        assert cosine.min() < 0.99999  # it really is another arithmetic


@pytest.fixture(scope="module")
def own_logits(pairs: list[tuple[str, str]]) -> np.ndarray:
    """transformers' own forward pass on its own padding, with the same seeded weights."""
    from transformers import AutoTokenizer

    from ml_inference_server.backends.model.loading import load_model

    loaded = load_model(ModelSettings(name=CROSS_ENCODER, task="cross_encoder", random_weights=True))
    tokenizer = AutoTokenizer.from_pretrained(loaded.files.folder)
    inputs = tokenizer(
        [query for query, _ in pairs], [passage for _, passage in pairs], padding=True, truncation=True, max_length=512,
        return_tensors="pt",
    )  # fmt: skip
    assert inputs["token_type_ids"].any()
    with torch.no_grad():
        return np.asarray(loaded.base(**inputs).logits)


@pytest.mark.parametrize("backend", ["pytorch", "onnx", "openvino"])
def test_a_cross_encoders_logits_equal_transformers_own(
    pairs: list[tuple[str, str]], own_logits: np.ndarray, backend: str
) -> None:
    running = load(backend=backend, name=CROSS_ENCODER, task="cross_encoder", random_weights=True)
    assert (running.info.task, running.info.random_weights, running.info.dimension) == ("cross_encoder", True, 1)
    encoded = running.tokenizer.encode_pairs(pairs)
    rows = np.concatenate([running.infer(TokenBatch.of(encoded[i : i + 9])) for i in range(0, len(encoded), 9)])
    assert np.ptp(own_logits) > 0.01  # different pairs have different scores, or this compares constants
    np.testing.assert_allclose(rows, own_logits, atol=1e-4)
    without_segments = TokenBatch.of([type(e)(e.ids, None) for e in encoded[:9]])
    assert not np.allclose(running.infer(without_segments), own_logits[:9], atol=1e-4)
