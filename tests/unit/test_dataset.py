"""Where the benchmark's texts come from, and what it says when they cannot be had."""

import asyncio
import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from ml_inference_server.benchmark.load import dataset as module
from ml_inference_server.benchmark.load.dataset import Dataset, PairRow, Workload, load_dataset, read_file
from ml_inference_server.benchmark.load.hub import HubUnreachable, fetch_ms_marco
from ml_inference_server.utils.errors import ConfigError

LISTED = {"query_id": 7, "query": "why is the sky blue", "passages": [{"passage_text": "light", "is_selected": 1}]}
COLUMNS = {**LISTED, "passages": {"passage_text": ["light"], "is_selected": [1], "url": ["u"]}}
DOWNLOAD = {
    "query": {"0": "why is the sky blue"},
    "query_id": {"0": 7},
    "passages": {"0": LISTED["passages"]},
    "answers": {"0": ["x"]},
}


def load(source: object) -> Dataset:
    return asyncio.run(load_dataset(str(source)))


def test_four_columns_hash_like_the_file(tmp_path: Path) -> None:
    text = "1\t10\tfirst query\tfirst passage\n1\t11\tfirst query\tsecond, größer\n"
    path = tmp_path / "pairs.tsv"
    path.write_text(text, encoding="utf-8")
    loaded = load(path)
    assert loaded.rows == (
        PairRow("1", "10", "first query", "first passage"),
        PairRow("1", "11", "first query", "second, größer"),
    )
    assert loaded.sha256 == hashlib.sha256(text.encode()).hexdigest()
    facts = loaded.facts()
    assert (facts["name"], facts["queries"], facts["passages"]) == ("pairs.tsv", 1, 2)


def test_two_columns_serve_queries_only(tmp_path: Path) -> None:
    path = tmp_path / "queries.tsv"
    path.write_text("1\tone\n2\ttwo\n")
    loaded = load(path)
    assert set(loaded.workload("queries", 0).items) == {"one", "two"}
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for kind in ("passages", "pairs"):
        with pytest.raises(ConfigError, match=r"queries\.tsv holds queries only.*qid<TAB>pid"):
            loaded.workload(kind, 0)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(LISTED) + "\n" + json.dumps(LISTED) + "\n",
        json.dumps(COLUMNS) + "\n",
        json.dumps([LISTED, COLUMNS], indent=1),
        json.dumps(LISTED, indent=1),
        json.dumps(DOWNLOAD),
        json.dumps(DOWNLOAD, indent=1),
    ],
    ids=["jsonl", "jsonl of the hub", "list", "one record", "official download", "official download, indented"],
)
def test_every_json_layout(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dev.json"
    path.write_text(text)
    rows = load(path).rows
    assert set(rows) == {PairRow("7", "7-0", "why is the sky blue", "light")}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"bad\.tsv: no text in it"),
        (b"\n\n", "no text in it"),
        (b"only one column\n", r"bad\.tsv:1: 1 tab-separated"),
        (b"1\t2\tthree\n", r"bad\.tsv:1: 3 tab-separated column\(s\), expected qid<TAB>pid<TAB>query<TAB>passage or"),
        (b"1\ta\n1\tb\tc\n", r"bad\.tsv:2: 3 tab-separated column\(s\), expected 2 as in the first line"),
        (b"1\t2\tq\tp\n1\t2\tq\t \n", r"bad\.tsv:2: column 4 is empty"),
        (b"1\t2\tq\tp\n1\t2\tq\t\xff\n", r"bad\.tsv:2: not UTF-8 text"),
        (b'{"query": "a"\n', r"bad\.tsv:2: not valid JSON"),
        (b'{"query": "a", "passages": []}\n{"query": 1}\n', r"bad\.tsv:2: no query"),
        (b'{"query": "a", "passages": 3}\n', r"bad\.tsv:1: no passages\.passage_text"),
        (b'{"query": "a", "passages": [{"text": "b"}]}\n', r"bad\.tsv:1: no passages\.passage_text"),
        (b'[{"query": "a", "passages": ["b"]}]\n', "no passages.passage_text"),
        (b"[1, 2]\n", r"bad\.tsv:1: no query"),
        (b'{"query": "a", "passages": [{"passage_text": "\\ud800"}]}\n', r"bad\.tsv:1: .*surrogate"),
        (b'{"query": "a", "passages": []}\n', "no text in it"),
    ],
)
def test_malformed_files_name_file_line_and_layout(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        load(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.tsv: no such file; give a file of MS MARCO text, or one of auto"):
        load(tmp_path / "nowhere.tsv")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"no version 'v9'; it has: v1\.1, v2\.1"):
        load("ms_marco:v9")


def test_a_long_file_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    path = tmp_path / "queries.tsv"
    path.write_text("".join(f"{i}\tq{i}\n" for i in range(4)))
    loaded = load(path)
    assert len(loaded.rows) == 3
    assert "only the first 3 rows" in loaded.note
    path.write_text("".join(f"{i}\tq{i}\n" for i in range(3)))
    assert load(path).note == ""


def test_the_sample_serves_every_workload() -> None:
    loaded = load("sample")
    assert loaded.name == "sample (bundled)"
    for kind in ("queries", "passages", "pairs"):
        assert len(loaded.workload(kind, 0).items) >= 40


def test_auto_falls_back_to_the_sample_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def unreachable(config: str) -> list[Any]:
        raise HubUnreachable("no network")

    monkeypatch.setattr(module, "fetch_ms_marco", unreachable)
    loaded = load("auto")
    assert loaded.rows == load("sample").rows
    assert loaded.name == "sample (bundled), in place of MS MARCO"
    assert "(no network), so the bundled sample is used" in loaded.note
    assert "bundled sample is used instead" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="MS MARCO cannot be fetched: no network; use --dataset sample"):
        load("ms_marco")


