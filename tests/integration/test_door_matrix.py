"""Every RPC and every route against every kind of key; the lists come from what the server itself says it serves.

Each test records how many cells it looked into: the scoreboard adds them up.
"""

import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ml_inference_server.door.rights import ANY_KEY, MODEL_FACTS, OPEN, Needs, Right
from ml_inference_server.server.http.api import HttpApi
from ml_inference_server.server.rpc.doorkeeper import NEEDS
from tests.conftest import FakeServer, fake_server
from tests.integration.door_kit import RIGHTS, KeysFile, keys_file

INFER, METRICS, ADMIN = (frozenset({right}) for right in RIGHTS)
NO_KEY = "a valid key is needed: send it as 'authorization: Bearer KEY'"

# Written down a second time, by hand: what is open and what takes which right, by the beginning of its name.
RPCS: dict[str, Needs] = {
    "/grpc.health.v1.Health/": OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/": OPEN,
    "/ml_inference_server.v1.InferenceService/": INFER,
    "/ml_inference_server.v1.InferenceService/GetMetrics": METRICS,
    "/ml_inference_server.v1.InferenceService/GetServerInfo": MODEL_FACTS,
    "/tei.v1.": INFER,
    "/tei.v1.Info/": MODEL_FACTS,
    "/inference.GRPCInferenceService/Server": OPEN,
    "/inference.GRPCInferenceService/ServerMetadata": MODEL_FACTS,
    "/inference.GRPCInferenceService/Model": MODEL_FACTS,
    "/inference.GRPCInferenceService/ModelStatistics": METRICS,
    "/inference.GRPCInferenceService/ModelInfer": INFER,
    "/inference.GRPCInferenceService/ModelStreamInfer": INFER,
    "/inference.GRPCInferenceService/RepositoryIndex": MODEL_FACTS,
    "/inference.GRPCInferenceService/RepositoryModel": ADMIN,
    "/inference.GRPCInferenceService/SystemSharedMemory": INFER,
    "/inference.GRPCInferenceService/CudaSharedMemory": INFER,
    "/inference.GRPCInferenceService/TraceSetting": ADMIN,
    "/inference.GRPCInferenceService/LogSettings": ADMIN,
}
ROUTES: dict[str, Needs] = {
    **{
        f"POST {path}": INFER
        for path in (
            *("/v1/embeddings", "/embeddings", "/v1/embed", "/v2/embed", "/v1/rerank", "/v2/rerank", "/embed"),
            *("/embed_all", "/embed_sparse", "/rerank", "/similarity", "/predict", "/tokenize", "/decode"),
            *("/invocations", "/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"),
        )
    },
    "POST /api/v1/benchmark": ADMIN,
    "GET /health": OPEN,
    "GET /healthz": OPEN,
    "GET /readyz": OPEN,
    "GET /ping": OPEN,
    "GET /v2/health/": OPEN,
    "GET /docs": OPEN,
    "GET /openapi.json": OPEN,
    "GET /metrics": METRICS,
    "GET /info": MODEL_FACTS,
    "GET /api/v1/": METRICS,
    "GET /v1/models": MODEL_FACTS,
    "GET /v2": MODEL_FACTS,
    "GET /v2/models/stats": METRICS,
    "GET /v2/models/{model}/stats": METRICS,
    "GET /v2/models/{model}/versions/{version}/stats": METRICS,
    **{f"GET /{name}.js": OPEN for name in ("app", "bars", "charts", "feed", "format", "key", "model_card", "theme")},
    "GET /style.css": OPEN,
    "GET /favicon.svg": OPEN,
}
Record = Callable[[str, object], None]
EXACT = {"POST /": INFER, "GET /": OPEN, "GET /v2": MODEL_FACTS}


def expected(table: dict[str, Needs], name: str) -> Needs:
    """By the longest beginning that stands in the table; KeyError for what nobody has classified."""
    if name in EXACT:
        return EXACT[name]
    return table[max((each for each in table if name.startswith(each)), key=len, default=name)]


@dataclass
class Guarded:
    server: FakeServer
    keys: KeysFile
    session: aiohttp.ClientSession
    router: web.UrlDispatcher

    def authorizations(self) -> dict[str, list[str]]:
        """Each kind of caller, and the values of its header."""
        good = self.keys.bearer("infer")
        return {
            "none": [],
            "wrong": ["Bearer mlis_" + "A" * 43],
            "too short": [good[:-1]],
            "longer": [good + "A"],
            "empty": ["Bearer "],
            "another scheme": [good.replace("Bearer", "Basic")],
            "no scheme": [self.keys.tokens["infer"]],
            "twice": [good, good],
            **{right.value: [self.keys.bearer(right.value)] for right in RIGHTS},
        }


def kept_routers(monkeypatch: pytest.MonkeyPatch) -> list[web.UrlDispatcher]:
    """Of the servers that start from now on."""
    routers: list[web.UrlDispatcher] = []
    add_to = HttpApi.add_to

    def add_and_keep(api: HttpApi, router: web.UrlDispatcher) -> None:
        add_to(api, router)
        routers.append(router)

    monkeypatch.setattr(HttpApi, "add_to", add_and_keep)
    return routers


