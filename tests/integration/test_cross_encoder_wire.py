"""A cross-encoder over the wire: raw logits for pairs, no embeddings."""

import grpc
import pytest

from ml_inference_server.backends.fake import fake_logit
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import fake_server, refusal
from tests.integration.test_grpc_wire import details

MODEL = {"task": "cross_encoder"}


async def test_score_and_rerank_answer_with_the_models_own_logits() -> None:
    async with fake_server(model=dict(MODEL)) as server:
        pairs = [("q", "one"), ("q", "two"), ("q", "one"), ("other", "one")]
        reply = await server.stub.Score(pb.ScoreRequest(pairs=[pb.Pair(query=q, passage=p) for q, p in pairs]))
        assert list(reply.scores) == pytest.approx([fake_logit(q, p) for q, p in pairs])
        assert sum(len(batch.rows) for batch in server.backend.log) == 3
        documents = ["a b", "c", "d e f"]
        ranking = await server.stub.Rerank(pb.RerankRequest(query="q", documents=documents))
        expected = sorted(range(3), key=lambda i: -fake_logit("q", documents[i]))
        assert [rank.index for rank in ranking.ranks] == expected


async def test_embed_is_refused() -> None:
    async with fake_server(model=dict(MODEL)) as server:
        error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["a"])))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert details(error)[0] == "WRONG_TASK"
        assert "Score, Rerank" in (error.details() or "")


async def test_bad_pairs_are_named_by_field() -> None:
    async with fake_server(model=dict(MODEL)) as server:
        error = await refusal(server.stub.Score(pb.ScoreRequest(pairs=[pb.Pair(query="q"), pb.Pair(passage="p")])))
        assert details(error) == ("EMPTY_TEXT", ["pairs[0].passage", "pairs[1].query"])
        error = await refusal(server.stub.Rerank(pb.RerankRequest(query=" ", documents=["a", "b"])))
        assert details(error) == ("EMPTY_TEXT", ["query"])
        long = pb.Pair(query="q", passage="w " * 300)
        error = await refusal(server.stub.Score(pb.ScoreRequest(pairs=[long], truncate=False)))
        assert details(error) == ("TEXT_TOO_LONG", ["pairs[0]"])


async def test_the_task_is_told() -> None:
    async with fake_server(model=dict(MODEL)) as server:
        info = await server.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (info.resolved.task, info.resolved.dimension) == ("cross_encoder", 1)
