"""The clients against servers, networks and input that are not as they should be."""

import asyncio
import contextlib
from typing import Any

import grpc
import numpy as np
import pytest

from ml_inference_server import AsyncClient, Client
from ml_inference_server.api import InvalidRequestError, ModelFailedError, ServerError, UnavailableError
from ml_inference_server.api.operations import CHANNEL_OPTIONS
from ml_inference_server.proto import error_details_pb2 as details_pb
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import fake_server
from tests.integration.client_kit import client_of, expected, odd_server, ones


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Input


@pytest.mark.parametrize(
    ("method", "arguments", "field"),
    [
        ("embed", (["fine"] * 25 + [""] + ["fine"] * 3,), "texts[25]"),
        ("score", ([("a", "b")] * 25 + [("a", "")],), "pairs[25].passage"),
        ("rerank", ("a", ["fine"] * 25 + [""]), "documents[25]"),
    ],
)
async def test_a_refusal_names_the_item_in_the_callers_own_list(
    kind: str, method: str, arguments: tuple[Any, ...], field: str
) -> None:
    """However the list was split."""
    async with fake_server(server={"max_texts": 7}) as server, client_of(kind, server.address) as client:
        with pytest.raises(InvalidRequestError) as caught:
            await client.call(method, *arguments)
    assert [name for name, _ in caught.value.fields] == [field]
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("method", "arguments", "field"),
    [
        ("embed", (["fine", "half a \ud83d"],), "texts[1]"),
        ("score", ([("\udc00", "b")],), "pairs[0].query"),
        ("rerank", ("a", ["b", "\ud83d"]), "documents[1]"),
        ("rerank", ("\ud83d", ["b"]), "query"),
    ],
)
async def test_half_a_character_is_refused_by_its_place(
    kind: str, method: str, arguments: tuple[Any, ...], field: str
) -> None:
    async with client_of(kind, "127.0.0.1:1") as client:
        with pytest.raises(InvalidRequestError, match="surrogate") as caught:
            await client.call(method, *arguments)
    assert [name for name, _ in caught.value.fields] == [field]


