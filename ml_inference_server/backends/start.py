"""From settings to a backend that is fit to serve: choose, resolve, load, check the label, warm up, check parity."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

from ml_inference_server.backends import auto, create_backend, parity
from ml_inference_server.backends.base import Backend, BackendInfo
from ml_inference_server.backends.resolve import Resolution, resolve
from ml_inference_server.utils.config import ModelSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Started:
    """`info` is the backend's own, with the measured parity. `auto_choice`: what auto chose and why; else empty."""

    resolution: Resolution
    backend: Backend
    info: BackendInfo
    auto_choice: str = ""


def start_backend(model: ModelSettings, phase: Callable[[str], None]) -> Started:
    """A loaded, warm, checked backend. `phase` is told what is being done. ModelError says what is not fit and why."""
    auto_choice, chosen = "", model
    if auto.is_auto(model):
        choice = auto.choose(model, phase)
        auto_choice, chosen = choice.sentence, choice.model
    phase("choosing a device")
    resolution = dataclasses.replace(resolve(chosen), requested=model)
    for sentence in resolution.fallbacks:
        log.warning("fallback: %s", sentence)
    for sentence in resolution.warnings:
        log.warning("%s", sentence)
    phase("loading the model")
    backend = create_backend(resolution.model)
    backend.load_model()
    resolution.check(backend.info)
    backend.warmup(lambda done, total: phase(f"warming up {done}/{total}"))
    phase("checking the parity to FP32")
    measured = parity.measure(backend, resolution.model)
    parity.check(measured, resolution.model)
    info = backend.info
    if measured is not None:
        info = dataclasses.replace(info, parity_mean=measured.mean, parity_min=measured.least)
    return Started(resolution, backend, info, auto_choice)
