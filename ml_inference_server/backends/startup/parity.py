"""Parity at load: how close a loaded backend is to plain sentence-transformers, text by text, alone and in company."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import Backend, Encoded, TextTokenizer, TokenBatch
from ml_inference_server.backends.startup.reference import Reference
from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.errors import ModelError

_BATCH = 8
_EXTREMES = 4  # texts in the batch of the shortest and the longest


@dataclass(frozen=True, slots=True)
class Parity:
    """Embeddings: mean and lowest cosine to FP32. Cross-encoders: both are the correlation of their logits.

    length_error: the largest difference of a vector's length, as a share of what it should be: what a cosine cannot
    see. Of logits: the largest difference, in standard deviations of what they should be. worst: the text of the
    lowest cosine, or of the largest difference.
    """

    mean: float
    least: float
    length_error: float = 0.0
    worst: str = ""


@dataclass(frozen=True, slots=True)
class _Limits:
    """mean: least mean cosine or correlation. least: of any text. length_error: most of any text."""

    mean: float
    least: float
    length_error: float


_EMBEDDINGS: dict[Quantization, _Limits] = {
    "none": _Limits(0.9999, 0.999, 0.01),
    "fp16": _Limits(0.9999, 0.99, 0.05),
    "bf16": _Limits(0.9999, 0.99, 0.05),
    "int8": _Limits(0.97, 0.85, 0.3),
}
# The correlation of a cross-encoder's logits falls faster than a cosine, most of all with random weights, whose logits
# lie close together.
_LOGITS: dict[Quantization, _Limits] = {
    "none": _Limits(0.9999, 0.9999, 0.05),
    "fp16": _Limits(0.99, 0.99, 1.0),
    "bf16": _Limits(0.99, 0.99, 1.0),
    "int8": _Limits(0.97, 0.97, 2.0),
}


def measure(backend: Backend, reference: Reference | None, tokenizer: TextTokenizer | None = None) -> Parity | None:
    """The parity of a loaded backend; None without a reference. ModelError if it makes other tokens of a text.

    tokenizer: one with the limit of the reference, where the backend's own has another.
    """
    if reference is None:
        return None
    encoded = _encoded(tokenizer or backend.tokenizer, reference)
    places = [i for i in range(len(encoded)) if not np.isnan(reference.rows[i]).any()]
    mixed = _run(backend, encoded, _batches(encoded, places))
    alone_places = _alone(encoded, places)
    alone = _run(backend, encoded, [[i] for i in alone_places])
    names = [_shown(reference.texts[i]) for i in [*places, *alone_places]]
    rows = np.stack([mixed[i] for i in places] + [alone[i] for i in alone_places])
    return compare_rows(rows, reference.rows[[*places, *alone_places]], backend.info.task, names)


def compare_rows(
    rows: NDArray[np.float32], reference: NDArray[np.float32], task: str, texts: Sequence[str] = ()
) -> Parity:
    """rows, reference: (probes, dimension). Not finite anywhere, or of another shape: parity 0."""
    if rows.shape != reference.shape or not np.isfinite(rows).all():
        return Parity(0.0, 0.0)
    rows, reference = rows.astype(np.float64), reference.astype(np.float64)
    if task == "cross_encoder":
        correlation = float(np.corrcoef(rows[:, 0], reference[:, 0])[0, 1])
        errors = np.abs(rows - reference)[:, 0] / max(
            float(reference.std()), 1e-3 * float(np.abs(reference).max()), 1e-9
        )
        return Parity(correlation, correlation, float(errors.max()), _at(texts, int(errors.argmax())))
    lengths, expected = np.linalg.norm(rows, axis=1), np.linalg.norm(reference, axis=1)
    is_zero = (lengths == 0) & (expected == 0)  # a text of which the model knows no word
    cosine = np.where(is_zero, 1.0, (rows * reference).sum(axis=1) / np.maximum(lengths * expected, 1e-12))
    errors = np.where(is_zero, 0.0, np.abs(lengths / np.maximum(expected, 1e-12) - 1))
    worst = int(errors.argmax()) if errors.max() > 1 - cosine.min() else int(cosine.argmin())
    return Parity(float(cosine.mean()), float(cosine.min()), float(errors.max()), _at(texts, worst))


def check(parity: Parity | None, settings: ModelSettings, task: str) -> None:
    """ModelError (exit code 3) if the answers are others than sentence-transformers', in direction or in length.

    `model.min_parity` replaces the limit of the mean, and with it those of the single texts.
    """
    if parity is None:
        return
    limits = _limits(settings, task)
    remedy = "Backend pytorch without quantisation passes; or lower model.min_parity"
    if not parity.mean >= required(settings, task):
        raise ModelError(
            f"this configuration answers too far from FP32: parity {parity.mean:.4f}, model.min_parity is "
            f"{required(settings, task)}. {remedy}"
        )
    if settings.min_parity is not None:
        return
    if not parity.least >= limits.least:
        raise ModelError(
            f"this configuration answers too far from FP32 for the text {parity.worst!r}: cosine {parity.least:.4f}, "
            f"the limit for a single text is {limits.least}. {remedy}"
        )
    if not parity.length_error <= limits.length_error:
        what = "times their standard deviation off" if task == "cross_encoder" else "of their length off"
        raise ModelError(
            f"this configuration's answers are up to {parity.length_error:.3g} {what} FP32's (text {parity.worst!r}, "
            f"limit {limits.length_error}): its pooling or normalisation is not the model's. {remedy}"
        )


def required(settings: ModelSettings, task: str) -> float:
    """`model.min_parity`, or its default for the precision."""
    return _limits(settings, task).mean if settings.min_parity is None else settings.min_parity


def _limits(settings: ModelSettings, task: str) -> _Limits:
    return (_LOGITS if task == "cross_encoder" else _EMBEDDINGS)[settings.precision]


def _encoded(tokenizer: TextTokenizer, reference: Reference) -> list[Encoded]:
    """The probes as the backend's tokenizer prepares them."""
    out: list[Encoded] = []
    for text, name in zip(reference.texts, reference.names, strict=True):
        if name is not None and name not in tokenizer.prompts:
            raise ModelError(f"the model has a prompt {name!r} that this backend does not know: refusing to drop it")
        if isinstance(text, tuple):
            out += tokenizer.encode_pairs([text])
        else:
            out += tokenizer.encode([text], name)
    if reference.tokens is not None:
        for text, one, ids in zip(reference.texts, out, reference.tokens, strict=True):
            if one.ids.tolist() != list(ids):
                raise ModelError(
                    f"the text {_shown(text)!r} becomes {one.length} tokens here and {len(ids)} in "
                    f"sentence-transformers, or others: refusing to serve answers to another text. This is a bug of "
                    f"the server for this model; please report it"
                )
    return out