def test_records_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    async def records(config: str) -> list[Any]:
        return [COLUMNS | {"query": f"{config} {i}"} for i in range(2)]

    monkeypatch.setattr(module, "fetch_ms_marco", records)
    assert [row.query for row in load("ms_marco:v2.1").rows] == ["v2.1 0", "v2.1 1"]
    assert load("auto").name == "MS MARCO v1.1"


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        with pytest.raises(HubUnreachable, match=r"no answer within 0\.5 s"):
            asyncio.run(fetch_ms_marco("v1.1", reach_timeout_s=0.5))


def test_a_hub_that_refuses_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(HubUnreachable, match=r"no network: .*refused"):
        asyncio.run(fetch_ms_marco("v1.1"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE is set"):
        asyncio.run(fetch_ms_marco("v1.1"))


def test_the_seed_alone_decides_the_order(tmp_path: Path) -> None:
    path = tmp_path / "queries.tsv"
    path.write_text("".join(f"{i}\tq{i}\n" for i in range(50)) + "50\tq0\n")
    loaded = read_file(path, name="q")
    first = loaded.workload("queries", 1).items
    assert first == loaded.workload("queries", 1).items
    assert first != loaded.workload("queries", 2).items
    assert sorted(first) == sorted(f"q{i}" for i in range(50))  # the double is sent once


def test_requests_take_items_in_turn_and_start_over() -> None:
    work = Workload("queries", tuple("abcde"))
    assert [work.batch(i, 2) for i in range(3)] == [["a", "b"], ["c", "d"], ["e", "a"]]
    assert work.batch(0, 7) == list("abcdeab")
    assert [work.distinct_texts(n) for n in (0, 3, 99)] == [0, 3, 5]
    assert Workload("pairs", (("q", "a"), ("q", "b"))).distinct_texts(2) == 3


def test_warmup_sends_other_texts_than_the_first_measured_ones() -> None:
    work = Workload("queries", tuple(range(100)))
    warm = {text for i in range(5) for text in work.batch(i, 8, from_end=True)}
    measured = {text for i in range(7) for text in work.batch(i, 8)}
    assert len(warm) == 40
    assert not warm & measured
