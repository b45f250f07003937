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
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ml_inference_server.backends import BACKENDS, backend_class, create_backend
from ml_inference_server.backends.base import Backend, TokenBatch
from ml_inference_server.backends.files.model_errors import one_line
from ml_inference_server.backends.files.model_files import architecture_of, find_model
from ml_inference_server.backends.startup import parity
from ml_inference_server.backends.startup.batches import BATCH_SIZE, grouped_batches
from ml_inference_server.backends.startup.own_process import OwnProcess, in_own_process
from ml_inference_server.backends.startup.reference import reference_for
from ml_inference_server.backends.startup.resolve import DTYPES, PRECISION_NAMES, resolve
from ml_inference_server.utils.cache import cached, find
from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.cpu import available_cpus, cpu_flags, cpu_name, has_native_bf16
from ml_inference_server.utils.errors import ModelError
from ml_inference_server.utils.sample import sample_pairs

log = logging.getLogger(__name__)

PROBE_TEXTS = 128
# Batches of queries are small: they come one by one, and the streams share those that wait.
QUERY_BATCH = 16
# Passes over all texts that decide among those that can still win, one of each in turn.
ROUNDS = 5
# Who is not this near to the best of the others when he is first timed cannot win any more; nor in the rounds, where
# all have been timed alike.
_FIRST_HOPE, _HOPE = 0.75, 0.9
# Raise it when the way to choose changes: earlier choices are then made again.
_VERSION = 4
_FILE = "choice.json"
_PACKAGES = (
    "torch", "transformers", "sentence-transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidates:
    """Name -> settings without any auto but the device's, and name -> why it cannot run here; pytorch fp32 first."""

    able: Mapping[str, ModelSettings]
    skipped: Mapping[str, str]


Rates = tuple[float, ...]
"""Texts per second for each workload: of queries and of passages; for a cross-encoder of pairs."""


@dataclass(frozen=True, slots=True)
class Closeness:
    """`parity` is None where no reference could be had; `limit` is what it must reach.

    unfit: what else the gate at load would refuse it for, such as a single text that is wrong.
    """

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
class Measured:
    """One pass over all texts; `closeness` with the second one only."""

    rates: Rates
    closeness: Closeness | None = None


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


def _name(backend: str, device: str, quantization: Quantization) -> str:
    return f"{backend} {PRECISION_NAMES[DTYPES[quantization]]}" + ("" if device == "cpu" else f" on {device}")


def probe(model: ModelSettings) -> Generator[Measured, None, None]:
    """Times a candidate each time that it is asked, on the sample, batched as the server would.

    It is loaded before the first time; before the second it is warmed up and compared with FP32. ModelError if it is
    not fit.
    """
    resolution = resolve(model)
    backend = create_backend(resolution.model)
    backend.load_model()
    resolution.check(backend.info)
    workloads = _workloads(backend)
    with ThreadPoolExecutor(backend.info.concurrency) as pool:

        def timed(closeness: Closeness | None = None) -> Measured:
            rates = []
            for batches in workloads:
                started = time.perf_counter()
                list(pool.map(backend.infer, batches))
                rates.append(sum(map(len, batches)) / (time.perf_counter() - started))
            return Measured(tuple(rates), closeness)

        timed()  # kernels are made at the first batch of their size
        yield timed()
        backend.warmup(lambda done, total: None)
        closeness = parity.measure(backend, reference_for(resolution.model))
        yield timed(
            Closeness(
                parity=closeness.mean if closeness else None,
                limit=parity.required(resolution.model, backend.info.task),
                fp32=resolution.quantization == "none",
                unfit=_unfit(closeness, resolution.model, backend.info.task),
            )
        )
        while True:
            yield timed()


def _workloads(backend: Backend) -> list[list[TokenBatch]]:
    """The batches of each workload, the dearest first, so that the streams finish together."""
    pairs = sample_pairs()
    pairs = pairs[:: max(1, len(pairs) // PROBE_TEXTS)][:PROBE_TEXTS]
    tokenizer = backend.tokenizer
    if backend.info.task == "cross_encoder":
        workloads = [(tokenizer.encode_pairs(pairs), BATCH_SIZE)]
    else:
        queries, passages = zip(*pairs, strict=True)
        workloads = [(tokenizer.encode(queries), QUERY_BATCH), (tokenizer.encode(passages), BATCH_SIZE)]
    return [
        [TokenBatch.of([rows[i] for i in batch]) for batch in reversed(grouped_batches(rows, batch_size))]
        for rows, batch_size in workloads
    ]


def _unfit(closeness: parity.Parity | None, model: ModelSettings, task: str) -> str:
    try:
        parity.check(closeness, model, task)
    except ModelError as error:
        return str(error)
    return ""


class _Race:
    """The candidates, timed against each other; those that can still win stay loaded."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}  # how each one that is out did
        self.base = ""  # the yardstick
        self._rates: dict[str, list[Rates]] = {}
        self._running: dict[str, OwnProcess[Measured]] = {}
        self._failed: set[str] = set()

    def enter(self, name: str, settings: ModelSettings) -> None:
        """Load it and time it; if it can win, compare it with FP32 as well."""
        best = self._best()
        self._running[name] = OwnProcess(probe, settings)
        try:
            self._time(name)
            self.base = self.base or name
            if self.ratio(name) < _FIRST_HOPE * best:
                self._end(name, self._told(name))
            elif (closeness := self._time(name).closeness) is not None and closeness.verdict:
                self._fail(name, closeness.verdict)
            self._drop_hopeless(_FIRST_HOPE)
        except ModelError as error:
            self._fail(name, f"failed ({error})")

    def decide(self, told: Callable[[int], None]) -> str | None:
        """Time those that are left in turn, until one is; None where all are out. told: before each round."""
        for round_ in range(ROUNDS):
            self._drop_hopeless(_HOPE if round_ else _FIRST_HOPE)
            if len(self._running) < 2:
                break
            told(round_ + 1)
            for name in list(self._running):
                try:
                    self._time(name)
                except ModelError as error:
                    self._fail(name, f"failed ({error})")
        return max(self._running, key=self.ratio, default=None)

    def fit(self, names: Collection[str]) -> str:
        """One of them that was tried and is not unfit; empty if none is."""
        return next((name for name in names if name in self._rates and name not in self._failed), "")

    def close(self) -> None:
        for process in self._running.values():
            process.close()

    def _time(self, name: str) -> Measured:
        measured = self._running[name].ask()
        self._rates.setdefault(name, []).append(measured.rates)
        return measured

    def ratio(self, name: str) -> float:
        """How fast it was, of the yardstick: the mean over the workloads."""
        rates, base = (map(statistics.median, zip(*self._rates[one], strict=True)) for one in (name, self.base))
        return statistics.fmean(rate / unit for rate, unit in zip(rates, base, strict=True))

    def _best(self) -> float:
        return max(map(self.ratio, self._running), default=0.0)

    def _told(self, name: str) -> str:
        return f"{self.ratio(name):.1f}x"

    def _drop_hopeless(self, hope: float) -> None:
        best = self._best()
        for name in list(self._running):
            if self.ratio(name) < hope * best:
                self._end(name, self._told(name))

    def _fail(self, name: str, told: str) -> None:
        self._failed.add(name)
        self._end(name, told)

    def _end(self, name: str, told: str) -> None:
        self.told[name] = told
        self._running.pop(name).close()


def _measure_all(model: ModelSettings, phase: Callable[[str], None]) -> tuple[ModelSettings, str]:
    """The winner and the sentence about it."""
    phase("looking for backends")
    listed = in_own_process(candidates, model)
    names = _in_order(listed.able)
    race = _Race()
    try:
        for count, name in enumerate(names, 1):
            phase(f"auto: trying {name} ({count}/{len(names)})")
            if faster := race.fit([other for other in names if _is_fp32_of(listed.able, name, other)]):
                race.told[name] = f"not tried ({faster} is no slower)"
            else:
                race.enter(name, listed.able[name])
        winner = race.decide(lambda round_: phase(f"auto: timing the fastest in turn ({round_}/{ROUNDS})"))
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


def _is_fp32_of(able: Mapping[str, ModelSettings], name: str, other: str) -> bool:
    """Whether `name` is the FP32 of what `other` runs in fewer bits: never faster, so only for where that is unfit."""
    one, two = able[name], able[other]
    same = (one.backend, one.device, one.compile) == (two.backend, two.device, two.compile)
    return same and one.precision == "none" and two.precision != "none"
