"""What a request asks beside its texts, over the server's own wire."""

import asyncio

import grpc
import numpy as np
import pytest

from ml_inference_server.api import CallDetails, Client, SpaceMismatchError
from ml_inference_server.backends.fake import DIMENSION, fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import FakeServer, fake_server, refusal
from tests.integration.test_grpc_wire import details

WORDS = [f"w{i}" for i in range(600)]
LONG = " ".join(WORDS)
LIMIT = 256  # tokens, of which the fake backend's two special ones


def matrix(reply: pb.EmbedResponse) -> np.ndarray:
    return np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)


async def embed(server: FakeServer, *texts: str, **fields: object) -> pb.EmbedResponse:
    reply: pb.EmbedResponse = await server.stub.Embed(pb.EmbedRequest(texts=texts, **fields))  # type: ignore[arg-type]
    return reply


async def test_every_text_is_told_its_tokens_and_whether_it_was_cut(server: FakeServer) -> None:
    reply = await embed(server, "a b", LONG, "a b")
    assert list(reply.token_counts) == [4, 602, 4]
    assert list(reply.used_token_counts) == [4, LIMIT, 4]
    assert (list(reply.truncated_rows), reply.truncated) == ([1], 1)
    np.testing.assert_array_equal(matrix(reply)[1], fake_embedding(LONG))


async def test_the_end_of_a_text_may_be_kept_in_place_of_its_beginning(server: FakeServer) -> None:
    reply = await embed(server, LONG, "a b", overflow=pb.OVERFLOW_CUT_LEFT)
    np.testing.assert_array_equal(matrix(reply)[0], fake_embedding(" ".join(WORDS[-(LIMIT - 2) :])))
    np.testing.assert_array_equal(matrix(reply)[1], fake_embedding("a b"))
    assert (list(reply.token_counts), list(reply.truncated_rows)) == ([602, 4], [0])
    assert list(reply.used_token_counts) == [LIMIT, 4]


async def test_a_long_text_in_windows_is_the_mean_of_them_weighted_by_tokens(server: FakeServer) -> None:
    reply = await embed(server, LONG, "a b", overflow=pb.OVERFLOW_CHUNK)
    assert (list(reply.truncated_rows), list(reply.token_counts)) == ([], [602, 4])
    assert list(reply.used_token_counts) == [602, 4]
    np.testing.assert_array_equal(matrix(reply)[1], fake_embedding("a b"))
    windows = [row for batch in server.backend.log for row in batch.rows if len(row) > 4]
    assert max(map(len, windows)) <= LIMIT
    parts, rest = [], WORDS
    room, overlap = LIMIT - 2, 32
    while rest:
        parts.append(rest[:room])
        rest = rest[room - overlap :] if len(rest) > room else []
    assert len(parts) == len(windows)
    weights = np.array([len(part) + 2 for part in parts], np.float64)
    rows = np.stack([fake_embedding(" ".join(part)) for part in parts])
    mean = (rows * weights[:, None]).sum(axis=0)
    np.testing.assert_allclose(matrix(reply)[0], mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)


async def test_a_text_that_fits_is_the_same_whatever_happens_to_others(server: FakeServer) -> None:
    for overflow in (pb.OVERFLOW_CUT, pb.OVERFLOW_CUT_LEFT, pb.OVERFLOW_REFUSE, pb.OVERFLOW_CHUNK):
        np.testing.assert_array_equal(matrix(await embed(server, "a b", overflow=overflow))[0], fake_embedding("a b"))


async def test_a_long_text_is_refused_by_name_where_that_is_asked(server: FakeServer) -> None:
    for fields in ({"truncate": False}, {"overflow": pb.OVERFLOW_REFUSE}):
        error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["a", LONG], **fields)))
        assert details(error) == ("TEXT_TOO_LONG", ["texts[1]"])
        assert "602 tokens, the model takes 256" in (error.details() or "")