@pytest.fixture
async def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guarded]:
    keys, routers = keys_file(tmp_path), kept_routers(monkeypatch)
    async with (
        fake_server(server={"auth": {"keys_file": str(keys.path)}}) as server,
        aiohttp.ClientSession(server.url) as session,
    ):
        yield Guarded(server, keys, session, routers[0])


async def methods(channel: grpc.aio.Channel) -> list[tuple[str, bool, bool]]:
    """(full name, whether the client streams, whether the server does) of all that reflection tells of."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    async def ask(**question: str) -> Any:
        return await anext(aiter(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)]))))

    names = [each.name for each in (await ask(list_services="")).list_services_response.service]
    found = []
    for name in names:
        for content in (await ask(file_containing_symbol=name)).file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(content)
            found += [
                (f"/{name}/{method.name}", method.client_streaming, method.server_streaming)
                for service in file.service
                if f"{file.package}.{service.name}" == name
                for method in service.method
            ]
    return found


async def outcome(channel: grpc.aio.Channel, method: str, kind: tuple[bool, bool], authorization: Sequence[str]) -> Any:
    """The status of a call of that kind with one empty message; OK too where an answer comes before the end."""
    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    ask = kinds[kind](method)
    metadata = [("authorization", each) for each in authorization]
    call = ask(iter([b""]) if kind[0] else b"", metadata=metadata, timeout=20)
    try:
        if kind[1]:
            async for _ in call:
                call.cancel()
                return grpc.StatusCode.OK, ""
            return await call.code(), ""
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def refused_as(needs: Needs, caller: str) -> str:
    """UNAUTHENTICATED, PERMISSION_DENIED, or "" where the door is open."""
    if needs == OPEN:
        return ""
    if caller not in tuple(Right):
        return "UNAUTHENTICATED"
    return "" if Right(caller) in needs else "PERMISSION_DENIED"


async def test_every_rpc_asks_every_caller_for_the_right_key(guarded: Guarded, record_property: Record) -> None:
    found = await methods(guarded.server.channel)
    assert {name for name, *_ in found} == set(NEEDS)
    assert len(found) > 40
    for name, *kind in found:
        for caller, authorization in guarded.authorizations().items():
            code, text = await outcome(guarded.server.channel, name, (kind[0], kind[1]), authorization)
            wanted = refused_as(expected(RPCS, name), caller)
            seen = code.name if code.name in ("UNAUTHENTICATED", "PERMISSION_DENIED") else ""
            assert seen == wanted, (name, caller, code, text)
            if wanted == "UNAUTHENTICATED":
                assert text == NO_KEY
    record_property("cells", len(found) * len(guarded.authorizations()))


@pytest.mark.parametrize("kind", [(False, False), (False, True), (True, False), (True, True)])
async def test_a_method_that_does_not_exist_takes_a_key_like_any_other(
    guarded: Guarded, kind: tuple[bool, bool], record_property: Record
) -> None:
    names = ("/no.Such/Method", "/ml_inference_server.v1.InferenceService/Nothing")
    for name in names:
        for caller, authorization in guarded.authorizations().items():
            code, _ = await outcome(guarded.server.channel, name, kind, authorization)
            assert code.name == (refused_as(ANY_KEY, caller) or "UNIMPLEMENTED"), (name, caller)
    record_property("cells", len(names) * len(guarded.authorizations()))


def routes(router: web.UrlDispatcher) -> set[tuple[str, str]]:
    """(method, path) of all that the server answers over HTTP."""
    return {(route.method, route.resource.canonical) for route in router.routes() if route.resource is not None}


async def test_the_document_of_the_api_tells_of_no_other_routes(guarded: Guarded) -> None:
    async with guarded.session.get("/openapi.json") as answer:
        document = await answer.json()
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert len(told) > 30
    assert told <= routes(guarded.router)


async def test_every_route_asks_every_caller_for_the_right_key(guarded: Guarded, record_property: Record) -> None:
    found = routes(guarded.router)
    assert len(found) > 50
    for method, path in sorted(found):
        url = re.sub(r"\{\w+\}", "1", path)
        for caller, authorization in guarded.authorizations().items():
            headers = [("Authorization", each) for each in authorization]
            async with guarded.session.request(
                method, url, headers=headers, json=({} if method == "POST" else None)
            ) as answer:
                wanted = refused_as(expected(ROUTES, f"{method.replace('HEAD', 'GET')} {path}"), caller)
                status = {"UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403}.get(wanted)
                assert (answer.status if answer.status in (401, 403) else None) == status, (method, path, caller)
                assert ("WWW-Authenticate" in answer.headers) == (answer.status == 401)
                if answer.status == 401 and method != "HEAD":
                    assert NO_KEY in await answer.text()
    record_property("cells", len(found) * len(guarded.authorizations()))


async def test_a_route_that_does_not_exist_takes_a_key_like_any_other(
    guarded: Guarded, record_property: Record
) -> None:
    nowhere = (("GET", "/nothing", 404), ("DELETE", "/metrics", 405), ("POST", "/v2/x", 404))
    for method, path, status in nowhere:
        for caller, authorization in guarded.authorizations().items():
            headers = [("Authorization", each) for each in authorization]
            async with guarded.session.request(method, path, headers=headers) as answer:
                assert answer.status == (401 if refused_as(ANY_KEY, caller) else status), (method, path, caller)
    record_property("cells", len(nowhere) * len(guarded.authorizations()))
