"""Ranking figures of a slice, held to trec_eval's, and the gate."""

from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

from ml_inference_server.benchmark.load.dataset import PairRow
from ml_inference_server.benchmark.measure.quality import Answers, Slice, gate, judge, load_slice, rankings
from ml_inference_server.benchmark.result.document import Difference, Gate
from ml_inference_server.utils.experiment import QualitySettings
from tests.unit.report_kit import quality

QUERIES, CANDIDATES = 12, 30


@pytest.fixture(scope="module")
def labelled() -> Slice:
    random = np.random.default_rng(0)
    rows = tuple(
        PairRow(f"q{q}", f"p{q}-{p}", f"query {q}", f"passage {p} for {q}")
        for q in range(QUERIES)
        for p in range(CANDIDATES)
    )
    # Grades of ranked passages, and one relevant passage for each query that nobody ranks.
    qrels = {
        f"q{q}": {**{f"p{q}-{p}": int(random.integers(0, 4)) for p in range(0, CANDIDATES, 2)}, f"missing{q}": 3}
        for q in range(QUERIES)
    }
    return Slice("made up", rows, qrels, "0" * 64)


def vectors(labelled: Slice, seed: int, noise: float = 0.0) -> Answers:
    base = np.random.default_rng(1).normal(size=(len(labelled.texts), 16)).astype(np.float32)
    found = base + noise * np.random.default_rng(seed).normal(size=base.shape).astype(np.float32)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    place = {text: n for n, text in enumerate(labelled.texts)}
    scores = np.array([unit[place[r.query]] @ unit[place[r.passage]] for r in labelled.rows], np.float32)
    return Answers(scores, found)


def test_every_query_agrees_with_trec_eval(labelled: Slice) -> None:
    scores = np.round(np.random.default_rng(2).normal(size=len(labelled.rows)), 1).astype(np.float32)  # with ties
    found = judge(labelled, Answers(scores, None), None)
    judged = {q: dict(grades) for q, grades in labelled.qrels.items()}
    run: dict[str, dict[str, float]] = {}
    for row, score in zip(labelled.rows, scores, strict=True):
        run.setdefault(row.qid, {})[row.pid] = float(score)
    theirs = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recip_rank"}).evaluate(run)
    per_query = found.per_query
    assert per_query is not None
    for qid, ndcg, mrr in zip(per_query.qid, per_query.ndcg10, per_query.mrr10, strict=True):
        assert ndcg == pytest.approx(theirs[qid]["ndcg_cut_10"], abs=1e-5)
        first = theirs[qid]["recip_rank"]
        assert mrr == pytest.approx(first if first >= 1 / 10 else 0.0, abs=1e-5)
    assert found.ndcg_gain == "grade"
    assert found.ndcg10 == pytest.approx(np.mean([t["ndcg_cut_10"] for t in theirs.values()]), abs=1e-6)


def test_equal_scores_are_ordered_as_trec_eval_orders_them(labelled: Slice) -> None:
    ranked = rankings(labelled, np.zeros(len(labelled.rows), np.float32))
    assert ranked["q0"] == sorted(ranked["q0"], reverse=True)


def test_fp32_against_itself_loses_nothing(labelled: Slice) -> None:
    found = judge(labelled, vectors(labelled, 0), vectors(labelled, 0))
    assert found.ndcg10_difference == Difference(value=0, low=0, high=0)
    assert found.cosine_mean == pytest.approx(1)
    assert found.cosine_min == pytest.approx(1)
    assert found.overlap10 == 1
    assert gate(found, QualitySettings()) == Gate(passed=True, reasons=[])


def test_damage_is_measured_and_fails_the_gate(labelled: Slice) -> None:
    found = judge(labelled, vectors(labelled, 3, noise=1.0), vectors(labelled, 0))
    assert found.cosine_min is not None
    assert found.cosine_mean is not None
    assert found.overlap10 is not None
    assert found.cosine_min < found.cosine_mean < 0.9
    assert 0 < found.overlap10 < 0.9
    verdict = gate(found, QualitySettings(max_ndcg_loss=1.0))
    assert verdict.passed is False
    assert verdict.reasons == [f"mean cosine to FP32 is {found.cosine_mean:.4f}, quality.min_cosine is 0.97"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_ndcg_loss": 0.01}, "nDCG@10 is 0.0200 below FP32, quality.max_ndcg_loss is 0.01"),
        ({"min_ndcg": 0.6}, "nDCG@10 is 0.5000, quality.min_ndcg is 0.6"),
        ({"min_cosine": 0.999}, "mean cosine to FP32 is 0.9900, quality.min_cosine is 0.999"),
    ],
)
def test_each_bound_of_the_gate(settings: dict[str, float], reason: str) -> None:
    change = Difference(value=-0.02, low=-0.03, high=-0.01)
    found = quality(ndcg10=0.5, cosine_mean=0.99, correlation=None, ndcg10_difference=change)
    assert gate(found, QualitySettings(max_ndcg_loss=0.05)).passed
    assert gate(found, QualitySettings(**{"max_ndcg_loss": 0.05, **settings})).reasons == [reason]  # type: ignore[arg-type]


def test_a_cross_encoder_is_compared_by_its_scores(labelled: Slice) -> None:
    scores = np.random.default_rng(4).normal(size=len(labelled.rows)).astype(np.float32)
    found = judge(labelled, Answers(2 * scores + 1, None), Answers(scores, None))
    assert found.cosine_mean is None
    assert found.correlation == pytest.approx(1)
    assert found.overlap10 == 1
    assert gate(found, QualitySettings()).passed


def test_another_dimension_is_not_alike(labelled: Slice) -> None:
    ours, fp32 = vectors(labelled, 0), vectors(labelled, 0)
    assert fp32.vectors is not None
    found = judge(labelled, ours, Answers(fp32.scores, fp32.vectors[:, :8]))
    assert found.cosine_mean == 0
    assert not gate(found, QualitySettings()).passed


def test_only_judged_queries_are_asked(tmp_path: Path) -> None:
    pairs, qrels = tmp_path / "pairs.tsv", tmp_path / "qrels"
    pairs.write_text("1\ta\tone\talpha\n2\tb\ttwo\tbeta\n")
    qrels.write_text("2 0 b 1\n3 0 c 1\n")
    found = load_slice(QualitySettings(pairs=str(pairs), qrels=str(qrels)))
    assert [row.qid for row in found.rows] == ["2"]
    assert found.texts == ["two", "beta"]
    assert load_slice(QualitySettings()).facts().queries == 48
