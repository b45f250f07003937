"""`auto`: the fastest backend and precision here that pass the quality gate, measured once and then cached.

Every candidate is loaded and timed in a process of its own (race.py), so that a crash, its memory and its thread
settings end with it, and the server imports no library but that of the winner.
"""

import functools
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ml_inference_server.backends import BACKENDS, backend_class
from ml_inference_server.backends.files.model_errors import one_line
from ml_inference_server.backends.files.model_files import architecture_of, find_model
from ml_inference_server.backends.startup.bf16_gain import bf16_gain
from ml_inference_server.backends.startup.own_process import in_own_process
from ml_inference_server.backends.startup.race import ROUNDS, Race
from ml_inference_server.backends.startup.resolve import DTYPES, PRECISION_NAMES, resolve
from ml_inference_server.utils.cache import cached, find
from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.cpu import available_cpus, cpu_flags, cpu_name, has_native_bf16
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)

# Loaded side by side: most of a start is one thread's work.
_AT_A_TIME = 2
# Raise it when the way to choose changes: earlier choices are then made again.
_VERSION = 5
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
                elif (resolution.quantization, resolution.device) == ("bf16", "cpu") and (why := slow_bf16()):
                    skipped[name] = why
                else:
                    able[name] = settings
    if not model.compile:
        for name, settings in list(able.items()):
            if settings.backend != "pytorch" or settings.device != "cpu" or settings.precision == "fp16":
                continue
            compiled = settings.model_copy(update={"compile": True, "allow_fallback": False})
            try:
                resolve(compiled)
            except ModelError as error:
                skipped[f"{name} compiled"] = one_line(error)
            else:
                able[f"{name} compiled"] = compiled
    return Candidates(able, skipped)


@functools.cache
def slow_bf16() -> str:
    """Why BF16 cannot be the fastest on this processor; empty if it can."""
    if not has_native_bf16():
        return "no bf16 instructions"
    gain = bf16_gain()
    return f"bf16 products take {1 / gain:.1f}x the time of fp32 ones" if gain < 1 else ""


def _name(backend: str, device: str, quantization: Quantization) -> str:
    return f"{backend} {PRECISION_NAMES[DTYPES[quantization]]}" + ("" if device == "cpu" else f" on {device}")


def _measure_all(model: ModelSettings, phase: Callable[[str], None]) -> tuple[ModelSettings, str]:
    """The winner and the sentence about it."""
    phase("looking for backends")
    listed = in_own_process(candidates, model)
    names = _in_order(listed.able)
    race = Race()
    try:
        waiting = list(names)
        with tqdm(total=len(names), desc="auto", disable=None) as bar:
            while waiting:
                entrants = {name: listed.able[name] for name in _first_of(waiting, listed.able)}
                for name in entrants:
                    waiting.remove(name)
                bar.set_postfix_str(", ".join(entrants))
                trying = f"auto: trying {', '.join(entrants)} ({len(names) - len(waiting)}/{len(names)})"
                phase(trying)
                log.info("%s", trying)
                race.enter(entrants)
                for name in list(waiting):
                    if faster := race.fit([other for other in names if _is_fp32_of(listed.able, name, other)]):
                        race.told[name] = f"not tried ({faster} is no slower)"
                        waiting.remove(name)
                bar.update(len(names) - len(waiting) - bar.n)
        winner = race.decide(lambda number: phase(f"auto: timing the fastest in turn ({number}/{ROUNDS})"))
        ratios = {name: race.told.get(name) or f"{race.ratio(name):.1f}x" for name in names}
    finally:
        race.close()
    told = [f"{name} {ratios[name]}" for name in names]
    skipped = [f"{name} ({why})" for name, why in listed.skipped.items()]
    if winner is None:
        raise ModelError(
            f"auto found nothing that is fit to serve here: {'; '.join([*told, *skipped])}. "
            f"Name a model.backend and a model.quantization, or lower model.min_parity"
        )
    sentence = f"auto chose {winner} ({race.ratio(winner):.1f}x of {race.base}; tried: {', '.join(told)}"
    sentence += f"; skipped: {', '.join(skipped)})" if skipped else ")"
    return listed.able[winner], sentence


def _in_order(able: Mapping[str, ModelSettings]) -> list[str]:
    """The first one is the yardstick; then those that are likely to win, so that the others can be given up early."""
    first, *rest = able
    precisions: tuple[Quantization, ...] = ("int8", "bf16", "fp16", "none")
    return [first, *sorted(rest, key=lambda name: (precisions.index(able[name].precision), not able[name].compile))]


def _first_of(waiting: Sequence[str], able: Mapping[str, ModelSettings]) -> list[str]:
    """Who is tried next. FP32 waits for the outcome of what runs fewer bits."""
    found: list[str] = []
    for name in waiting:
        if len(found) < _AT_A_TIME and not any(_is_fp32_of(able, name, other) for other in found):
            found.append(name)
    return found


def _is_fp32_of(able: Mapping[str, ModelSettings], name: str, other: str) -> bool:
    """Whether `name` is the FP32 of what `other` runs in fewer bits: never faster, so only for where that is unfit."""
    one, two = able[name], able[other]
    same = (one.backend, one.device, one.compile) == (two.backend, two.device, two.compile)
    return same and one.precision == "none" and two.precision != "none"
