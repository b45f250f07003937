"""How Score and Rerank compare two embeddings: as the model's files say, which is what it was trained for.

The names and the signs are sentence-transformers' own: distances are negative, so more is always more alike.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


def similarity(name: str, a: Rows, b: Rows) -> Rows:
    """(rows,), row by row; a single row of `a` stands against all of `b`. KeyError for an unknown name."""
    return _FUNCTIONS[name](np.broadcast_to(a, b.shape), b).astype(np.float32)


def probability(name: str, scores: Rows) -> Rows:
    """Raw scores as numbers from 0 to 1 that keep their order, for protocols that promise it.

    A logit and a dot product go through the logistic function, as sentence-transformers does with a logit; a cosine
    becomes (1 + cosine) / 2; a (negative) distance 1 / (1 + distance).
    """
    wide = scores.astype(np.float64)
    if name == "cosine":
        found = (1 + wide) / 2
    elif name in ("euclidean", "manhattan"):
        found = 1 / (1 - wide)
    else:
        found = np.exp(-np.logaddexp(0, -wide))
    return found.astype(np.float32)


def _cosine(a: Rows, b: Rows) -> Rows:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine: Rows = _dot(a, b) / np.maximum(norms, 1e-12)
    return cosine.clip(-1.0, 1.0)


def _dot(a: Rows, b: Rows) -> Rows:
    product: Rows = np.einsum("ij,ij->i", a, b)
    return product


def _euclidean(a: Rows, b: Rows) -> Rows:
    distance: Rows = np.linalg.norm(a - b, axis=1)
    return -distance


def _manhattan(a: Rows, b: Rows) -> Rows:
    distance: Rows = np.abs(a - b).sum(axis=1)
    return -distance


_FUNCTIONS: dict[str, Callable[[Rows, Rows], Rows]] = {
    "cosine": _cosine,
    "dot": _dot,
    "euclidean": _euclidean,
    "manhattan": _manhattan,
}