def _batches(encoded: Sequence[Encoded], places: Sequence[int]) -> list[list[int]]:
    """Batches of like lengths, as real traffic has them, and one of the shortest and the longest texts."""
    order = sorted(places, key=lambda i: encoded[i].length)
    extremes = [*order[: _EXTREMES // 2], *order[-_EXTREMES // 2 :]] if len(order) > _EXTREMES else []
    rest = [i for i in order if i not in extremes]
    return [batch for batch in (extremes, *(rest[i : i + _BATCH] for i in range(0, len(rest), _BATCH))) if batch]


def _alone(encoded: Sequence[Encoded], places: Sequence[int]) -> list[int]:
    """Every eighth in the order of lengths, the shortest and the longest among them."""
    order = sorted(places, key=lambda i: encoded[i].length)
    return sorted({*order[::_BATCH], order[-1]})


def _run(
    backend: Backend, encoded: Sequence[Encoded], batches: Sequence[Sequence[int]]
) -> dict[int, NDArray[np.float32]]:
    rows: dict[int, NDArray[np.float32]] = {}
    for batch in batches:
        got = backend.infer(TokenBatch.of([encoded[i] for i in batch]))
        rows |= {place: np.array(row, np.float32) for place, row in zip(batch, got, strict=True)}
    return rows


def _shown(text: str | tuple[str, str]) -> str:
    return text[:40] if isinstance(text, str) else f"{text[0][:20]} / {text[1][:20]}"


def _at(texts: Sequence[str], place: int) -> str:
    return texts[place] if texts else ""