async def test_contradictions_and_numbers_that_are_none_are_refused(server: FakeServer) -> None:
    for request, field in (
        (pb.EmbedRequest(texts=["a"], truncate=False, overflow=pb.OVERFLOW_CHUNK), "truncate"),
        (pb.EmbedRequest(texts=["a"], truncate=True, overflow=pb.OVERFLOW_REFUSE), "truncate"),
        (pb.EmbedRequest(texts=["a"], overflow=77), "overflow"),  # type: ignore[arg-type]
        (pb.EmbedRequest(texts=["a"], encoding=77), "encoding"),  # type: ignore[arg-type]
        (pb.EmbedRequest(texts=["a"], dimensions=0), "dimensions"),
        (pb.EmbedRequest(texts=["a"], dimensions=9), "dimensions"),
        (pb.EmbedRequest(texts=["a"], input_type="image"), "input_type"),
        (pb.EmbedRequest(texts=["a"], input_type="query", prompt_name=""), "prompt_name"),
    ):
        error = await refusal(server.stub.Embed(request))
        assert details(error) == ("INVALID_FIELD", [field]), error.details()
    np.testing.assert_array_equal(matrix(await embed(server, "a"))[0], fake_embedding("a"))


async def test_rerank_and_score_tell_the_same_of_their_texts(server: FakeServer) -> None:
    ranked = await server.stub.Rerank(pb.RerankRequest(query="q", documents=["a b", LONG], top_k=1))
    assert (list(ranked.token_counts), list(ranked.truncated_rows)) == ([4, 602], [1])
    scored = await server.stub.Score(pb.ScoreRequest(pairs=[pb.Pair(query="q", passage=LONG)]))
    assert (list(scored.token_counts), list(scored.used_token_counts)) == ([605], [LIMIT + 3])
    assert list(scored.truncated_rows) == [0]
    long_query = await server.stub.Rerank(pb.RerankRequest(query=LONG, documents=["a"]))
    assert list(long_query.truncated_rows) == []
    assert "query" in long_query.warnings[0]


async def test_a_document_may_be_limited_to_fewer_tokens_than_the_model_takes(server: FakeServer) -> None:
    limited = await server.stub.Rerank(pb.RerankRequest(query="q", documents=["a b c d", "a"], max_document_tokens=2))
    same = await server.stub.Rerank(pb.RerankRequest(query="q", documents=["a b", "a"]))
    assert [(r.index, r.score) for r in limited.ranks] == [(r.index, r.score) for r in same.ranks]
    assert list(limited.truncated_rows) == [0]


async def test_a_cross_encoder_cuts_or_refuses_and_nothing_else() -> None:
    async with fake_server(model={"task": "cross_encoder"}) as server:
        for overflow in (pb.OVERFLOW_CUT_LEFT, pb.OVERFLOW_CHUNK):
            request = pb.RerankRequest(query="q", documents=["a"], overflow=overflow)
            assert details(await refusal(server.stub.Rerank(request))) == ("INVALID_FIELD", ["overflow"])
        ranked = await server.stub.Rerank(pb.RerankRequest(query="q", documents=["a b", LONG]))
        assert list(ranked.truncated_rows) == [1]
        assert ranked.token_counts[1] > ranked.used_token_counts[1] == LIMIT


@pytest.mark.parametrize(
    ("encoding", "kind", "close"),
    [(pb.ENCODING_FLOAT16, "<f2", 1e-3), (pb.ENCODING_INT8, "i1", 5e-3), (pb.ENCODING_FLOAT32, "<f4", 0)],
)
async def test_smaller_numbers(server: FakeServer, encoding: pb.Encoding, kind: str, close: float) -> None:
    reply = await embed(server, "a b", "c", encoding=encoding)
    rows = np.frombuffer(reply.embeddings, kind).reshape(2, DIMENSION).astype(np.float32)
    scales = np.array(reply.scales or [1, 1], np.float32)
    expected = np.stack([fake_embedding("a b"), fake_embedding("c")])
    np.testing.assert_allclose(rows * scales[:, None], expected, atol=close)
    assert (reply.encoding, reply.dimension) == (encoding, DIMENSION)


