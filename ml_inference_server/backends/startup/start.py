"""From settings to a backend that is fit to serve: choose, resolve, load, check the label, warm up, check parity."""

import dataclasses
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ml_inference_server.backends import create_backend
from ml_inference_server.backends.base import Backend, BackendInfo, Progress, TextTokenizer, TokenBatch
from ml_inference_server.backends.exported.folder import open_folder
from ml_inference_server.backends.files.model_errors import shown, start_errors
from ml_inference_server.backends.files.pooling import pooling_of
from ml_inference_server.backends.startup import auto, parity
from ml_inference_server.backends.startup.reference import read_reference, reference_for
from ml_inference_server.backends.startup.resolve import Resolution, resolve
from ml_inference_server.backends.text.probes import PROBES
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError
from ml_inference_server.utils.installation import pip_install

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A started model as the server knows it; can be sent from one process to another.

    `info` is the backend's own, with the measured parity. `auto_choice`: what auto chose and why; else empty. pooling:
    cls, mean or last_token, where the model's files say so in one of these words; else empty.
    """

    resolution: Resolution
    info: BackendInfo
    tokenizer: TextTokenizer
    auto_choice: str = ""
    pooling: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Described):
    """With the backend itself."""

    backend: Backend

    def described(self) -> Described:
        return Described(
            resolution=self.resolution,
            info=self.info,
            tokenizer=self.tokenizer,
            auto_choice=self.auto_choice,
            pooling=self.pooling,
        )


def start_backend(
    model: ModelSettings, phase: Callable[[str], None], loaded: Callable[[Resolution], None] = lambda resolution: None
) -> Started:
    """A loaded, warm, checked backend. ModelError says what is not fit and why.

    phase: is told what is being done. loaded: is told what runs once it is loaded and all caches are filled, before it
    is warmed up and checked.
    """
    with start_errors(model):
        return _start(model, phase, loaded)


def _start(model: ModelSettings, phase: Callable[[str], None], loaded: Callable[[Resolution], None]) -> Started:
    phase("looking for the model")
    auto_choice, chosen = "", model
    folder = open_folder(model.name)
    if folder is not None:
        model = folder.requested(model)
        chosen = folder.concrete(model)
    else:
        if model.backend != "fake":
            need_libraries(model)
        if auto.is_auto(model):
            choice = auto.choose(model, phase)
            auto_choice, chosen = choice.sentence, choice.model
    phase("choosing a device")
    resolution = dataclasses.replace(resolve(chosen), requested=model)
    for sentence in resolution.fallbacks:
        log.warning("fallback: %s", sentence)
    for sentence in resolution.warnings:
        log.warning("%s", sentence)
    phase("looking for the FP32 reference")
    reference = reference_for(resolution.model) if folder is None else read_reference(folder.path)
    phase("loading the model")
    backend = _loaded(resolution)
    loaded(resolution)
    backend.warmup(lambda done, total: phase(f"warming up {done}/{total}"))
    phase("checking the parity to FP32")
    info = backend.info
    is_cut_shorter = folder is not None and info.max_tokens < folder.manifest.text.max_tokens
    measured = parity.measure(backend, reference, folder.tokenizer() if folder and is_cut_shorter else None)
    parity.check(measured, resolution.model, info.task)
    if model.process_per_stream:
        info = dataclasses.replace(info, concurrency=resolution.model.streams)
    if measured is not None:
        info = dataclasses.replace(info, parity_mean=measured.mean, parity_min=measured.least)
    info = dataclasses.replace(info, normalized=_is_normalized(backend))
    return Started(
        resolution=resolution,
        backend=backend,
        info=info,
        tokenizer=backend.tokenizer,
        auto_choice=auto_choice,
        pooling=pooling(resolution.model) if folder is None else folder.manifest.source.pooling,
    )


def pooling(model: ModelSettings) -> str:
    """As `pooling_of`, of the model that the settings name; empty for the fake backend."""
    if model.backend == "fake":
        return ""
    from ml_inference_server.backends.model.loading import locate

    files, kind = locate(model)
    return pooling_of(files.folder, kind)


def _is_normalized(backend: Backend) -> bool:
    """Whether its vectors have length 1: a model's files may say so in several ways, its answers in one."""
    if backend.info.task == "cross_encoder":
        return False
    name = next(iter(backend.tokenizer.prompts)) if backend.tokenizer.needs_prompt_name else None
    rows = backend.infer(TokenBatch.of(backend.tokenizer.encode(PROBES, name)))
    return bool(np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-2))


def need_libraries(model: ModelSettings) -> None:
    """ModelError if what reads a model's own files is not installed."""
    for package in ("torch", "transformers", "sentence_transformers"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"model {shown(model.name)} is no exported folder, and any other model needs the package {package}: "
                f"export it on a machine that has it (mlis export {shown(model.name)} FOLDER) and serve the folder, or "
                f"{pip_install('torch')}"
            )


def load_resolved(resolution: Resolution, progress: Progress) -> Backend:
    """A loaded, warm backend that runs what was resolved; where each stream has a process, one stream of it."""
    with start_errors(resolution.model):
        backend = _loaded(resolution)
        backend.warmup(progress)
        return backend


def _loaded(resolution: Resolution) -> Backend:
    model = resolution.model
    backend = create_backend(model.model_copy(update={"streams": 1}) if model.process_per_stream else model)
    backend.load_model()
    resolution.check(backend.info)
    return backend
