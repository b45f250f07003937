"""Requested against resolved: refused with a remedy, or run as something else and said so everywhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from ml_inference_server.backends import backend_class, create_backend
from ml_inference_server.backends.base import BackendInfo
from ml_inference_server.backends.fake import FakeBackend
from ml_inference_server.backends.startup import resolve as resolve_module
from ml_inference_server.backends.startup.resolve import resolve, title
from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.errors import EXIT_MODEL, ModelError

FULL_GPU: Mapping[str, Sequence[Quantization]] = {"cuda": ("none", "fp16", "bf16"), "cpu": ("none", "bf16")}
CPU_ONLY: Mapping[str, Sequence[Quantization]] = {"cpu": ("none", "bf16")}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend to be another machine: what a backend supports there, and whether the CPU has bf16 instructions."""

    def have(supported: Mapping[str, Sequence[Quantization]], *, native_bf16: bool = False) -> None:
        monkeypatch.setattr(FakeBackend, "supported", staticmethod(lambda: supported))
        monkeypatch.setattr(resolve_module, "has_native_bf16", lambda: native_bf16)

    return have


def model(**keys: object) -> ModelSettings:
    return ModelSettings.model_validate({"backend": "fake", **keys})


def loaded(settings: ModelSettings, **info: Any) -> BackendInfo:
    backend = FakeBackend(settings)
    backend.load_model()
    return replace(backend.info, **info)


def test_what_is_there_runs_without_a_word(machine: Callable[..., None]) -> None:
    machine(FULL_GPU)
    resolution = resolve(model(device="cuda", quantized=True, quantization="fp16"))
    assert (resolution.device, resolution.quantization, resolution.fallbacks) == ("cuda", "fp16", ())


def test_auto_takes_the_best_device_and_is_no_fallback(machine: Callable[..., None]) -> None:
    machine(FULL_GPU)
    assert resolve(model()).device == "cuda"
    machine(CPU_ONLY)
    assert (resolve(model()).device, resolve(model()).fallbacks) == ("cpu", ())


def test_a_missing_device_is_refused_with_the_remedy(machine: Callable[..., None]) -> None:
    machine(CPU_ONLY)
    with pytest.raises(ModelError, match=r"mps is not available.*available: cpu.*allow_fallback: true") as caught:
        resolve(model(device="mps"))
    assert caught.value.exit_code == EXIT_MODEL


@pytest.mark.parametrize("asked", ["fp16", "int8"])
def test_a_missing_precision_is_refused_with_the_remedy(machine: Callable[..., None], asked: str) -> None:
    machine(CPU_ONLY)
    with pytest.raises(ModelError, match=f"{asked} is not available on cpu.*available: fp32, bf16.*allow_fallback"):
        resolve(model(device="cpu", quantized=True, quantization=asked))


@pytest.mark.parametrize(("native", "ran"), [(True, "bf16"), (False, "none")])
def test_a_fallback_never_takes_a_precision_that_the_cpu_only_emulates(
    machine: Callable[..., None], native: bool, ran: str
) -> None:
    machine(CPU_ONLY, native_bf16=native)
    resolution = resolve(model(device="mps", quantized=True, quantization="fp16", allow_fallback=True))
    assert (resolution.device, resolution.quantization) == ("cpu", ran)
    assert len(resolution.fallbacks) == 2


def test_emulated_bf16_runs_when_asked_for_but_warns(machine: Callable[..., None]) -> None:
    machine(CPU_ONLY)
    resolution = resolve(model(device="cpu", quantized=True, quantization="bf16"))
    assert (resolution.quantization, resolution.fallbacks, len(resolution.warnings)) == ("bf16", (), 1)


def test_quantized_alone_means_int8_on_cpu_and_fp16_elsewhere() -> None:
    assert model(quantized=True).requested_quantization("cpu") == "int8"
    assert model(quantized=True).requested_quantization("cuda") == "fp16"


def test_a_fallback_stands_in_the_title(machine: Callable[..., None]) -> None:
    machine(CPU_ONLY)
    resolution = resolve(model(device="mps", quantized=True, quantization="fp16", allow_fallback=True))
    assert title(resolution, loaded(resolution.model)).endswith(": requested mps fp16 -> ran cpu fp32")
    resolution = resolve(model())
    assert "requested" not in title(resolution, loaded(resolution.model))


def test_a_cache_stands_in_the_title() -> None:
    resolution = resolve(model())
    assert title(resolution, loaded(resolution.model), cache_mb=64).endswith(", cache 64 MB")
    assert "cache" not in title(resolution, loaded(resolution.model))


def test_random_weights_stand_in_the_title() -> None:
    resolution = resolve(model())
    assert "RANDOM WEIGHTS" in title(resolution, loaded(resolution.model, random_weights=True))


@pytest.mark.parametrize(
    "lie", [{"device": "cuda:0"}, {"dtype": "float16"}, {"backend": "onnx"}, {"quantized_layers": 3}]
)
def test_a_backend_that_runs_something_else_than_resolved_is_caught(lie: dict[str, object]) -> None:
    resolution = resolve(model())
    resolution.check(loaded(resolution.model))
    with pytest.raises(ModelError, match="loaded model"):
        resolution.check(loaded(resolution.model, **lie))


def test_threads_times_streams_stay_within_the_cpus(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(CPU_ONLY)
    for cpus, expected in ((1, (1, 1)), (2, (2, 1)), (8, (2, 4))):
        monkeypatch.setattr(resolve_module, "available_cpus", lambda cpus=cpus: cpus)
        concrete = resolve(model()).model
        assert (concrete.streams, concrete.threads) == expected
    assert resolve(model(threads=3, streams=5)).model.threads == 3


def test_an_unknown_backend_says_what_there_is() -> None:
    with pytest.raises(ModelError, match="no backend 'pytorhc'.*did you mean pytorch"):
        backend_class("pytorhc")


def test_a_missing_library_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("ml_inference_server.backends").backends.BACKENDS, "odd", "no_such_library.x:Y")
    with pytest.raises(ModelError, match="needs the package no_such_library: pip install"):
        create_backend(ModelSettings(backend="odd"))