async def test_numbers_that_make_no_sense_are_refused(kind: str) -> None:
    for options in ({"max_attempts": 0}, {"timeout_s": float("inf")}, {"timeout_s": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            (Client if kind == "sync" else AsyncClient)("127.0.0.1:1", **options)
    async with client_of(kind, "127.0.0.1:1") as client:
        with pytest.raises(ValueError, match="timeout_s"):
            await client.call("embed", ["a"], timeout_s=float("inf"))
        with pytest.raises(ValueError, match="top_k: expected a number of documents, or 0 for all, not -1"):
            await client.call("rerank", "a", ["b"], top_k=-1)


# Answers


@pytest.mark.parametrize(
    ("method", "answer", "arguments"),
    [
        ("Embed", lambda request: ones(request, missing=1), (["a", "b"],)),
        ("Embed", lambda request: pb.EmbedResponse(embeddings=b"123", count=2, dimension=4), (["a", "b"],)),
        ("Score", lambda request: pb.ScoreResponse(scores=[1.0]), ([("a", "b"), ("a", "c")],)),
        ("Rerank", lambda request: pb.RerankResponse(ranks=[pb.Rank(index=9)]), ("a", ["b"])),
        ("Rerank", lambda request: pb.RerankResponse(ranks=[pb.Rank(), pb.Rank()]), ("a", ["b", "c"])),
        ("Rerank", lambda request: pb.RerankResponse(), ("a", ["b", "c"])),
    ],
)
async def test_an_answer_to_less_than_was_asked_is_no_answer(
    kind: str, method: str, answer: Any, arguments: tuple[Any, ...]
) -> None:
    async def answered(request: Any, context: Any) -> Any:
        context.set_trailing_metadata((("request-id", "odd.1"),))
        return answer(request)

    async with odd_server(0, **{method: answered}) as target, client_of(kind, target) as client:
        with pytest.raises(ServerError) as caught:
            await client.call(method.lower(), *arguments)
    assert (caught.value.reason, caught.value.request_id) == ("MALFORMED_ANSWER", "odd.1")


async def test_parts_of_two_models_are_not_joined(kind: str) -> None:
    async def answered(request: Any, context: Any) -> Any:
        return ones(request, dimension=len(request.texts))

    async with odd_server(Embed=answered) as target, client_of(kind, target) as client:
        with pytest.raises(ServerError, match="more than one model serves there"):
            await client.call("embed", ["a"] * 1500)


async def test_the_other_parts_end_with_the_one_that_fails(kind: str) -> None:
    """The rest of a long list is not waited for: it would be thrown away."""
    cancelled = asyncio.Event()

    async def answered(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if len(request.texts) < 1024:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with odd_server(Embed=answered) as target, client_of(kind, target) as client:
        with pytest.raises(InvalidRequestError):
            await client.call("embed", ["a"] * (1024 + 7))
        await cancelled.wait()


async def test_nothing_is_embedded_by_a_model_that_is_not_there_yet(kind: str) -> None:
    async def info(request: Any, context: Any) -> Any:
        return pb.GetServerInfoResponse()

    async with odd_server(GetServerInfo=info) as target, client_of(kind, target) as client:
        with pytest.raises(UnavailableError, match="MODEL_LOADING"):
            await client.call("embed", [])


# Refusals


def status_details(*details: tuple[str, bytes]) -> bytes:
    status = details_pb.Status()
    for name, value in details:
        status.details.add(type_url=f"type.googleapis.com/google.rpc.{name}", value=value)
    return status.SerializeToString()


NO_PROTO = b"\xff\xff\xff"
REASON = details_pb.ErrorInfo(reason="R").SerializeToString()


@pytest.mark.parametrize(
    ("code", "trailers", "error", "attempts"),
    [
        ("UNAVAILABLE", {"grpc-retry-pushback-ms": "0"}, UnavailableError, 2),
        ("UNAVAILABLE", {}, UnavailableError, 2),
        ("UNAVAILABLE", {"grpc-retry-pushback-ms": "-1"}, UnavailableError, 1),
        ("UNAVAILABLE", {"grpc-retry-pushback-ms": "soon"}, UnavailableError, 1),
        ("UNAVAILABLE", {"grpc-retry-pushback-ms": "999999999"}, UnavailableError, 1),
        ("UNAVAILABLE", {"grpc-status-details-bin": NO_PROTO}, UnavailableError, 2),
        ("UNAVAILABLE", {"grpc-status-details-bin": status_details(("RetryInfo", NO_PROTO))}, UnavailableError, 2),
        ("INTERNAL", {"grpc-status-details-bin": status_details(("ErrorInfo", REASON))}, ModelFailedError, 1),
        ("INTERNAL", {}, ServerError, 1),
        ("FAILED_PRECONDITION", {}, ServerError, 1),
        ("UNIMPLEMENTED", {}, ServerError, 1),
    ],
)
async def test_a_refusal_is_repeated_where_that_is_safe_and_named_for_what_it_is(
    kind: str, code: str, trailers: dict[str, Any], error: type[ServerError], attempts: int
) -> None:
    asked: list[float | None] = []

    async def refused(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        asked.append(context.time_remaining())
        await context.abort(grpc.StatusCode[code], "no", tuple(trailers.items()))

    async with odd_server(Embed=refused) as target, client_of(kind, target, max_attempts=2, timeout_s=9) as client:
        with pytest.raises(ServerError) as caught:
            await client.call("embed", ["a"])
    assert (type(caught.value), caught.value.code, len(asked)) == (error, code, attempts), caught.value
    assert all(left is not None and left < 30 for left in asked), "every call has a deadline"


# The channel


async def test_addresses_take_their_turn_and_one_that_ends_is_left_out(kind: str) -> None:
    async with fake_server() as first, contextlib.AsyncExitStack() as rest:
        second = await rest.enter_async_context(fake_server())
        both = f"ipv4:{first.address},{second.address}"
        async with client_of(kind, both) as client:
            while not all(answered(server) for server in (first, second)):  # until it is connected to both
                await client.call("embed", ["a"])
            before = answered(first), answered(second)
            for _ in range(10):
                await client.call("embed", ["a"])
            assert (answered(first) - before[0], answered(second) - before[1]) == (5, 5)
            await rest.aclose()
            np.testing.assert_array_equal(await client.call("embed", ["still"]), expected(["still"]))


def answered(server: Any) -> int:
    codes: dict[str, int] = server.metrics.snapshot()["totals"]["by_method_and_code"].get("Embed", {})
    return codes.get("OK", 0)


async def test_an_answer_above_grpcs_own_limit_arrives(kind: str) -> None:
    async def answered(request: Any, context: Any) -> Any:
        return ones(request, dimension=2048)

    async with odd_server(Embed=answered) as target, client_of(kind, target) as client:
        assert (await client.call("embed", ["a"] * 1024)).nbytes == 8 << 20


def test_channel_options_are_names_that_grpc_knows() -> None:
    """gRPC ignores a misspelt option in silence. The list is of grpc/impl/channel_arg_names.h."""
    known = {
        "grpc.max_receive_message_length", "grpc.max_send_message_length", "grpc.keepalive_time_ms",
        "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms", "grpc.http2.max_pings_without_data",
        "grpc.max_reconnect_backoff_ms",
        "grpc.dns_min_time_between_resolutions_ms", "grpc.service_config",
    }  # fmt: skip
    assert {name for name, _ in CHANNEL_OPTIONS} <= known


def test_an_async_client_belongs_to_the_loop_that_uses_it() -> None:
    """It may be made before there is one, as a module's global say."""
    client = AsyncClient("127.0.0.1:1", max_attempts=1)

    async def use() -> None:
        async with client:
            with pytest.raises(UnavailableError):
                await client.info(timeout_s=1)

    asyncio.run(use())
