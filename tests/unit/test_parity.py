"""Parity at load: measured against FP32, refused below the limit, never guessed."""

from pathlib import Path

import numpy as np
import pytest

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.backends.fake import FakeBackend, fake_embedding
from ml_inference_server.backends.startup import parity
from ml_inference_server.backends.startup.reference import Reference
from ml_inference_server.backends.startup.start import start_backend
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import EXIT_MODEL, ModelError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "cache"))


def fake(**keys: object) -> ModelSettings:
    return ModelSettings.model_validate({"backend": "fake", **keys})


def test_a_backend_that_answers_as_the_reference_has_parity_one() -> None:
    info = start_backend(fake(), lambda phase: None).info
    assert (info.parity_mean, info.parity_min) == pytest.approx((1, 1))


def test_a_mislabelled_backend_that_answers_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It claims FP32 and reports FP32, but it computes something else: only its answers give it away."""
    infer = FakeBackend.infer
    monkeypatch.setattr(FakeBackend, "infer", lambda self, batch: np.roll(infer(self, batch), 1, axis=1))
    with pytest.raises(ModelError, match=r"parity .* model.min_parity is 0.9999") as caught:
        start_backend(fake(), lambda phase: None)
    assert caught.value.exit_code == EXIT_MODEL


def test_the_limit_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    infer = FakeBackend.infer

    def half_wrong(self: FakeBackend, batch: TokenBatch) -> np.ndarray:
        rows = infer(self, batch)
        return rows + np.roll(rows, 1, axis=1)

    monkeypatch.setattr(FakeBackend, "infer", half_wrong)
    info = start_backend(fake(min_parity=0), lambda phase: None).info
    assert info.parity_mean is not None
    assert info.parity_mean < 0.9


@pytest.mark.parametrize(("quantization", "limit"), [("int8", 0.97), ("bf16", 0.9999), ("none", 0.9999)])
def test_the_default_limit_depends_on_the_precision(quantization: str, limit: float) -> None:
    settings = ModelSettings.model_validate({"quantized": quantization != "none", "quantization": quantization})
    assert parity.required(settings, "embedding") == limit


def test_answers_that_are_not_finite_or_of_another_shape_have_no_parity() -> None:
    rows = np.ones((4, 8), np.float32)
    assert parity.compare_rows(rows * np.nan, rows, "embedding").mean == 0
    assert parity.compare_rows(rows[:3], rows, "embedding").mean == 0


def test_a_cross_encoder_is_compared_by_its_logits() -> None:
    rows = np.array([[1.0], [2.0], [4.0]], np.float32)
    assert parity.compare_rows(rows * 2 + 1, rows, "cross_encoder").mean == pytest.approx(1)
    assert parity.compare_rows(-rows, rows, "cross_encoder").mean == pytest.approx(-1)
    assert start_backend(fake(task="cross_encoder"), lambda phase: None).info.parity_mean == pytest.approx(1)


def test_one_text_that_is_wrong_among_many_right_ones_is_found() -> None:
    """A mean hides it: one text in forty, of which half is lost, costs the mean 0.004."""
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((40, 8)).astype(np.float32)
    rows = reference.copy()
    rows[7, :4] = 0
    found = parity.compare_rows(rows, reference, "embedding", [f"text {i}" for i in range(40)])
    assert found.worst == "text 7"
    with pytest.raises(ModelError, match="too far from FP32"):
        parity.check(found, fake(), "embedding")


def test_vectors_of_the_right_direction_and_a_wrong_length_are_found() -> None:
    """A mean over the fill tokens shortens a vector, and no cosine sees it."""
    reference = np.eye(8, dtype=np.float32)
    rows = reference.copy()
    rows[3] *= 0.375
    found = parity.compare_rows(rows, reference, "embedding", [f"text {i}" for i in range(8)])
    assert (found.mean, found.least) == pytest.approx((1, 1))
    with pytest.raises(ModelError, match="text 3.*pooling or normalisation"):
        parity.check(found, fake(), "embedding")


def test_logits_that_correlate_and_are_others_are_found() -> None:
    """A sigmoid or a factor changes each logit and hardly their correlation."""
    reference = np.linspace(-2, 2, 30, dtype=np.float32)[:, None]
    found = parity.compare_rows(1.5 * reference, reference, "cross_encoder", [str(i) for i in range(30)])
    assert found.mean == pytest.approx(1)
    with pytest.raises(ModelError, match="standard deviation"):
        parity.check(found, fake(task="cross_encoder"), "cross_encoder")


def test_other_tokens_than_the_library_makes_are_refused_whatever_the_vectors_say() -> None:
    backend = FakeBackend(fake())
    backend.load_model()
    ids = [backend.tokenizer.encode([text])[0].ids.tolist() for text in ("one two", "three")]
    rows = np.stack([fake_embedding(text) for text in ("one two", "three")])
    right = Reference(["one two", "three"], [None, None], ids, rows)
    assert parity.measure(backend, right) is not None
    wrong = Reference(["one two", "three"], [None, None], [ids[0], ids[1][:-1]], rows)
    with pytest.raises(ModelError, match="'three' becomes 3 tokens here and 2 in sentence-transformers"):
        parity.measure(backend, wrong)


def test_without_a_reference_parity_is_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml_inference_server.backends.startup.start.reference_for", lambda settings: None)
    assert start_backend(fake(), lambda phase: None).info.parity_mean is None
