"""`auto`: the fastest backend and precision here that pass the quality gate, measured once and then cached.

Every candidate is loaded, compared with FP32 and timed in a process of its own, so that a crash, its memory and its
thread settings end with it, and the server imports no library but that of the winner.
"""

import importlib.metadata
import json
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ml_inference_server.backends import BACKENDS, backend_class, create_backend
from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.backends.files.model_errors import one_line
from ml_inference_server.backends.files.model_files import architecture_of, find_model
from ml_inference_server.backends.startup import parity
from ml_inference_server.backends.startup.batches import grouped_batches
from ml_inference_server.backends.startup.own_process import in_own_process
from ml_inference_server.backends.startup.reference import reference_for
from ml_inference_server.backends.startup.resolve import DTYPES, PRECISION_NAMES, resolve
from ml_inference_server.utils.cache import cached, find
from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.cpu import available_cpus, cpu_flags, cpu_name, has_native_bf16
from ml_inference_server.utils.errors import ModelError
from ml_inference_server.utils.sample import sample_pairs

log = logging.getLogger(__name__)

PROBE_TEXTS = 128
MAX_PASSES = 9
# Passes go on for so long; a slow model still gets one.
_BUDGET_S = 2.0
# Raise it when the way to choose changes: earlier choices are then made again.
_VERSION = 3
_FILE = "choice.json"
_PACKAGES = (
    "torch", "transformers", "sentence-transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidates:
    """Name -> settings without any auto but the device's, and name -> why it cannot run here; pytorch fp32 first."""

    able: Mapping[str, ModelSettings]
    skipped: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Measured:
    """`parity` is None where no reference could be had; `limit` is what it must reach.

    unfit: what else the gate at load would refuse it for, such as a single text that is wrong.
    """

    texts_per_s: float
    parity: float | None
    limit: float
    fp32: bool
    unfit: str = ""

    @property
    def verdict(self) -> str:
        """Why it is out; empty if it passes. What runs FP32 needs no proof where none can be had."""
        if self.parity is None:
            return "" if self.fp32 else "could not be compared with FP32"
        if not self.parity >= self.limit:
            return f"failed the quality gate (parity {self.parity:.4f}, limit {self.limit})"
        return f"failed the quality gate ({self.unfit})" if self.unfit else ""


@dataclass(frozen=True, slots=True)
class Choice:
    """`model` names a backend and a precision; `sentence` says what was tried and how it went."""

    model: ModelSettings
    sentence: str


def is_auto(model: ModelSettings) -> bool:
    return "auto" in (model.backend, model.quantization)


def choose(model: ModelSettings, phase: Callable[[str], None]) -> Choice:
    """The choice for this machine and model, from the cache or measured now. ModelError if nothing passes."""
    phase("looking for the model")
    files = architecture_of(model.name) if model.random_weights else find_model(model.name)
    key = _key(model, files.model_sha256)
    entry = find("auto", key)
    if entry is not None:
        choice = _read(entry, model)
        try:
            resolve(choice.model)
        except ModelError as error:
            log.warning("what auto chose earlier does not run any more: %s", error)
            shutil.rmtree(entry, ignore_errors=True)
        else:
            log.info("%s; measured earlier, remove %s to measure again", choice.sentence, entry)
            return choice

    def make(folder: Path) -> None:
        # The folder instead of the name: no candidate has to look for the model, or to download it, once more.
        chosen, sentence = _measure_all(model.model_copy(update={"name": str(files.folder)}), phase)
        keys = chosen.model_dump(include={"backend", "device", "quantized", "quantization", "compile"})
        (folder / _FILE).write_text(json.dumps({"model": keys, "sentence": sentence}))

    choice = _read(cached("auto", key, make), model)
    log.info("%s", choice.sentence)
    return choice


def _key(model: ModelSettings, model_sha256: str) -> dict[str, object]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return {
        "version": _VERSION,
        "cpu": cpu_name(),
        "flags": sorted(cpu_flags()),
        "cpus": available_cpus(),
        "gpus": [*sorted(str(file) for file in Path("/dev").glob("nvidia[0-9]*")), os.getenv("CUDA_VISIBLE_DEVICES")],
        "packages": versions,
        "model_sha256": model_sha256,
        "model": model.model_dump(mode="json"),
    }


def _read(entry: Path, model: ModelSettings) -> Choice:
    content = json.loads((entry / _FILE).read_text())
    return Choice(model.model_copy(update=content["model"]), content["sentence"])


def candidates(model: ModelSettings) -> Candidates:
    """Each backend, device and precision that `model` leaves open. Imports every backend's library."""
    able: dict[str, ModelSettings] = {}
    skipped: dict[str, str] = {}
    for backend in [name for name in BACKENDS if name != "fake"] if model.backend == "auto" else [model.backend]:
        try:
            supported = backend_class(backend).supported()
        except Exception as error:  # a broken package is no reason to do without the others
            skipped[backend] = one_line(error)
            continue
        for device in supported if model.device == "auto" else (model.device,):
            asked = model.requested_quantization(device)
            for quantization in tuple(DTYPES) if asked == "auto" else (asked,):
                settings = model.model_copy(
                    update={
                        "backend": backend,
                        "device": device,
                        "quantized": quantization != "none",
                        "quantization": None if quantization == "none" else quantization,
                    }
                )
                try:
                    resolution = resolve(settings)
                except ModelError as error:
                    absent = quantization not in supported.get(device, ())
                    skipped[_name(backend, device, quantization)] = f"not on {device}" if absent else one_line(error)
                    continue
                name = _name(backend, resolution.device, resolution.quantization)
                if asked == "auto" and resolution.quantization != quantization:
                    skipped[_name(backend, resolution.device, quantization)] = f"not on {resolution.device}"
                elif (resolution.quantization, resolution.device) == ("bf16", "cpu") and not has_native_bf16():
                    skipped[name] = "no bf16 instructions"
                else:
                    able[name] = settings
    if not model.compile:
        for name, settings in list(able.items()):
            if settings.backend != "pytorch" or settings.device != "cpu" or settings.precision not in ("none", "bf16"):
                continue
            compiled = settings.model_copy(update={"compile": True, "allow_fallback": False})
            try:
                resolve(compiled)
            except ModelError as error:
                skipped[f"{name} compiled"] = one_line(error)
            else:
                able[f"{name} compiled"] = compiled
    return Candidates(able, skipped)


def _name(backend: str, device: str, quantization: Quantization) -> str:
    return f"{backend} {PRECISION_NAMES[DTYPES[quantization]]}" + ("" if device == "cpu" else f" on {device}")


def probe(model: ModelSettings) -> Measured:
    """Load a candidate and measure it on the sample, batched as the server would. ModelError if it is not fit."""
    resolution = resolve(model)
    reference = reference_for(resolution.model)
    backend = create_backend(resolution.model)
    backend.load_model()
    resolution.check(backend.info)
    backend.warmup(lambda done, total: None)
    closeness = parity.measure(backend, reference)
    pairs = sample_pairs()
    pairs = pairs[:: max(1, len(pairs) // PROBE_TEXTS)][:PROBE_TEXTS]
    tokenizer = backend.tokenizer
    if backend.info.task == "cross_encoder":
        rows = tokenizer.encode_pairs(pairs)
    else:
        rows = tokenizer.encode([passage for _, passage in pairs])
    # The dearest batches first, so that the streams finish together.
    batches = [TokenBatch.of([rows[i] for i in batch]) for batch in reversed(grouped_batches(rows))]
    passes_s: list[float] = []
    with ThreadPoolExecutor(backend.info.concurrency) as pool:
        list(pool.map(backend.infer, batches))
        while not passes_s or (len(passes_s) < MAX_PASSES and sum(passes_s) < _BUDGET_S):
            started = time.perf_counter()
            list(pool.map(backend.infer, batches))
            passes_s.append(time.perf_counter() - started)
    return Measured(
        texts_per_s=len(rows) / statistics.median(passes_s),
        parity=closeness.mean if closeness else None,
        limit=parity.required(resolution.model, backend.info.task),
        fp32=resolution.quantization == "none",
        unfit=_unfit(closeness, resolution.model, backend.info.task),
    )


def _unfit(closeness: parity.Parity | None, model: ModelSettings, task: str) -> str:
    try:
        parity.check(closeness, model, task)
    except ModelError as error:
        return str(error)
    return ""


def _measure_all(model: ModelSettings, phase: Callable[[str], None]) -> tuple[ModelSettings, str]:
    """The winner and the sentence about it."""
    phase("looking for backends")
    listed = in_own_process(candidates, model)
    measured: dict[str, Measured] = {}
    out: dict[str, str] = {}
    for count, (name, settings) in enumerate(listed.able.items(), 1):
        phase(f"auto: trying {name} ({count}/{len(listed.able)})")
        try:
            measured[name] = in_own_process(probe, settings)
        except ModelError as error:
            out[name] = f"failed ({error})"
    passed = {name: each.texts_per_s for name, each in measured.items() if not each.verdict}
    skipped = [f"{name} ({why})" for name, why in listed.skipped.items()]
    if not passed:
        told = [f"{name} {out.get(name) or measured[name].verdict}" for name in listed.able]
        raise ModelError(
            f"auto found nothing that is fit to serve here: {'; '.join([*told, *skipped])}. "
            f"Name a model.backend and a model.quantization, or lower model.min_parity"
        )
    winner = max(passed, key=lambda name: passed[name])
    yardstick, base = next((name, each.texts_per_s) for name, each in measured.items())

    def tell(name: str) -> str:
        if name in out:
            return f"{name} {out[name]}"
        return f"{name} {measured[name].verdict or f'{measured[name].texts_per_s / base:.1f}x'}"

    sentence = f"auto chose {winner} ({passed[winner] / base:.1f}x of {yardstick}; "
    sentence += f"tried: {', '.join(tell(name) for name in listed.able)}"
    sentence += f"; skipped: {', '.join(skipped)})" if skipped else ")"
    return listed.able[winner], sentence
