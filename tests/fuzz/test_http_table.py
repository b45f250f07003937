"""Every bad body that we could think of, on every route of /openapi.json: each is refused in its dialect's own form."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable

import pytest

from tests.fuzz.http_bodies import dumped, large, near_misses, no_objects
from tests.fuzz.http_wire import (
    GUARD_S,
    JSON_TYPE,
    Connection,
    PostRoute,
    Wire,
    http_request,
    quiet_wire,
    read_reply,
)
from tests.integration.http_kit import HttpReply

TASKS = pytest.mark.parametrize("task", ["embedding", "cross_encoder"])
ANY_MODEL = {"accept_any_model": True}
SMALL = {"max_message_bytes": 65_536, "max_text_bytes": 65_536}
# Long enough for what is sent at once, which the server reads without waiting.
SOON = "x-request-timeout-ms: 200"
CHUNKED = "Transfer-Encoding: chunked"


def head(route: PostRoute, *headers: str) -> bytes:
    """Of a request that says in `headers` how long its body is."""
    lines = [f"POST {route.path} HTTP/1.1", "Host: localhost", JSON_TYPE, *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def chunks(body: bytes, size: int) -> bytes:
    """The body in chunks of that size, with its end."""
    parts = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


async def sent_raw(wire: Wire, request: bytes) -> HttpReply:
    """The answer to bytes after which the connection is of no use."""
    connection = Connection(wire.port)
    try:
        return await connection.ask(request)
    finally:
        await connection.close()


def taking_json(wire: Wire) -> list[PostRoute]:
    """Routes that look into their bodies; the others refuse whatever comes."""
    found = [route for route in wire.routes if route.examples]
    assert len(found) >= 14
    return found


async def answering(wire: Wire) -> list[tuple[PostRoute, HttpReply]]:
    """Routes that have an answer to their own example, and that answer."""
    replies = [(route, await wire.post(route, dumped(route.examples[0]))) for route in taking_json(wire)]
    found = [(route, reply) for route, reply in replies if reply.status == 200]
    assert len(found) >= 14
    return found


async def check_all(wire: Wire, cases: Callable[[PostRoute], Iterable[tuple[str, bytes]]]) -> Counter[int]:
    """Each answer of each route is an answer, or a refusal as described. How often which status came."""
    statuses: Counter[int] = Counter()
    for route in wire.routes:
        bodies = list(cases(route))
        replies = await wire.ask_all([http_request(route.path, body, JSON_TYPE) for _, body in bodies])
        for (name, body), reply in zip(bodies, replies, strict=True):
            try:
                route.check(reply)
            except Exception as error:
                raise AssertionError(f"{route.path}, {name}: {body[:200]!r}") from error
            statuses[reply.status] += 1
    return statuses


@TASKS
async def test_what_is_no_request_is_refused_by_every_route(caplog: pytest.LogCaptureFixture, task: str) -> None:
    async with quiet_wire(caplog, model={"task": task}) as wire:
        statuses = await check_all(wire, lambda _: no_objects())
    assert 200 not in statuses
    assert sum(statuses.values()) >= 400


@TASKS
async def test_a_right_body_with_one_thing_wrong(caplog: pytest.LogCaptureFixture, task: str) -> None:
    def cases(route: PostRoute) -> Iterable[tuple[str, bytes]]:
        for schema, example in zip(route.schemas, route.examples, strict=True):
            yield from near_misses(example, list(schema["properties"]))

    async with quiet_wire(caplog, model={"task": task}, server=ANY_MODEL) as wire:
        statuses = await check_all(wire, cases)
    assert sum(statuses.values()) >= 5000
    assert statuses[400] + statuses[422] > statuses[200] > 0


async def test_bodies_of_10_megabytes(caplog: pytest.LogCaptureFixture) -> None:
    async with quiet_wire(caplog, server=ANY_MODEL) as wire:
        statuses = await check_all(wire, lambda route: (case for each in route.examples for case in large(each)))
    assert statuses[400] + statuses[422] > statuses[200] > 0


async def test_many_small_values_are_refused_at_the_first_wrong_one(caplog: pytest.LogCaptureFixture) -> None:
    """Where each were an error of its own, one request would take all memory and minutes of the event loop."""

    def cases(route: PostRoute) -> Iterable[tuple[str, bytes]]:
        for schema, example in zip(route.schemas, route.examples, strict=True):
            for key in schema["properties"]:
                for name, item in {"numbers": b"1", "lone surrogates": b'"\\ud800"'}.items():
                    rest = dumped({name: value for name, value in example.items() if name != key})
                    body = b'{"' + key.encode() + b'": [' + b",".join([item] * 50_000) + b"], " + rest[1:]
                    yield f"{key}: {name}", body

    async with quiet_wire(caplog, server=ANY_MODEL) as wire:
        statuses = await check_all(wire, cases)
    assert statuses[400] + statuses[422] > statuses[200]


async def test_content_types_and_encodings(caplog: pytest.LogCaptureFixture) -> None:
    wrong = {
        "no type": [],
        "text": ["Content-Type: text/plain"],
        "a form": ["Content-Type: application/x-www-form-urlencoded"],
        "several parts": ["Content-Type: multipart/form-data; boundary=a"],
        "noise": ["Content-Type: \xff\xfe;;=,"],
        "compressed": [JSON_TYPE, "Content-Encoding: gzip"],
        "compressed otherwise": [JSON_TYPE, "Content-Encoding: br"],
        "compressed twice": [JSON_TYPE, "Content-Encoding: identity", "Content-Encoding: deflate"],
        "an encoding without a name": [JSON_TYPE, "Content-Encoding:"],
    }
    async with quiet_wire(caplog, server=ANY_MODEL) as wire:
        for route in taking_json(wire):
            for name, headers in wrong.items():
                reply = await wire.ask(http_request(route.path, dumped(route.examples[0]), *headers))
                # Tritonclient sends no type; and a type of noise is none.
                taken = route.path.endswith("/infer") and name in ("no type", "noise")
                assert reply.status == (200 if taken else 415), (route.path, name, reply)
                route.check(reply)
        for route in (route for route in wire.routes if not route.examples):
            reply = await wire.post(route, b"{}", JSON_TYPE, "Content-Encoding: gzip")
            assert reply.status == 415


async def test_headers_of_noise(caplog: pytest.LogCaptureFixture) -> None:
    right = ["x-request-id: \xff\x80", "traceparent: \xff", "accept: \xff", "Content-Encoding: Identity"]
    wrong = {
        "x-request-timeout-ms: 0": {400, 422},
        "x-request-timeout-ms: -1": {400, 422},
        "x-request-timeout-ms: \xb2": {400, 422},
        f"x-request-timeout-ms: {'9' * 400}": {400, 422},
        "x-expect-space-id: \xff\xfe": {412},
        "Expect: the best": {417},
    }
    seen: set[int] = set()
    async with quiet_wire(caplog, server=ANY_MODEL) as wire:
        for route, answer in await answering(wire):
            body = dumped(route.examples[0])
            for header in right:
                assert (await wire.post(route, body, JSON_TYPE, header)).status == 200, (route.path, header)
            for header, statuses in wrong.items():
                if "space" in header and "x-space-id" not in answer.headers:  # it answers with no vectors
                    continue
                reply = await wire.post(route, body, JSON_TYPE, header)
                seen.add(reply.status)
                assert reply.status in statuses, (route.path, header, reply)
                route.check(reply)
    assert seen == {400, 412, 417, 422}


async def test_a_client_that_asks_whether_to_go_on_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    async with quiet_wire(caplog) as wire:
        route = taking_json(wire)[0]
        body = dumped({**route.examples[0], "model": wire.model})
        reader, writer = await asyncio.open_connection("127.0.0.1", wire.port)
        async with asyncio.timeout(GUARD_S):
            writer.write(head(route, "Expect: 100-continue", f"Content-Length: {len(body)}"))
            assert (await read_reply(reader)).status == 100
            writer.write(body)
            assert (await read_reply(reader)).status == 200
        writer.close()


async def test_wrong_methods_are_told_the_right_ones(caplog: pytest.LogCaptureFixture) -> None:
    async with quiet_wire(caplog) as wire:
        posts = {route.operation["operationId"]: route for route in wire.routes}
        tried = 0
        for path, operations in wire.described["paths"].items():
            filled = path.replace("{model}", wire.model).replace("{version}", "1")
            allowed = {method.upper() for method in operations} | ({"GET"} if path == "/" else set())
            if path.startswith("/v2/models/{model}"):
                allowed.add("GET")  # a name may hold slashes, so there GET finds no model of that name
            for method in sorted({"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - allowed):
                for body in (b"", b'{"input": "a"}'):
                    reply = await wire.ask(http_request(filled, body, JSON_TYPE, method=method))
                    assert reply.status == 405, (method, filled, reply)
                    assert set(reply.headers["allow"].split(",")) - {"HEAD"} == allowed, (method, filled, reply)
                    if "post" in operations and path != "/":  # of which all but POST is the page's
                        posts[operations["post"]["operationId"]].check_form(reply)
                    tried += 1
        assert tried > 200


async def test_unknown_models_and_routes_are_not_found(caplog: pytest.LogCaptureFixture) -> None:
    async with quiet_wire(caplog) as wire:
        named = [route for route in wire.routes if any("model" in schema["properties"] for schema in route.schemas)]
        assert len(named) >= 6
        for route in named:
            for example in route.examples:
                for name in ("nobody", "\u0000", "../../etc/passwd", "a" * 1000):
                    reply = await wire.post(route, dumped({**example, "model": name}))
                    assert reply.status == 404 or "texts" in example, (route.path, reply)
                    route.check(reply)
        described = {route.path.rpartition("/")[0]: route for route in wire.routes}
        for parent, route in described.items():
            reply = await wire.ask(http_request(f"{parent}/%ff%00nowhere", b"{}", JSON_TYPE))
            assert reply.status in (404, 405), (parent, reply)
            if parent.startswith(("/v1", "/v2")):
                assert reply.headers["content-type"].startswith("application/json"), route


@pytest.mark.parametrize("sent", ["a chunk without an end", "chunks without an end", "nothing", "half of it"])
async def test_a_body_that_never_ends_is_cut_off_in_time(caplog: pytest.LogCaptureFixture, sent: str) -> None:
    beginnings = {
        "a chunk without an end": (CHUNKED, b'ffffffff\r\n{"input":'),
        "chunks without an end": (CHUNKED, b"1\r\n{\r\n" + b"1\r\n \r\n" * 100),
        "nothing": ("Content-Length: 100", b""),
        "half of it": ("Content-Length: 100", b'{"input":'),
    }
    length, beginning = beginnings[sent]
    async with quiet_wire(caplog) as wire:
        replies = await asyncio.gather(
            *(sent_raw(wire, head(route, length, SOON) + beginning) for route in wire.routes)
        )
        for route, reply in zip(wire.routes, replies, strict=True):
            assert (reply.status, reply.headers["connection"]) == (408, "close"), (route.path, reply)
            assert b"within 0.2 s" in reply.body
            route.check(reply)


async def test_the_servers_own_deadline_cuts_off_a_body_as_well(caplog: pytest.LogCaptureFixture) -> None:
    async with quiet_wire(caplog, server={"default_timeout_ms": 500}) as wire:
        reply = await sent_raw(wire, head(wire.routes[0], "Content-Length: 100"))
        assert reply.status == 408
        wire.routes[0].check(reply)


async def test_a_body_above_the_limit_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    body = b'{"input": "%b"}' % (b"x" * SMALL["max_message_bytes"])
    requests: dict[str, Callable[[PostRoute], bytes]] = {
        "told": lambda route: head(route, f"Content-Length: {len(body)}") + body,
        "told and not sent": lambda route: head(route, "Content-Length: 99999999999"),
        "one chunk": lambda route: head(route, CHUNKED) + chunks(body, len(body)),
        "chunks": lambda route: head(route, CHUNKED) + chunks(body, 1000),
        "chunks of a byte": lambda route: head(route, CHUNKED) + chunks(body, 1),
        "no end": lambda route: head(route, CHUNKED) + chunks(body, 1000)[:-5],
    }
    async with quiet_wire(caplog, server=SMALL) as wire:
        for route in wire.routes:
            for name, request in requests.items():
                reply = await sent_raw(wire, request(route))
                assert (reply.status, reply.headers["connection"]) == (413, "close"), (route.path, name, reply)
                route.check(reply)
        counted = wire.server.metrics.snapshot()["totals"]["errors_by_reason"]
        assert counted == {"BODY_TOO_LONG": len(wire.routes) * len(requests)}


async def test_65536_chunks_of_a_byte_are_a_body(caplog: pytest.LogCaptureFixture) -> None:
    async with quiet_wire(caplog, server={**SMALL, **ANY_MODEL}) as wire:
        for route, _ in await answering(wire):
            body = dumped(route.examples[0]).ljust(65_536)
            reply = await sent_raw(wire, head(route, CHUNKED) + chunks(body, 1))
            assert reply.status == 200, (route.path, reply)


async def test_a_connection_that_closes_within_a_body(caplog: pytest.LogCaptureFixture) -> None:
    async with quiet_wire(caplog) as wire:
        for route in wire.routes:
            body = dumped(route.examples[0] if route.examples else {})
            whole = head(route, CHUNKED) + chunks(body, 7)
            for end in range(len(whole) - len(chunks(body, 7)) - 10, len(whole), 5):
                reader, writer = await asyncio.open_connection("127.0.0.1", wire.port)
                writer.write(whole[:end])
                writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    async with asyncio.timeout(GUARD_S):
                        answer = await reader.read()
                assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), (route.path, answer)
                writer.close()


async def test_what_is_no_http_is_refused_before_any_route(caplog: pytest.LogCaptureFixture) -> None:
    """By the HTTP library, in plain text: it knows no path yet."""
    async with quiet_wire(caplog) as wire:
        route = wire.routes[0]
        requests = [
            head(route, "Content-Length: -1"),
            head(route, "Content-Length: many"),
            head(route, "Content-Length: 1", "Content-Length: 2"),
            head(route, "Content-Length: 1", CHUNKED),
            head(route, "x-a: \0"),
            head(route, f"x-a: {'a' * 10_000}"),
            head(route, *["x-a: a"] * 20_000),
            head(route, CHUNKED) + b"zz\r\n",
            head(route, CHUNKED) + b"fffffffffffffffffffff\r\n",
            head(route, "Content-Length: 0").replace(b"POST", b"BREW"),
            head(route, "Content-Length: 0").replace(b"HTTP/1.1", b"HTTP/7.3"),
            head(route, "Content-Length: 0").replace(b"Host: localhost\r\n", b""),
            b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ]
        for request in requests:
            reply = await sent_raw(wire, request)
            assert reply.status == 400, (request[:200], reply)
            assert b"Traceback" not in reply.body
