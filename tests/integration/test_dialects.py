"""The study of dialects: all of them against a real server, what it says of one that is wrong, and the load."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.benchmark.load.channel import RequestFailed, Target
from ml_inference_server.benchmark.load.dataset import Workload
from ml_inference_server.benchmark.measure.quality import Slice, load_slice
from ml_inference_server.benchmark.studies import dialects
from ml_inference_server.benchmark.studies.calls import (
    DialectMissing,
    EmbedCall,
    Floats,
    RerankCall,
    embed_dialect,
    rerank_dialect,
    scores_of,
)
from ml_inference_server.benchmark.studies.calls_grpc import GrpcDialects
from ml_inference_server.benchmark.studies.calls_http import HttpDialects
from ml_inference_server.benchmark.studies.dialect_cost import CostBench, CostLoad, CostRounds, cost_table
from ml_inference_server.benchmark.studies.dialect_equality import Equality, equality_table
from ml_inference_server.benchmark.studies.own_server import OwnServer
from ml_inference_server.benchmark.target.interrupt import Stop
from ml_inference_server.utils.errors import StartError
from ml_inference_server.utils.experiment import QualitySettings
from tests.conftest import fake_server
from tests.integration.benchmark_kit import write_pairs

EMBEDDING_INFO = {
    "max_texts": 3,
    "space_ids": {"": "0" * 16, "query": "0" * 16},  # an empty prompt leads nowhere else
    "resolved": {"similarity": "cosine", "task": "embedding"},
}

EMBEDS = {
    "OpenAI /v1/embeddings, float",
    "OpenAI /v1/embeddings, base64",
    "Cohere /v2/embed",
    "TEI /embed",
    "tei.v1 Embed, a call for each text",
    "tei.v1 EmbedStream",
    "Open Inference gRPC",
    "Open Inference REST, JSON",
    "Open Inference REST, binary",
}
SCORES = {
    "Cohere /v2/rerank",
    "TEI /rerank",
    "tei.v1 Rerank",
    "Open Inference gRPC, SCORE",
    "Open Inference REST, SCORE",
}


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "fake.yaml"
    path.write_text("name: trial\nmodel: {backend: fake}\n")
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """--pairs and --qrels of a small labelled file."""
    qrels = tmp_path / "qrels.txt"
    qrels.write_text("".join(f"{q} 0 {q * 100 + p} {p % 3}\n" for q in range(4) for p in range(5)))
    return ["--pairs", str(write_pairs(tmp_path / "pairs.tsv", 4, 5)), "--qrels", str(qrels)]


@pytest.fixture
def labelled(files: list[str]) -> Slice:
    return load_slice(QualitySettings(pairs=files[1], qrels=files[3]))


@pytest.fixture
async def bare_port() -> AsyncIterator[int]:
    """The port of an HTTP server that has no route at all."""
    runner = web.AppRunner(web.Application())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port: int = runner.addresses[0][1]
    yield port
    await runner.cleanup()


def rows_of(table: str) -> dict[str, str]:
    """name of the dialect -> its row."""
    return {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}


def test_every_dialect_gives_the_numbers_of_the_own_wire(
    experiment: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = dialects.main(["--experiment", str(experiment), "--part", "equality", *files])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    rows = rows_of(shown.out)
    assert rows.keys() == {"dialect", "---", "Embed", "Rerank", *EMBEDS, *SCORES}
    for names, against in ((EMBEDS, "Embed"), (SCORES, "Rerank")):
        for name in names:
            assert rows[name].endswith(f"| 0 | {against} | the same |"), rows[name]
    assert rows["Rerank"].endswith("| cosines of Embed | the same |")


def test_a_cross_encoder_is_asked_for_scores_alone(
    experiment: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--experiment", str(experiment), "--set", "model.task=cross_encoder", *files]
    assert dialects.main([*given, "--part", "equality"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 2 + 6
    assert rows["TEI /rerank"].endswith("| 0 | Rerank | the same |")
    assert dialects.main([*given, "--part", "cost"]) == 2
    assert "this model is a cross-encoder" in capsys.readouterr().err


def test_the_load_goes_through_each_dialect_in_turn(
    experiment: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--experiment", str(experiment), *files, "--part", "cost", "--seconds", "0.1", "--rounds", "2"]
    assert dialects.main([*given, "--dialect", "BASE64", "--dialect", "tei.v1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ") and "---" not in line]
    names = ["dialect", "Embed", "tei.v1 Embed, a call for each text", "tei.v1 EmbedStream"]
    names.append("OpenAI /v1/embeddings, base64")
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == 2 * names
    assert all(row.endswith("% | 0 |") for row in rows if "dialect" not in row)
    assert "queries, 1 per call, 32 in flight, 2 rounds, median (lowest-highest)" in lines
    assert "passages, 32 per call, 8 in flight, 2 rounds, median (lowest-highest)" in lines


async def test_a_dialect_that_the_server_has_not_is_told_with_its_answer(bare_port: int) -> None:
    async with fake_server() as server, AsyncExitStack() as stack:
        target = await stack.enter_async_context(Target("127.0.0.1", server.server.grpc_port))
        own = OwnServer(target, await target.server_info(), server.server.grpc_port, bare_port, 0)
        found = await dialects.spoken(own, stack, ["openai", "tei.v1 rerank"])
    assert [each.name for each in found.embeds] == ["Embed"]
    assert [each.name for each in found.reranks] == ["Rerank", "tei.v1 Rerank"]
    assert found.missing.keys() == {"OpenAI /v1/embeddings, float", "OpenAI /v1/embeddings, base64"}
    assert all(answer.startswith("HTTP 404: ") for answer in found.missing.values())
    assert "| OpenAI /v1/embeddings, float | - | - | - | missing (HTTP 404" in equality_table([], found.missing)


async def embed(texts: Sequence[str]) -> Floats:
    return np.array([fake_embedding(text) for text in texts])


async def a_bit_off(texts: Sequence[str]) -> Floats:
    return np.nextafter(await embed(texts), np.float32(9))


async def failing(texts: Sequence[str]) -> Floats:
    raise RequestFailed("HTTP 500", "out of ideas")


async def one_too_few(texts: Sequence[str]) -> Floats:
    return (await embed(texts))[1:]


def cosines_by(call: EmbedCall, most: int) -> RerankCall:
    async def rerank(query: str, documents: Sequence[str]) -> Floats:
        assert len(documents) <= most
        rows = await call([query, *documents])
        return np.asarray(rows[1:] @ rows[0] / np.linalg.norm(rows[1:], axis=1) / np.linalg.norm(rows[0]), np.float32)

    return rerank


async def test_numbers_that_differ_by_one_bit_are_noticed(labelled: Slice) -> None:
    done: list[None] = []
    equality = Equality(labelled, EMBEDDING_INFO, lambda: done.append(None))
    calls = {"Embed": embed, "again": embed, "off": a_bit_off, "failing": failing, "short": one_too_few}
    rows = await equality.rows([embed_dialect(name, call) for name, call in calls.items()], [])
    found = {row.name: row for row in rows}
    assert [name for name, row in found.items() if row.is_right] == ["Embed", "again"]
    assert 0 < found["off"].difference < 1e-6
    assert found["failing"].failed == "HTTP 500: out of ideas"
    assert found["short"].failed.startswith("INVALID_RESPONSE: no finite row for each of 24 texts")
    assert len(done) == 5
    table = rows_of(equality_table(rows, {}))
    assert table["off"].endswith(" | Embed | DIFFERS |")
    assert table["failing"] == "| failing | - | - | - | FAILED: HTTP 500: out of ideas |"


async def test_scores_are_held_to_rerank_and_rerank_to_the_cosines(labelled: Slice) -> None:
    equality = Equality(labelled, EMBEDDING_INFO, lambda: None)
    right, wrong = cosines_by(embed, most=3), cosines_by(a_bit_off, most=3)
    reranks = [rerank_dialect(name, call) for name, call in (("Rerank", right), ("again", right), ("off", wrong))]
    rows = await equality.rows([embed_dialect("Embed", embed)], reranks)
    assert [(row.name, row.against, row.is_right) for row in rows] == [
        ("Embed", "", True),
        ("Rerank", "cosines of Embed", True),
        ("again", "Rerank", True),
        ("off", "Rerank", False),
    ]
    prompts = Equality(labelled, EMBEDDING_INFO | {"space_ids": {"": "0", "query": "1"}}, lambda: None)
    rows = await prompts.rows([embed_dialect("Embed", embed)], reranks[:1])
    assert [(row.name, row.against) for row in rows] == [("Embed", ""), ("Rerank", "")]


def test_a_ranking_must_hold_each_document_once_and_best_first() -> None:
    assert scores_of([(2, 0.5), (0, 0.5), (1, 0.25)], 3).tolist() == [0.5, 0.25, 0.5]
    for ranks in ([(0, 0.1), (1, 0.2)], [(0, 0.2), (0, 0.1)], [(0, 0.2)], [(0, 0.2), (2, 0.1)]):
        with pytest.raises(RequestFailed, match="each document once, best first"):
            scores_of(ranks, 2)


async def test_a_server_that_is_gone_or_speaks_otherwise_is_a_failed_request(bare_port: int) -> None:
    async with HttpDialects("127.0.0.1", bare_port, "m") as http, GrpcDialects("127.0.0.1", bare_port, "m") as rpc:
        for dialect in http.embeds():
            with pytest.raises(DialectMissing, match="404: Not Found"):
                await dialect.call(["a"])
        with pytest.raises(RequestFailed) as caught:
            await rpc.embeds()[0].call(["a"])
        assert caught.value.code == "UNAVAILABLE"


async def test_failed_requests_are_counted_and_a_server_that_is_gone_ends_the_load() -> None:
    load = CostLoad(Workload("queries", ("a", "b")), 1, 2)
    turns: list[None] = []
    async with fake_server() as server, Target("127.0.0.1", server.server.grpc_port) as target:
        own = OwnServer(target, {}, server.server.grpc_port, server.server.http_port, 0)
        bench = CostBench(own, 0.05, Stop(), lambda: turns.append(None))
        found = await bench.measure(load, [embed_dialect("Embed", embed), embed_dialect("failing", failing)], 2)
    assert len(turns) == 4
    assert found["Embed"].failed.total() == 0 < found["failing"].failed["HTTP 500: out of ideas"]
    assert [len(each.texts_per_s) for each in found.values()] == [2, 2]
    assert found["failing"].texts_per_s == [0.0, 0.0]

    async def unavailable(texts: Sequence[str]) -> Floats:
        raise RequestFailed("UNAVAILABLE", "connection refused")

    async with Target("127.0.0.1", 1) as target:
        bench = CostBench(OwnServer(target, {}, 1, 1, 0), 0.05, Stop(), lambda: None)
        with pytest.raises(StartError, match="gone: the server no longer answers"):
            await bench.measure(load, [embed_dialect("gone", unavailable)], 1)


def test_the_table_of_costs_has_ratios_round_by_round_and_failures() -> None:
    base = CostRounds([100.0, 200.0, 400.0], [1.0, 1.0, 3.0], [0.5, 0.25, 0.25])
    other = CostRounds([50.0, 180.0, 400.0], [2.0, 2.0, 2.0], [0.5, 0.5, 0.5])
    other.failed.update(["HTTP 503: full", "HTTP 503: full"])
    load = CostLoad(Workload("queries", ("a",)), 1, 32)
    assert cost_table(load, {"Embed": base, "other": other}).splitlines()[4:] == [
        "| Embed | 200 (100-400) | 1.00 (1.00-1.00) | 1.00 | 25% | 0 |",
        "| other | 180 (50-400) | 0.90 (0.50-1.00) | 2.00 | 50% | 2x HTTP 503: full |",
    ]
