"""How good a ranking is against graded judgements: nDCG@k and MRR@k, as trec_eval defines them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ml_inference_server.utils.errors import ConfigError

Qrels = Mapping[str, Mapping[str, int]]

# What a passage's grade is worth in nDCG. Results keep it, because earlier versions took another gain.
NDCG_GAIN = "grade"


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """query id -> passage id -> grade, from a TREC qrels file. ConfigError names the line that is not one."""
    judged: dict[str, dict[str, int]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts:
            continue
        try:
            query, _, passage, grade = parts
            judged.setdefault(query, {})[passage] = int(grade)
        except ValueError:
            raise ConfigError(f"{path}:{number}: expected 'query 0 passage grade'") from None
    return judged


def ndcg_at(k: int, ranked: Sequence[str], grades: Mapping[str, int]) -> float:
    """Normalised discounted cumulative gain of `ranked` passage ids, the gain is the grade, 0..1.

    The ideal is over all judged passages, found or not. 0 where nothing relevant is judged.
    """
    discounts = 1 / np.log2(np.arange(2, k + 2))
    gains = np.array([max(grades.get(passage, 0), 0) for passage in ranked[:k]])
    ideal = np.array(sorted((max(grade, 0) for grade in grades.values()), reverse=True)[:k])
    best = float((ideal * discounts[: len(ideal)]).sum())
    return float((gains * discounts[: len(gains)]).sum()) / best if best else 0.0


def mrr_at(k: int, ranked: Sequence[str], grades: Mapping[str, int], relevant_from: int = 1) -> float:
    """1 / rank of the first passage with at least grade `relevant_from` among the first k, else 0."""
    for rank, passage in enumerate(ranked[:k], 1):
        if grades.get(passage, 0) >= relevant_from:
            return 1 / rank
    return 0.0


def mean_ndcg_at(k: int, runs: Mapping[str, Sequence[str]], qrels: Qrels) -> float:
    """The mean over the queries of `runs` that have judgements."""
    values = [ndcg_at(k, ranked, qrels[query]) for query, ranked in runs.items() if query in qrels]
    return float(np.mean(values)) if values else 0.0
