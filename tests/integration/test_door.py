"""Keys on a real server: who a call is of, what a key that is taken back ends, and the forms of refusals."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from ml_inference_server.door.keys import revoke_key
from ml_inference_server.door.rights import Right
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.server.call import Call
from ml_inference_server.server.rpc import doorkeeper
from tests.conftest import FakeServer, fake_server, refusal
from tests.integration.door_kit import KeysFile, keys_file

GUARD_S = 20


@pytest.fixture
def keys(tmp_path: Path) -> KeysFile:
    return keys_file(tmp_path)


@pytest.fixture
async def server(keys: KeysFile) -> AsyncIterator[FakeServer]:
    async with fake_server(server={"auth": {"keys_file": str(keys.path)}}) as fake:
        yield fake


def watch_calls(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls that reach the service from now on."""
    service, found = server.model.service, []
    embed = service.embed

    async def noted(texts: Any, call: Call, options: Any) -> Any:
        found.append(call)
        return await embed(texts, call, options)

    monkeypatch.setattr(service, "embed", noted)
    return found


async def post(server: FakeServer, path: str, body: object, key: str = "") -> tuple[int, Any]:
    headers = {"Authorization": key} if key else {}
    async with (
        asyncio.timeout(GUARD_S),
        aiohttp.ClientSession(server.url) as session,
        session.post(path, json=body, headers=headers) as answer,
    ):
        return answer.status, await answer.json()


async def test_a_call_is_of_its_key(server: FakeServer, keys: KeysFile, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.add("second", [Right.INFER])
    calls = watch_calls(server, monkeypatch)
    bearer = [("authorization", keys.bearer("infer"))]
    await server.stub.Embed(pb.EmbedRequest(texts=["a"]), metadata=bearer)
    stream = server.stub.EmbedStream(metadata=bearer)
    await stream.write(pb.EmbedStreamRequest(id=1, request=pb.EmbedRequest(texts=["b"])))
    await stream.read()
    await stream.done_writing()
    async with aiohttp.ClientSession(server.url) as session:  # one connection, two keys after each other
        while await _embed(session, keys.bearer("second")) == 401:  # noqa: ASYNC110 - the server looks once a second
            await asyncio.sleep(0.05)
        assert await _embed(session, keys.bearer("infer")) == 200
    assert [call.caller for call in calls] == ["infer", "infer", "second", "infer"]


async def _embed(session: aiohttp.ClientSession, key: str) -> int:
    async with session.post("/embed", json={"inputs": "a"}, headers={"Authorization": key}) as answer:
        await answer.read()
        return answer.status


async def test_without_keys_a_call_is_of_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_server() as server:
        calls = watch_calls(server, monkeypatch)
        await server.stub.Embed(pb.EmbedRequest(texts=["a"]), metadata=[("authorization", "Bearer whatever")])
        assert (await post(server, "/embed", {"inputs": "a"}))[0] == 200
        assert [call.caller for call in calls] == ["127.0.0.1", "127.0.0.1"]


async def test_a_key_that_is_taken_back_ends_its_streams(server: FakeServer, keys: KeysFile) -> None:
    bearer = [("authorization", keys.bearer("infer"))]
    stream = server.stub.EmbedStream(metadata=bearer)
    message = pb.EmbedStreamRequest(id=1, request=pb.EmbedRequest(texts=["b"]))
    await stream.write(message)
    assert not (await stream.read()).HasField("error")
    async with (
        asyncio.timeout(GUARD_S),
        aiohttp.ClientSession(server.url, read_bufsize=1 << 20) as session,
        session.get("/api/v1/stream", headers={"Authorization": keys.bearer("metrics")}) as events,
    ):
        await events.content.readline()
        for name in ("infer", "metrics"):
            keys.path.write_text(revoke_key(keys.path, name))
        await events.content.read()  # ends
    await stream.write(message)
    answer = await stream.read()
    assert (answer.error.code, answer.error.reason) == (grpc.StatusCode.UNAUTHENTICATED.value[0], "UNAUTHENTICATED")
    stream.cancel()
    error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["a"]), metadata=bearer))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_refusal_over_grpc_has_its_reason_and_no_hint_to_come_back(server: FakeServer, keys: KeysFile) -> None:
    for metadata, reason in (
        ([], "UNAUTHENTICATED"),
        ([("authorization", keys.bearer("metrics"))], "PERMISSION_DENIED"),
    ):
        error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["a"]), metadata=metadata))
        assert error.code().name == reason
        status = rpc_status.from_call(error)
        assert status is not None
        info = error_details_pb2.ErrorInfo()
        status.details[0].Unpack(info)
        assert info.reason == reason
        trailers = dict(error.trailing_metadata() or ())
        assert "grpc-retry-pushback-ms" not in trailers


FORMS: dict[str, Any] = {
    "/v1/embeddings": lambda text, code: {
        "error": {"message": text, "type": "invalid_request_error", "param": None, "code": code}
    },
    "/embed": lambda text, code: {"error": text, "error_type": "Validation"},
    "/v2/embed": lambda text, code: {"message": text},
    "/v2/models/m/infer": lambda text, code: {"error": text},
}


@pytest.mark.parametrize("path", FORMS)
async def test_a_refusal_has_the_form_of_its_dialect(server: FakeServer, keys: KeysFile, path: str) -> None:
    status, answer = await post(server, path, {})
    told = "a valid key is needed: send it as 'authorization: Bearer KEY'"
    wanted = FORMS[path](told, "unauthenticated")
    assert (status, {name: answer[name] for name in wanted}) == (401, wanted)
    status, answer = await post(server, path, {}, keys.bearer("metrics"))
    told = "this key has no right to this: it takes one with the right infer"
    wanted = FORMS[path](told, "permission_denied")
    assert (status, {name: answer[name] for name in wanted}) == (403, wanted)


async def test_a_refused_body_is_not_read(server: FakeServer) -> None:
    """The connection ends after the answer, whatever was announced."""
    port = server.server.http_port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000\r\n\r\n{")
    async with asyncio.timeout(GUARD_S):
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
    assert b'WWW-Authenticate: Bearer realm="ml-inference-server"' in answer


async def test_reflection_can_be_closed(keys: KeysFile) -> None:
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    auth = {"keys_file": str(keys.path), "open_reflection": False}
    async with fake_server(server={"auth": auth}) as server:
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.ServerReflectionInfo(iter([question])):
                pass
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = [("authorization", keys.bearer("metrics"))]
        answers = [each async for each in stub.ServerReflectionInfo(iter([question]), metadata=metadata)]
        assert len(answers[0].list_services_response.service) > 3


async def test_an_rpc_that_nobody_has_classified_is_answered_to_nobody(
    keys: KeysFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = "/ml_inference_server.v1.InferenceService/GetMetrics"
    monkeypatch.delitem(doorkeeper.NEEDS, method)
    keys.add("everything", Right)
    async with fake_server(server={"auth": {"keys_file": str(keys.path)}}) as server:
        metadata = [("authorization", keys.bearer("everything"))]
        error = await refusal(server.stub.GetMetrics(pb.GetMetricsRequest(), metadata=metadata))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_what_is_no_text_in_a_header_is_refused_like_any_other(server: FakeServer) -> None:
    for value in (b"Bearer \xff\xfe", b"Bearer " + b"x" * 4000, "Bearer \u00e9".encode()):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.http_port)
        writer.write(
            b"GET /info HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: " + value + b"\r\n\r\n"
        )
        async with asyncio.timeout(GUARD_S):
            answer = await reader.read()
        writer.close()
        assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), answer
