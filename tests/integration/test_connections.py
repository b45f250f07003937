"""Connections of long life: they are asked to come anew, and neither their age nor what others send costs a call."""

import asyncio
import itertools
from collections.abc import Iterator

import grpc
import numpy as np
import psutil
import pytest

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from tests.conftest import fake_server, refusal, until
from tests.faults.raw_http2 import MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_SIZE, ResetFlood, settings_of
from tests.faults.restarts import service_config, traffic
from tests.integration.client_kit import client_of, collected

READY = grpc.ChannelConnectivity.READY


async def connected_anew(channel: grpc.aio.Channel, times: int) -> None:
    """Until the channel has been connected so often after it was not."""
    state = channel.get_state(try_to_connect=True)
    while times:
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)
        times -= state is READY


def clients_of(port: int) -> set[int]:
    """The clients' ports of the connections to a server in this process."""
    found = psutil.Process().net_connections("tcp")
    return {each.raddr.port for each in found if each.laddr.port == port and each.status == "ESTABLISHED"}


async def test_no_call_is_lost_when_connections_grow_old() -> None:
    """Of callers that repeat nothing."""
    async with fake_server(server={"max_connection_age_s": 0.3, "max_connection_age_grace_s": 5.0}) as server:
        async with traffic([server.server.grpc_port], retries=False) as going_on:
            await connected_anew(going_on.channel, 4)
        assert set(going_on.ends) == {"OK"}


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_stream_of_the_client_goes_on_over_connections_that_are_closed_under_it(kind: str) -> None:
    """Each is gone 0.4 s after it began, in the middle of answers."""
    life = {"max_connection_age_s": 0.3, "max_connection_age_grace_s": 0.1}
    async with fake_server(model={"name": "fake:base_ms=2"}, server=life) as server:
        connections: set[int] = set()

        def items() -> Iterator[tuple[int, str]]:
            """Until the fourth."""
            for number in itertools.count():
                if number % 20 == 0:
                    connections.update(clients_of(server.server.grpc_port))
                if len(connections) >= 4:
                    return
                yield number, f"text {number}"

        async with client_of(kind, server.address) as client:
            found = await collected(client.stream(items(), max_in_flight=8))
    assert set(found) == set(range(len(found)))
    assert len(found) > 20
    for number, answer in found.items():
        np.testing.assert_array_equal(answer.embeddings, fake_embedding(f"text {number}")[np.newaxis])


async def test_streams_and_headers_of_a_connection_are_bounded() -> None:
    async with fake_server(server={"max_concurrent_streams": 7}) as server:
        said = await asyncio.to_thread(settings_of, server.server.grpc_port)
        assert (said[MAX_CONCURRENT_STREAMS], said[MAX_HEADER_LIST_SIZE]) == (7, 16_384)
        request = pb.EmbedRequest(texts=["a"])
        error = await refusal(server.stub.Embed(request, metadata=(("x-large", "a" * 17_000),)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await server.stub.Embed(request)).count == 1
        # More than there is room for: the client keeps them back until their turn comes. gRPC counts a stream a moment
        # longer than its client does and may refuse the next one, which a client repeats.
        server.backend.hold()
        options = [("grpc.service_config", service_config(retries=True))]
        async with grpc.aio.insecure_channel(server.address, options=options) as channel:
            embed = rpc.InferenceServiceStub(channel).Embed
            calls = [asyncio.ensure_future(embed(pb.EmbedRequest(texts=[f"{number}"]))) for number in range(20)]
            await until(lambda: server.model.admission.requests == 7)
            server.backend.release()
            assert [reply.count for reply in await asyncio.gather(*calls)] == [1] * 20


async def test_a_flood_of_resets_fails_no_call_of_another_and_leaves_nothing() -> None:
    """20,000 calls that are reset as soon as they have begun."""
    async with fake_server() as server:
        request = pb.EmbedRequest(texts=["a"])
        await server.stub.Embed(request)
        tasks_before = len(asyncio.all_tasks())
        with ResetFlood(server.server.grpc_port, most=20_000) as flood:
            answered = 0
            while flood.thread.is_alive():
                assert (await server.stub.Embed(request)).count == 1
                answered += 1
        assert flood.resets >= 20_000
        await until(lambda: len(asyncio.all_tasks()) <= tasks_before)
        assert server.model.admission.requests == 0
        assert server.metrics.snapshot()["totals"]["by_method_and_code"]["Embed"] == {"OK": answered + 1}
