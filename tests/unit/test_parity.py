"""Parity at load: measured against FP32, refused below the limit, never guessed."""

from pathlib import Path

import numpy as np
import pytest

from ml_inference_server.backends import parity
from ml_inference_server.backends.fake import FakeBackend
from ml_inference_server.backends.start import start_backend
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import EXIT_MODEL, ModelError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "cache"))


def fake(**keys: object) -> ModelSettings:
    return ModelSettings.model_validate({"backend": "fake", **keys})


def test_a_backend_that_answers_as_the_reference_has_parity_one() -> None:
    info = start_backend(fake(), lambda phase: None).info
    assert (info.parity_mean, info.parity_min) == (pytest.approx(1), pytest.approx(1))


def test_a_mislabelled_backend_that_answers_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It claims FP32 and reports FP32, but it computes something else: only its answers give it away."""
    start_backend(fake(), lambda phase: None)  # the reference is in the cache now
    infer = FakeBackend.infer
    monkeypatch.setattr(FakeBackend, "infer", lambda self, batch: np.roll(infer(self, batch), 1, axis=1))
    with pytest.raises(ModelError, match=r"parity .* model.min_parity is 0.9999") as caught:
        start_backend(fake(), lambda phase: None)
    assert caught.value.exit_code == EXIT_MODEL


def test_the_limit_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    start_backend(fake(), lambda phase: None)
    infer = FakeBackend.infer
    monkeypatch.setattr(FakeBackend, "infer", lambda self, batch: np.roll(infer(self, batch), 1, axis=1))
    info = start_backend(fake(min_parity=0), lambda phase: None).info
    assert info.parity_mean is not None
    assert info.parity_mean < 0.9


@pytest.mark.parametrize(("quantization", "limit"), [("int8", 0.97), ("bf16", 0.9999), ("none", 0.9999)])
def test_the_default_limit_depends_on_the_precision(quantization: str, limit: float) -> None:
    settings = ModelSettings.model_validate({"quantized": quantization != "none", "quantization": quantization})
    assert parity.required(settings) == limit


def test_answers_that_are_not_finite_or_of_another_shape_have_no_parity() -> None:
    rows = np.ones((4, 8), np.float32)
    assert parity.compare_rows(rows * np.nan, rows, "embedding").mean == 0
    assert parity.compare_rows(rows[:3], rows, "embedding").mean == 0


def test_a_cross_encoder_is_compared_by_its_logits() -> None:
    rows = np.array([[1.0], [2.0], [4.0]], np.float32)
    assert parity.compare_rows(rows * 2 + 1, rows, "cross_encoder").mean == pytest.approx(1)
    assert parity.compare_rows(-rows, rows, "cross_encoder").mean == pytest.approx(-1)
    assert start_backend(fake(task="cross_encoder"), lambda phase: None).info.parity_mean == pytest.approx(1)


def test_without_a_cheap_reference_parity_is_not_claimed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parity, "CHEAP_PARAMETERS", -1)
    monkeypatch.setattr(parity, "_is_reference", lambda backend: False)
    assert start_backend(fake(), lambda phase: None).info.parity_mean is None
    assert "parity was not checked" in caplog.text
