"""The limits of a server's speed: what is run, how often, and what is counted of it."""

import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ml_inference_server.backends.base import Encoded, TokenBatch
from ml_inference_server.engine_bench import ceiling, roofline
from ml_inference_server.engine_bench.ceiling import batches_of, read_requests, read_texts, run_pass, work_of
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import ConfigError, ModelError

LENGTHS = [int(length) for length in np.random.default_rng(0).lognormal(4.3, 0.5, 600).clip(8, 256)]
SMALL = {"hidden": 64, "intermediate": 64, "layers": 1}
ROWS = [Encoded(np.ones(length, np.int32)) for length in LENGTHS]


class Timed:
    """A backend that takes a millisecond of its own clock for each token that it computes."""

    def __init__(self, streams: int = 1, padding_free: bool = False) -> None:
        self.info = SimpleNamespace(concurrency=streams, padding_free=padding_free)
        self.now_s = 0.0
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def infer(self, batch: TokenBatch) -> None:
        self.shapes[(len(batch), int(batch.lengths.max()))] += 1
        self.now_s += batch.padded_tokens * 1e-3


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    backend = Timed()
    monkeypatch.setattr(time, "perf_counter", lambda: backend.now_s)
    return backend


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0, 2.5])
def test_a_pass_that_is_too_short_for_all_texts_does_not_flatter_the_backend(timed: Timed, share: float) -> None:
    """Sorted batches in little time would be the short ones only: here 0.3 of the time made 1.57 times the rate."""
    batches = batches_of(ROWS, Settings(), padding_free=False)
    computed = sum(len(batch) * max(ROWS[i].length for i in batch) for batch in batches)
    found = run_pass(timed, batches, ROWS, share * computed * 1e-3)  # type: ignore[arg-type]
    assert found.rows == pytest.approx(len(ROWS) / (computed * 1e-3))
    assert found.tokens == pytest.approx(sum(LENGTHS) / (computed * 1e-3))
    assert found.computed_tokens == pytest.approx(1000)


def test_a_warm_up_need_not_be_whole_but_meets_long_texts(timed: Timed) -> None:
    batches = batches_of(ROWS, Settings(), padding_free=False)
    computed = sum(len(batch) * max(ROWS[i].length for i in batch) for batch in batches)
    found = run_pass(timed, batches, ROWS, 0.3 * computed * 1e-3, whole=False)  # type: ignore[arg-type]
    assert sum(timed.shapes.values()) < 0.6 * len(batches)
    assert found.tokens / found.rows == pytest.approx(np.mean(LENGTHS), rel=0.3)


def test_every_batch_runs_equally_often_whatever_the_streams_do() -> None:
    backend = Timed(streams=3)
    rows = [Encoded(np.ones(length, np.int32)) for length in range(1, 80)]
    run_pass(backend, [[i] for i in range(len(rows))], rows, 0.02)  # type: ignore[arg-type]
    assert len(backend.shapes) == len(rows)
    assert len(set(backend.shapes.values())) == 1


def test_tokens_of_an_engine_without_padding_are_those_that_it_fills_up_to(timed: Timed) -> None:
    timed.info.padding_free = True
    rows = [Encoded(np.ones(3, np.int32)), Encoded(np.ones(20, np.int32))]
    found = run_pass(timed, [[0, 1]], rows, 0.0)  # type: ignore[arg-type]
    assert found.computed_tokens / found.tokens == pytest.approx(32 / 23)


def test_batches_hold_every_text_once_in_an_order_that_tells_nothing_of_length() -> None:
    batches = batches_of(ROWS, Settings(), padding_free=False)
    assert sorted(i for batch in batches for i in batch) == list(range(len(ROWS)))
    assert batches == batches_of(ROWS, Settings(), padding_free=False)
    longest = [max(ROWS[i].length for i in batch) for batch in batches]
    half = len(longest) // 2
    assert np.mean(longest[:half]) == pytest.approx(np.mean(longest[half:]), rel=0.35)
    in_turn = batches_of(ROWS, Settings(), padding_free=True)
    assert [i for batch in in_turn for i in batch] == list(range(len(ROWS)))


