"""Ranking quality, against figures worked out by hand."""

import random
from math import log2
from pathlib import Path

import pytest
import pytrec_eval

from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.ranking import mean_ndcg_at, mrr_at, ndcg_at, read_qrels

GRADES = {"a": 3, "b": 1, "c": 0}


def test_ndcg_of_a_perfect_ranking_is_one() -> None:
    assert ndcg_at(10, ["a", "b", "c"], GRADES) == pytest.approx(1)


def test_ndcg_by_hand() -> None:
    ideal = 3 / log2(2) + 1 / log2(3)
    assert ndcg_at(10, ["c", "a", "x", "b"], GRADES) == pytest.approx((3 / log2(3) + 1 / log2(5)) / ideal)
    assert ndcg_at(1, ["b", "a"], GRADES) == pytest.approx(1 / 3)


def test_the_ideal_counts_relevant_passages_that_were_not_found() -> None:
    assert ndcg_at(10, ["b"], GRADES) < 0.3


def test_nothing_relevant_is_zero() -> None:
    assert ndcg_at(10, ["a"], {"a": 0}) == 0


def test_mrr() -> None:
    assert mrr_at(10, ["c", "b", "a"], GRADES) == 1 / 2
    assert mrr_at(10, ["c", "b", "a"], GRADES, relevant_from=2) == 1 / 3
    assert mrr_at(1, ["c", "a"], GRADES) == 0


def test_the_mean_is_over_judged_queries_only() -> None:
    assert mean_ndcg_at(10, {"q": ["a", "b"], "unjudged": ["a"]}, {"q": GRADES}) == pytest.approx(1)


def test_qrels_are_read_and_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "qrels"
    file.write_text("1 0 a 3\n1 Q0 b 1\n\n2 0 a 0\n")
    assert read_qrels(file) == {"1": {"a": 3, "b": 1}, "2": {"a": 0}}
    file.write_text("1 0 a 3\n1 0 b\n")
    with pytest.raises(ConfigError, match=":2: expected 'query 0 passage grade'"):
        read_qrels(file)


def test_random_rankings_equal_trec_evals() -> None:
    """The same qrels to both, also with a grade below 0 (spam in some TREC tracks), which gains nothing."""
    rng = random.Random(0)
    qrels: dict[str, dict[str, int]] = {}
    runs: dict[str, list[str]] = {}
    for query in map(str, range(200)):
        passages = [f"p{i}" for i in range(rng.randint(1, 40))]
        qrels[query] = {passage: rng.choice([-1, 0, 0, 1, 2, 3]) for passage in passages if rng.random() < 0.7} or {
            "p0": 1
        }
        runs[query] = rng.sample(passages, rng.randint(1, len(passages)))
    scores = {query: {p: -float(rank) for rank, p in enumerate(ranked)} for query, ranked in runs.items()}
    first_ten = {query: dict(list(each.items())[:10]) for query, each in scores.items()}
    ndcg = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(scores)
    mrr = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(first_ten)
    values = [ndcg[query]["ndcg_cut_10"] for query in runs]
    assert len({round(value, 6) for value in values}) > 100
    assert [ndcg_at(10, runs[query], qrels[query]) for query in runs] == pytest.approx(values)
    assert [mrr_at(10, runs[query], qrels[query]) for query in runs] == pytest.approx(
        [mrr[query]["recip_rank"] for query in runs]
    )
    assert mean_ndcg_at(10, runs, qrels) == pytest.approx(sum(values) / len(values))
