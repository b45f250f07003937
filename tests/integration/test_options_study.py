"""The study of options: its two tables against a real server round the fake backend, and what it makes of an answer."""

from pathlib import Path

import numpy as np
import pytest

from ml_inference_server.benchmark.load.dataset import PairRow
from ml_inference_server.benchmark.measure.quality import Slice
from ml_inference_server.benchmark.studies import options
from ml_inference_server.benchmark.studies.options import numbers_of, of_length_1, of_vectors
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import fake_server

TEXTS = ["what is a cell", "the unit of life", "a room"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """--experiment, --pairs and --qrels of a small trial; its passages have 13 tokens, its queries 5."""
    experiment = tmp_path / "fake.yaml"
    experiment.write_text("name: trial\nmodel: {backend: fake}\n")
    qrels = tmp_path / "qrels.txt"
    qrels.write_text("".join(f"{q} 0 {q * 100 + p} {p % 3}\n" for q in range(4) for p in range(12)))
    pairs = tmp_path / "pairs.tsv"
    rows = [(q, p) for q in range(4) for p in range(12)]
    passage = "answer {p} to question {q} of all that were asked here"
    pairs.write_text("".join(f"{q}\t{q * 100 + p}\tquestion number {q}\t{passage.format(p=p, q=q)}\n" for q, p in rows))
    return ["--experiment", str(experiment), "--pairs", str(pairs), "--qrels", str(qrels)]


def cells(table: str) -> list[list[str]]:
    """The rows of all tables, without heads and rules."""
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    found = [[cell.strip() for cell in row] for row in rows]
    return [row for row in found if row[0] not in ("---", "encoding", "overflow")]


def test_both_tables_are_measured(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert options.main([*files, "--max-tokens", "10"]) == 0
    shown = capsys.readouterr()
    assert "pairs.tsv: 4 queries, 48 pairs, 52 texts" in shown.out
    rows = cells(shown.out)
    names = ["float32", "float16", "int8", "binary documents, float32 queries", "binary, Hamming distance"]
    assert [row[:3] for row in rows[:5]] == [
        [name, "8", size] for name, size in zip(names, ("32", "16", "12", "1", "1"), strict=True)
    ]
    assert [row[0] for row in rows[:20]] == 4 * names
    assert [row[1] for row in rows[:20:5]] == ["8", "5", "2", "1"]
    assert [row[:3] for row in rows[20:]] == [
        ["none", "256", ""],
        ["cut", "10", "48"],
        ["cut_left", "10", "48"],
        ["chunk", "10", "0"],
    ]
    # The yardstick of both tables is the same, and nothing is held to itself.
    assert rows[0][3:] == rows[20][3:] == [rows[0][3], "-", "-"]
    assert all(row[4].startswith(("+", "-")) and len(row[4]) == 7 for row in [*rows[1:20], *rows[21:]])


def test_what_cannot_be_compared_is_told(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert options.main([*files, "--max-tokens", "256"]) == 2
    assert "--max-tokens has to be below the model's own limit of 256" in capsys.readouterr().err
    assert options.main([*files, "--max-tokens", "64"]) == 2
    assert "no text of pairs.tsv has more than 64 tokens: lower --max-tokens" in capsys.readouterr().err
    assert options.main([*files, "--set", "model.task=cross_encoder"]) == 2
    assert "this model is a cross-encoder" in capsys.readouterr().err


async def test_an_answer_means_the_same_numbers_in_every_encoding() -> None:
    async with fake_server() as server:
        answers = {
            name: await server.stub.Embed(pb.EmbedRequest(texts=TEXTS, dimensions=5, encoding=name))
            for name, _ in pb.Encoding.items()
        }
    plain = numbers_of(answers.pop("ENCODING_UNSPECIFIED"))
    found = {name.removeprefix("ENCODING_"): numbers_of(answer) for name, answer in answers.items()}
    assert plain.shape == (3, 5)
    assert np.array_equal(found["FLOAT32"], plain)
    assert np.abs(found["FLOAT16"] - plain).max() < 1e-3
    assert np.abs(found["INT8"] - plain).max() < 1 / 127
    assert np.array_equal(found["BINARY"], np.where(plain > 0, 1, -1))
    assert np.array_equal(found["UBINARY"], found["BINARY"])
    assert len(found) == 5


def test_equal_hamming_distances_stay_equal() -> None:
    labelled = Slice("made up", (PairRow("q", "a", "0", "1"), PairRow("q", "b", "0", "2")), {"q": {"a": 1}}, "0")
    query = np.ones((1, 384), np.float32)
    near, far = query.copy(), query.copy()
    near[0, :7], far[0, 100:107] = -1, -1
    signs = np.concatenate([query, near, far])
    scores = of_vectors(labelled, signs, signs).scores
    assert scores.tolist() == [384 - 14, 384 - 14]
    assert np.allclose(np.linalg.norm(of_length_1(signs), axis=1), 1)
