"""The clients for other services, against real servers: what they promise, and what they do when a server does not."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from ml_inference_server import Client
from ml_inference_server.api import (
    CallDetails,
    DeadlineExceededError,
    InvalidRequestError,
    ModelFailedError,
    OverloadedError,
    ServerError,
    StreamAnswer,
    UnavailableError,
    WrongTaskError,
)
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import FakeServer, fake_server, until
from tests.integration.client_kit import client_of, collected, expected
from tests.integration.server_process import ROOT, server_process


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_answers_are_those_of_the_bare_stub_bit_for_bit(kind: str) -> None:
    texts = ["one", "zwei drei", "東京", "null\0byte"]
    async with fake_server() as server, client_of(kind, server.address) as client:
        bare = await server.stub.Embed(pb.EmbedRequest(texts=texts))
        got = await client.call("embed", texts)
        assert (got.dtype, got.shape) == (np.float32, (4, 8))
        assert got.tobytes() == bare.embeddings
        assert got.flags.writeable
        scores = await server.stub.Score(pb.ScoreRequest(pairs=[pb.Pair(query="a b", passage=text) for text in texts]))
        assert (await client.call("score", [("a b", text) for text in texts])).tolist() == list(scores.scores)
        ranks = await server.stub.Rerank(pb.RerankRequest(query="a b", documents=texts, top_k=2))
        found = await client.call("rerank", "a b", texts, top_k=2)
        assert [(rank.index, rank.score) for rank in found] == [(rank.index, rank.score) for rank in ranks.ranks]
        info = await client.call("info")
        assert (info.model, info.task, info.dimension, info.max_texts) == ("fake", "embedding", 8, 1024)


async def test_nothing_asked_is_nothing_answered(kind: str) -> None:
    async with fake_server() as server, client_of(kind, server.address) as client:
        assert (await client.call("embed", [])).shape == (0, 8)
        assert (await client.call("score", [])).shape == (0,)
        assert await client.call("rerank", "a", []) == []
        assert [answer async for answer in client.stream([])] == []


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("embed", ("one text",), "texts is one text: pass a list of texts"),
        ("embed", (["a", None],), r"texts\[1\]: expected a str, not NoneType"),
        ("score", ([("a", "b"), "ab"],), r"pairs\[1\]: expected \(query, passage\), two str, not 'ab'"),
        ("rerank", (["a"], ["b"]), "query: expected a str"),
        ("rerank", ("a", "b"), "documents is one text"),
    ],
)
async def test_what_is_no_text_is_refused_before_it_is_sent(
    kind: str, method: str, arguments: tuple[Any, ...], message: str
) -> None:
    async with client_of(kind, "127.0.0.1:1") as client:
        with pytest.raises(TypeError, match=message):
            await client.call(method, *arguments)


async def test_a_list_above_the_servers_limits_is_split_and_keeps_its_order(kind: str) -> None:
    """By count, by the bytes of the question, and by those of the answer; the client finds out by itself."""
    limits = {"max_texts": 7, "max_text_bytes": 4096, "max_message_bytes": 65536}
    async with fake_server(server=limits) as server, client_of(kind, server.address) as client:
        texts = [f"text {i}" for i in range(40)]
        details: list[CallDetails] = []
        got = await client.call("embed", texts, on_reply=details.append)
        np.testing.assert_array_equal(got, expected(texts))
        assert [each.texts for each in details] == [7, 7, 7, 7, 7, 5]
        assert all(each.request_id and each.timing.total_us for each in details)
        scores = await client.call("score", [("a b", text) for text in texts])
        assert scores.tolist() == [(await client.call("score", [("a b", text)]))[0] for text in texts]
        ranks = await client.call("rerank", "text 3", texts, top_k=9)
        similar = scores_of("text 3", texts)
        order = sorted(range(40), key=lambda i: (-similar[i], i))[:9]
        assert [rank.index for rank in ranks] == order
    async with (
        fake_server(server={"max_text_bytes": 40_000, "max_message_bytes": 65536}) as server,
        client_of(kind, server.address) as client,
    ):
        long = [f"{i} " + "x" * 30_000 for i in range(5)]
        np.testing.assert_array_equal(await client.call("embed", long), expected(long))


def scores_of(query: str, texts: list[str]) -> list[float]:
    rows = expected([query, *texts])
    return [float(row @ rows[0]) for row in rows[1:]]


async def test_a_text_that_no_splitting_helps_is_an_error_at_once(kind: str) -> None:
    limits = {"max_text_bytes": 65536, "max_message_bytes": 65536}
    async with fake_server(server=limits) as server, client_of(kind, server.address) as client:
        with pytest.raises(OverloadedError, match="server.max_message_bytes"):
            await client.call("embed", ["x" * 65536])


async def test_each_refusal_is_an_exception_of_its_own(kind: str) -> None:
    async with (
        fake_server(server={"enable_test_faults": True}) as server,
        client_of(kind, server.address, metadata=[("x-request-id", "mine.1")]) as client,
    ):
        with pytest.raises(InvalidRequestError) as empty:
            await client.call("embed", ["fine", ""])
        assert (empty.value.code, empty.value.reason, empty.value.request_id) == (
            "INVALID_ARGUMENT", "EMPTY_TEXT", "mine.1",
        )  # fmt: skip
        assert [field for field, _ in empty.value.fields] == ["texts[1]"]
        with pytest.raises(InvalidRequestError, match="TEXT_TOO_LONG"):
            await client.call("embed", ["many words " * 400], truncate=False)
        with pytest.raises(InvalidRequestError, match="prompt"):
            await client.call("embed", ["a"], prompt_name="no such")
        with pytest.raises(ModelFailedError, match="BACKEND_ERROR"):
            await client.call("embed", ["!raise"])
        server.backend.hold()
        with pytest.raises(DeadlineExceededError):
            await client.call("embed", ["slow"], timeout_s=0.2)
        server.backend.release()
        np.testing.assert_array_equal(await client.call("embed", ["well"]), expected(["well"]))
    async with (
        fake_server(model={"task": "cross_encoder"}) as server,
        client_of(kind, server.address) as client,
    ):
        with pytest.raises(WrongTaskError, match="WRONG_TASK"):
            await client.call("embed", ["a"])


async def test_texts_that_were_cut_are_said_once_and_counted_each_time(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with fake_server() as server, client_of(kind, server.address) as client:
        details: list[CallDetails] = []
        for _ in range(2):
            await client.call("embed", ["many words " * 400, "few"], on_reply=details.append)
    assert [(each.texts, each.truncated) for each in details] == [(2, 1), (2, 1)]
    assert caplog.text.count("1 of 2 texts were longer than the model's limit and were cut") == 1


async def test_a_full_queue_is_waited_for_as_long_as_the_server_says(kind: str) -> None:
    async with (
        fake_server(batching={"max_queue_requests": 1}) as server,
        client_of(kind, server.address) as client,
        client_of(kind, server.address, max_attempts=1) as impatient,
    ):
        server.backend.hold()
        first = asyncio.create_task(client.call("embed", ["first"]))
        await until(lambda: accepted(server) == 1)
        with pytest.raises(OverloadedError) as caught:
            await impatient.call("embed", ["refused"])
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after_s
        second = asyncio.create_task(client.call("embed", ["second"]))
        await until(lambda: refusals(server) >= 2)
        server.backend.release()
        np.testing.assert_array_equal(await first, expected(["first"]))
        np.testing.assert_array_equal(await second, expected(["second"]))


def accepted(server: FakeServer) -> int:
    return server.model.admission.requests


def refusals(server: FakeServer) -> int:
    codes: dict[str, int] = server.metrics.snapshot()["totals"]["by_method_and_code"]["Embed"]
    return codes.get("RESOURCE_EXHAUSTED", 0)


async def test_a_wait_that_ends_after_the_deadline_is_not_begun(kind: str) -> None:
    async with client_of(kind, "127.0.0.1:1", max_attempts=1000) as client:
        with pytest.raises(UnavailableError):
            await client.call("embed", ["a"], timeout_s=0.3)


async def test_a_server_that_starts_later_is_waited_for(kind: str, tmp_path: Path) -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    async with client_of(kind, f"dns:///127.0.0.1:{port}", max_attempts=100) as client:
        call = asyncio.create_task(client.call("embed", ["patience"]))
        with server_process(tmp_path, "--port", str(port)):
            np.testing.assert_array_equal(await call, expected(["patience"]))


# Streams


async def test_a_stream_answers_each_item_under_its_key(kind: str) -> None:
    async with (
        fake_server(server={"enable_test_faults": True}) as server,
        client_of(kind, server.address) as client,
    ):
        items = ["a text", ["two", "texts"], ("mine", "third"), ("bad", ["!raise"]), ("empty", [])]
        found = await collected(client.stream(items, max_in_flight=2))
    np.testing.assert_array_equal(found[0].embeddings, expected(["a text"]))
    np.testing.assert_array_equal(found[1].embeddings, expected(["two", "texts"]))
    np.testing.assert_array_equal(found["mine"].embeddings, expected(["third"]))
    assert isinstance(found["bad"].error, ModelFailedError)
    with pytest.raises(InvalidRequestError, match="EMPTY_REQUEST"):
        _ = found["empty"].embeddings


async def test_items_are_read_no_further_ahead_than_asked(kind: str) -> None:
    """An endless source is no danger, and leaving early ends everything."""
    read: list[int] = []

    def endless() -> Iterator[str]:
        while True:
            read.append(1)
            yield f"text {len(read)}"

    async with fake_server() as server, client_of(kind, server.address) as client:
        answers = client.stream(endless(), max_in_flight=4)
        for _ in range(10):
            await anext(answers)
        assert len(read) <= 10 + 4 + 1
        await answers.aclose()


async def test_what_reading_the_items_raises_comes_after_the_answers_before_it(kind: str) -> None:
    def broken() -> Iterator[str]:
        yield "fine"
        raise OSError("no more")

    found: dict[Any, StreamAnswer] = {}
    async with fake_server() as server, client_of(kind, server.address) as client:
        with pytest.raises(OSError, match="no more"):
            await collected(client.stream(broken(), max_in_flight=1), found)
    assert list(found) == [0]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_a_stream_goes_on_with_the_next_server_and_nothing_is_lost_or_answered_twice(
    kind: str, end: signal.Signals, tmp_path: Path
) -> None:
    """Drained, or killed, in the middle; another one starts on the same port."""
    passed = threading.Semaphore(5)

    def items() -> Iterator[tuple[str, str]]:
        for number in range(40):
            passed.acquire()
            yield f"key {number}", f"text {number}"

    async def awaited() -> AsyncIterator[tuple[str, str]]:
        for number in range(40):
            await asyncio.to_thread(passed.acquire)
            yield f"key {number}", f"text {number}"

    found: dict[Any, StreamAnswer] = {}
    with contextlib.ExitStack() as servers:
        first = servers.enter_context(server_process(tmp_path))
        port = first.ready()["grpc_port"]
        async with client_of(kind, f"127.0.0.1:{port}") as client:
            async for answer in client.stream(items() if client.is_sync else awaited(), max_in_flight=8):
                assert answer.key not in found, "answered twice"
                found[answer.key] = answer
                if len(found) == 5:
                    first.signal(end)
                    await asyncio.to_thread(first.process.wait)
                    first.ready_file.unlink(missing_ok=True)
                    servers.enter_context(server_process(tmp_path, "--port", str(port)))
                passed.release()
    assert len(found) == 40
    for number in range(40):
        np.testing.assert_array_equal(found[f"key {number}"].embeddings, expected([f"text {number}"]))


async def test_a_stream_to_nowhere_ends_with_an_error(kind: str) -> None:
    async with client_of(kind, "127.0.0.1:1") as client:
        with pytest.raises(UnavailableError):
            await collected(client.stream(["a"], timeout_s=0.3))


# What it needs

LONE = """
import importlib.abc, sys
allowed = {"grpc", "google", "numpy", "ml_inference_server", "typing_extensions"} | set(sys.stdlib_module_names)
class Gate(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed or name.startswith("google.rpc"):
            raise ModuleNotFoundError(f"not allowed: {name}", name=name)
sys.meta_path.insert(0, Gate())
import ml_inference_server
assert "grpc" not in sys.modules, "the package's name alone costs nothing"
from ml_inference_server import Client, AsyncClient
with Client(sys.argv[1]) as client:
    print(client.embed(["a", "b"]).shape, client.info().task)
ours = sorted(name for name in sys.modules if name.startswith("ml_inference_server."))
assert all(name.split(".")[1] in ("api", "proto") for name in ours), ours
"""


def test_it_needs_grpcio_protobuf_and_numpy_only(tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        target = f"127.0.0.1:{server.ready()['grpc_port']}"
        done = subprocess.run(
            [sys.executable, "-c", LONE, target], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
    assert (done.stdout, done.returncode) == ("(2, 8) embedding\n", 0), done.stderr


def test_threads_share_a_client(tmp_path: Path) -> None:
    with server_process(tmp_path) as server, Client(f"127.0.0.1:{server.ready()['grpc_port']}") as client:
        wrong: list[str] = []

        def ask(name: str) -> None:
            for number in range(20):
                if not np.array_equal(client.embed([f"{name} {number}"]), expected([f"{name} {number}"])):
                    wrong.append(name)

        threads = [threading.Thread(target=ask, args=(f"thread {i}",)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_every_error_is_a_server_error_with_grpcs_own_behind_it() -> None:
    with Client("127.0.0.1:1", max_attempts=1) as client, pytest.raises(ServerError) as caught:
        client.info(timeout_s=1)
    assert isinstance(caught.value.__cause__, grpc.RpcError)