class Words:
    """A tokenizer of one token for each character."""

    def __init__(self, **prompts: str) -> None:
        self.prompts = prompts

    def encode(self, texts: list[str], prompt_name: str | None = None) -> list[Encoded]:
        prompt = "" if prompt_name is None else self.prompts[prompt_name]
        return [Encoded(np.ones(len(prompt + text), np.int32)) for text in texts]

    def encode_pairs(self, pairs: list[tuple[str, str]]) -> list[Encoded]:
        return [Encoded(np.ones(len(query + passage), np.int32)) for query, passage in pairs]


@pytest.mark.parametrize(
    ("requests", "cross_encoder", "lengths", "texts"),
    [
        ([["aa", "b"], ["aa"]], False, [2, 1, 2], 3),
        ([["aa", "b", "aa"]], False, [2, 1], 3),  # a server computes equal texts of a request once
        ([[("q", "aaa"), ("q", "bbbb")], [("q", "aaa")]], False, [1, 3, 4, 1, 3], 6),
        ([[("q", "aaa"), ("q", "bbbb"), ("q", "aaa")]], True, [4, 5], 6),
        ([["q", "aaa"]], True, [2, 4], 2),
    ],
)
def test_the_work_is_what_a_server_would_compute_for_the_requests(
    requests: Any, cross_encoder: bool, lengths: list[int], texts: int
) -> None:
    found = work_of(requests, Words(), is_cross_encoder=cross_encoder)  # type: ignore[arg-type]
    assert [row.length for row in found.rows] == lengths
    assert found.texts == texts


def test_queries_and_passages_of_pairs_have_their_prompts_as_in_the_server() -> None:
    words = Words(query="find: ", passage="p: ")
    requests: Any = [[("a", "a"), ("a", "bb")], ["a"]]
    found = work_of(requests, words, is_cross_encoder=False)  # type: ignore[arg-type]
    assert [row.length for row in found.rows] == [7, 4, 5, 1]


def test_requests_are_read_and_a_bad_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text('["a", "b"]\n[["q", "p"]]\n["c"]\n')
    assert read_requests(file) == [["a", "b"], [("q", "p")], ["c"]]
    monkeypatch.setattr(ceiling, "_MAX_TEXTS", 3)
    assert read_requests(file) == [["a", "b"], [("q", "p")]]
    for bad in ("{", '{"a": 1}', "[1]", '[["q"]]', '[["q", 1]]', '"text"'):
        file.write_text(f'["a"]\n{bad}\n')
        with pytest.raises(ConfigError, match=r"r\.jsonl:2: expected a JSON list of texts"):
            read_requests(file)
    file.write_text("")
    with pytest.raises(ConfigError, match="no request in it"):
        read_requests(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_requests(file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_requests(tmp_path / "none")


def test_the_texts_of_a_file_are_a_fair_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are sorted by query, often by length: their beginning is not their mix."""
    file = tmp_path / "t.tsv"
    file.write_text("".join(f"1\t{n}\tq\t{'w' * n}\n" for n in range(1, 201)))
    monkeypatch.setattr(ceiling, "_MAX_TEXTS", 100)
    found = read_texts(file, "passages")
    assert len(found) == len(set(found)) == 100
    assert found == read_texts(file, "passages")
    assert np.mean([len(text) for text in found]) == pytest.approx(100, rel=0.2)
    assert read_texts(file, "queries") == ["q"]


def test_a_precision_that_nothing_can_measure_has_no_roofline() -> None:
    assert roofline.matrix_rate(SMALL, "float16", 8, 1, 1) is None


def test_where_the_operators_cannot_be_built_there_is_a_ceiling_without_a_roofline(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> bool:
        raise ModelError("g++ cannot build the operators")

    monkeypatch.setattr(roofline, "compiler", lambda: "g++")
    monkeypatch.setattr(roofline, "has_int8_vectors", lambda: True)
    monkeypatch.setattr(roofline, "load_operators", broken)
    assert roofline.matrix_rate(SMALL, "int8", 8, 1, 1) is None
    assert "g++ cannot build the operators" in caplog.text
