"""Equal texts of different callers, and the cache, through a whole server."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from aiohttp import web

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.benchmark.result import figures
from ml_inference_server.benchmark.target.counters import ServerCounters, difference
from ml_inference_server.metrics.tracing import Tracer
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.server.call import Call
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import BackendFailure
from tests.conftest import FakeServer, RunningServer, fake_server, free_ports, running, until
from tests.integration.otlp_receiver import attributes, otlp_receiver


def embed(server: FakeServer, *texts: str, request_id: str = "", timeout_s: float = 60) -> Any:
    call = server.stub.Embed(
        pb.EmbedRequest(texts=texts), metadata=(("x-request-id", request_id),) if request_id else (), timeout=timeout_s
    )
    return asyncio.ensure_future(call)


def rows_computed(server: FakeServer) -> int:
    return sum(len(batch.rows) for batch in server.backend.log)


def waiting(server: FakeServer) -> int:
    texts: int = server.metrics.snapshot()["queue"]["texts"]
    return texts


async def held(server: FakeServer) -> Any:
    """The engine works on a text until it is released."""
    server.backend.hold()
    first = embed(server, "the first")
    await until(lambda: server.metrics.snapshot()["queue"]["batches_in_flight"] == 1)
    return first


async def test_callers_with_one_text_get_the_same_answer_of_one_computation_and_one_who_leaves_harms_nobody() -> None:
    async with fake_server(model={"streams": 1}) as server:
        first = await held(server)
        calls = [embed(server, "alike", f"own {n}") for n in range(10)]
        late = embed(server, "alike", timeout_s=0.2)
        await until(lambda: server.model.admission.requests == 12 and waiting(server) == 11)
        calls.pop(0).cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await late
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: waiting(server) == 10)
        server.backend.release()
        answers = [await call for call in calls]
        await first
        alone = await embed(server, "alike")
        assert {answer.embeddings[: len(alone.embeddings)] for answer in answers} == {alone.embeddings}
        assert rows_computed(server) == 1 + 1 + 9 + 1
        assert server.metrics.snapshot()["totals"]["shared_texts"] == 8
        assert (server.model.admission.requests, server.model.admission.reserved_tokens) == (0, 0)


async def test_the_cache_answers_to_the_last_bit_without_the_engine_and_the_title_says_that_it_is_on() -> None:
    async with fake_server(cache={"max_mb": 2}) as server:
        computed = await embed(server, "one", "two")
        cached = await embed(server, "two", "one", "one")
        size = len(computed.embeddings) // 2
        one, two = computed.embeddings[:size], computed.embeddings[size:]
        assert cached.embeddings == two + one + one
        assert rows_computed(server) == 2
        assert (cached.timing.queue_us, cached.timing.compute_us) == (0, 0)
        assert cached.timing.total_us > 0
        totals = server.metrics.snapshot()["totals"]
        assert (totals["cache_hits"], totals["cache_misses"]) == (2, 2)
        info = await server.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.title.endswith(", cache 2 MB") == server.state.as_dict()["title"].endswith(", cache 2 MB") is True
    async with fake_server() as server:
        assert "cache" not in server.state.as_dict()["title"]


async def test_a_batch_is_linked_to_every_request_that_shares_a_text_of_it() -> None:
    async with otlp_receiver() as receiver, fake_server(model={"streams": 1}) as server:
        server.metrics.tracer = Tracer(receiver.endpoint)
        first = await held(server)
        calls = [embed(server, "alike", request_id=f"waits-{n}") for n in range(3)]
        joining = embed(server, "the first", request_id="joins")
        await until(lambda: server.model.admission.requests == 5)
        server.backend.release()
        await asyncio.gather(first, *calls, joining)
        await asyncio.to_thread(server.metrics.tracer.close)
    spans = {attributes(span)["request.id"]: span for span in receiver.named("Embed")}
    linked = [
        {name for name, span in spans.items() if span.span_id in {link.span_id for link in batch.links}}
        for batch in receiver.named("batch")
    ]
    waits = {"waits-0", "waits-1", "waits-2"}
    assert [names & (waits | {"joins"}) for names in linked] == [{"joins"}, waits]
    assert [len(names) for names in linked] == [2, 3]
    for name in waits | {"joins"}:
        (link,) = receiver.children(spans[name])["engine"].links
        assert link.span_id in {batch.span_id for batch in receiver.named("batch")}


async def test_an_engine_that_dies_of_a_text_answers_all_who_wait_for_it() -> None:
    settings = Settings.model_validate(
        free_ports(
            {
                "model": {"backend": "fake", "process_per_stream": True, "streams": 1},
                "server": {"enable_test_faults": True},
            }
        )
    )
    async with running(RunningServer, settings) as server:
        service = server.model.service
        now = asyncio.get_running_loop().time()
        call = Call("test", received_at=now, deadline=now + 60)
        texts = ["!crash", "fine", "!crash", "fine", "!crash"]
        outcomes = await asyncio.gather(*(service.embed([text], call) for text in texts), return_exceptions=True)
        for text, outcome in zip(texts, outcomes, strict=True):
            if text == "!crash":
                assert isinstance(outcome, BackendFailure)
            else:
                assert not isinstance(outcome, BaseException)
                batch = TokenBatch.of(server.model.described.tokenizer.encode([text]))
                np.testing.assert_array_equal(outcome.values, (await server.model.worker.run(batch)).rows)
        assert (server.model.admission.requests, server.model.admission.reserved_tokens) == (0, 0)
        await until(lambda: server.state.readiness()[0])


async def test_the_benchmark_counts_what_was_shared_and_what_was_cached() -> None:
    async with (
        fake_server(model={"streams": 1}, cache={"max_mb": 1}) as server,
        ServerCounters("127.0.0.1", server.server.http_port) as sidecar,
    ):
        await embed(server, "known")
        before = await sidecar.counters()
        first = await held(server)
        calls = [embed(server, "alike") for _ in range(3)]
        await until(lambda: server.model.admission.requests == 4)
        server.backend.release()
        await asyncio.gather(first, *calls, embed(server, "known", "known and new"))
        found = figures.batch_figures(difference(before, await sidecar.counters()))
    assert found is not None
    assert (found.shared_texts, found.cached_texts) == (2, 1)


@pytest.fixture
async def earlier_server() -> AsyncIterator[int]:
    """The counters of a server that shares nothing."""
    lines = [f"mlis_{name} 7\n" for name in ("tokens_total", "padding_tokens_total")]
    histogram = "# TYPE mlis_batch_texts histogram\nmlis_batch_texts_count 7\nmlis_batch_texts_sum 7\n"

    async def counters(request: web.Request) -> web.Response:
        return web.Response(text="".join(lines) + histogram)

    app = web.Application()
    app.router.add_get("/metrics/prometheus", counters)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


async def test_a_server_of_an_earlier_version_has_shared_nothing(earlier_server: int) -> None:
    async with ServerCounters("127.0.0.1", earlier_server) as sidecar:
        found = await sidecar.counters()
    assert found is not None
    assert (found["mlis_tokens_total"], found["mlis_shared_texts_total"], found["mlis_cache_hits_total"]) == (7, 0, 0)