async def test_bits_of_a_vector(server: FakeServer) -> None:
    reply = await embed(server, "a b", encoding=pb.ENCODING_UBINARY)
    assert len(reply.embeddings) == 1
    bits = np.unpackbits(np.frombuffer(reply.embeddings, np.uint8)).astype(bool)
    np.testing.assert_array_equal(bits, fake_embedding("a b") > 0)


async def test_the_space_is_the_same_in_answers_and_information_and_is_checked(server: FakeServer) -> None:
    reply = await embed(server, "a")
    info = await server.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert dict(info.space_ids) == {"": reply.space_id}
    assert list(info.models)[-1] == "fake"
    shorter = await embed(server, "a", dimensions=4)
    assert shorter.space_id != reply.space_id
    assert (await embed(server, "a", expect_space_id=reply.space_id.upper())).count == 1
    error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["a"], expect_space_id="0" * 16)))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error)[0] == "SPACE_MISMATCH"
    metadata = (("x-expect-space-id", "0" * 16),)
    error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["a"]), metadata=metadata))
    assert details(error)[0] == "SPACE_MISMATCH"
    right = (("x-expect-space-id", reply.space_id),)
    assert (await server.stub.Embed(pb.EmbedRequest(texts=["a"]), metadata=right)).count == 1


async def test_another_limit_of_tokens_is_another_space() -> None:
    found = set()
    for max_tokens in (64, 128):
        async with fake_server(model={"max_tokens": max_tokens}) as server:
            found.add((await embed(server, "a")).space_id)
    assert len(found) == 2


async def test_a_model_of_another_name_is_not_found_and_the_name_is_not_repeated(server: FakeServer) -> None:
    for message in (
        pb.EmbedRequest(texts=["a"], model="gpt-4"),
        pb.RerankRequest(query="q", documents=["a"], model="gpt-4"),
        pb.ScoreRequest(pairs=[pb.Pair(query="q", passage="p")], model="gpt-4"),
    ):
        method = getattr(server.stub, type(message).__name__.removesuffix("Request"))
        error = await refusal(method(message))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "gpt-4" not in (error.details() or "")
        assert "served: " in (error.details() or "")


def ask_by_client(address: str) -> None:
    with Client(address) as client:
        seen: list[CallDetails] = []
        rows = client.embed([LONG, "a"], overflow="chunk", input_type="query", on_reply=seen.append)
        assert rows.shape == (2, DIMENSION)
        assert seen[0].token_counts == (602, 3)
        assert "changes nothing" in seen[0].warnings[0]
        space_id = client.info().space_ids[""]
        assert seen[0].space_id == space_id
        assert client.embed(["a"], dimensions=4).shape == (1, 4)
        assert client.embed(["a"], expect_space_id=space_id).shape == (1, DIMENSION)
        with pytest.raises(SpaceMismatchError, match=space_id):
            client.embed(["a"], expect_space_id="0" * 16)
        [answer] = client.stream(["a"], expect_space_id="0" * 16)
        assert isinstance(answer.error, SpaceMismatchError)
        for wrong in ({"overflow": "fold"}, {"dimensions": 0}, {"overflow": "cut", "truncate": False}):
            with pytest.raises(ValueError, match=r"overflow|dimensions|truncate"):
                client.embed(["a"], **wrong)
    with Client(address, metadata=[("x-expect-space-id", "0" * 16)]) as client, pytest.raises(SpaceMismatchError):
        client.embed(["a"])


async def test_the_client_asks_for_all_of_it(server: FakeServer) -> None:
    await asyncio.to_thread(ask_by_client, server.address)
