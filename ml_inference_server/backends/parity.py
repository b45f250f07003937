"""Parity at load: how close a loaded backend is to FP32 PyTorch of the same weights, on the sample's texts."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import Backend, Encoded, collate
from ml_inference_server.utils.cache import cached, find
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)

SAMPLE_FILE = Path(__file__).resolve().parent.parent / "benchmark" / "sample" / "pairs.tsv"
PROBES = 32
# A second model in memory for a moment is cheap up to here; beyond it only a cached reference is used.
CHEAP_PARAMETERS = 200_000_000
_BATCH = 8
# INT8 moves the length of an embedding that is not normalised by a few percent; a forgotten normalisation by far more.
_LENGTH_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Parity:
    """Embeddings: mean and lowest cosine to FP32. Cross-encoders: both are the correlation of their logits.

    length_ratio: median length of the embeddings (largest logit) over that of FP32: what a cosine cannot see.
    """

    mean: float
    least: float
    length_ratio: float = 1.0


def sample_pairs() -> list[tuple[str, str]]:
    """(query, passage) of the sample that ships with the project, in file order."""
    rows = [line.split("\t") for line in SAMPLE_FILE.read_text(encoding="utf-8").splitlines()]
    return [(row[2], row[3]) for row in rows]


def measure(backend: Backend, settings: ModelSettings) -> Parity | None:
    """The parity of a loaded backend; None, with a log line, where no reference can be had cheaply."""
    pairs = sample_pairs()
    probes = pairs[:: len(pairs) // PROBES][:PROBES]
    rows = _run(backend, settings, probes)
    key = {
        "weights": backend.info.weights_sha256,
        "task": settings.task,
        "random_weights": settings.random_weights,
        "max_tokens": backend.info.max_tokens,
        "probes": hashlib.sha256(repr(probes).encode()).hexdigest(),
    }

    def make(folder: Path) -> None:
        if _is_reference(backend):
            reference = rows
        else:
            log.info("computing the FP32 reference for this model (once)")
            reference = _run(_fp32(settings), settings, probes)
        np.save(folder / "rows.npy", reference)

    cheap = _is_reference(backend) or backend.info.parameters <= CHEAP_PARAMETERS
    entry = cached("reference", key, make) if cheap else find("reference", key)
    if entry is None:
        log.warning("parity was not checked: start this model once with backend pytorch, device cpu, in FP32")
        return None
    return compare_rows(rows, np.load(entry / "rows.npy"), settings.task)


def compare_rows(rows: NDArray[np.float32], reference: NDArray[np.float32], task: str) -> Parity:
    """rows, reference: (probes, dimension). Not finite anywhere: parity 0."""
    if rows.shape != reference.shape or not np.isfinite(rows).all():
        return Parity(0.0, 0.0)
    if task == "cross_encoder":
        correlation = float(np.corrcoef(rows[:, 0], reference[:, 0])[0, 1])
        return Parity(correlation, correlation, float(np.abs(rows).max() / max(np.abs(reference).max(), 1e-12)))
    lengths, expected = np.linalg.norm(rows, axis=1), np.linalg.norm(reference, axis=1)
    cosine = (rows * reference).sum(axis=1) / np.maximum(lengths * expected, 1e-12)
    return Parity(float(cosine.mean()), float(cosine.min()), float(np.median(lengths / np.maximum(expected, 1e-12))))


def check(parity: Parity | None, settings: ModelSettings) -> None:
    """ModelError (exit code 3) if the mean is below `model.min_parity`, or the answers have another length."""
    least = required(settings)
    if parity is not None and not abs(parity.length_ratio - 1) <= _LENGTH_TOLERANCE:
        raise ModelError(
            f"this configuration's answers are {parity.length_ratio:.3g} times as long as FP32's: its pooling or "
            f"normalisation is not the model's. Use model.backend pytorch without quantisation"
        )
    if parity is not None and not parity.mean >= least:
        raise ModelError(
            f"this configuration answers too far from FP32: parity {parity.mean:.4f}, model.min_parity is {least}. "
            f"Backend pytorch without quantisation passes; or lower model.min_parity"
        )


def required(settings: ModelSettings) -> float:
    """`model.min_parity`, or its default for the precision.

    The correlation of a cross-encoder's logits falls faster than a cosine, most of all with random weights, whose
    logits lie close together.
    """
    if settings.min_parity is not None:
        return settings.min_parity
    if settings.quantization == "int8":
        return 0.97
    return 0.99 if settings.task == "cross_encoder" and settings.precision != "none" else 0.9999


def _is_reference(backend: Backend) -> bool:
    info = backend.info
    return (info.backend, info.device, info.dtype) == ("pytorch", "cpu", "float32") or info.backend == "fake"


def _fp32(settings: ModelSettings) -> Backend:
    from ml_inference_server.backends import create_backend

    fp32 = {"backend": "pytorch", "device": "cpu", "quantized": False, "quantization": "none"}
    reference = create_backend(settings.model_copy(update=fp32))
    reference.load_model()
    return reference


def _run(backend: Backend, settings: ModelSettings, probes: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
    """One by one batches of like length, so that the padding is that of real traffic."""
    tokenizer = backend.tokenizer
    if settings.task == "cross_encoder":
        encoded: list[Encoded] = tokenizer.encode_pairs(probes)
    else:
        encoded = tokenizer.encode([passage for _, passage in probes])
    order = sorted(range(len(encoded)), key=lambda i: encoded[i].length)
    out: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(encoded)
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        for place, row in zip(
            batch, backend.infer(collate([encoded[i] for i in batch], tokenizer.pad_id)), strict=True
        ):
            out[place] = np.array(row, np.float32)
    return np.stack(out)
