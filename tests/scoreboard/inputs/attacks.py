"""X6: the payloads against a server process, and which of them got through."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from tests.fuzz.http_wire import JSON_TYPE, http_request
from tests.fuzz.test_http_raw_bytes import exchange, statuses
from tests.scoreboard.inputs.payloads import (
    ALLOWED_ORIGIN,
    FOREIGN_HOSTS,
    FOREIGN_ORIGINS,
    FORM_TYPES,
    HIDDEN,
    HOSTILE_NAME,
    MARKS_OF_FILES,
    OWN_HOSTS,
    SCRIPTS,
    smuggled,
    traversals,
)
from tests.scoreboard.inputs.servers import input_server

_CLOSE = "Connection: close"
_PAGES = ("/", "/docs", "/docs.js", "/app.js", "/metrics", "/metrics/prometheus", "/info", "/v1/models", "/api/v1/live")
_POSTS = ("/v1/embeddings", "/embed", "/v2/embed", "/v2/rerank", "/similarity", "/tokenize", "/v2/models/fake/infer")
_SETTINGS = (
    "model.name=fake",
    f"server.model_aliases={json.dumps([HOSTILE_NAME])}",
    f"metrics.cors_origins=[{ALLOWED_ORIGIN}]",
)


@dataclass
class Attacks:
    """payloads: sent, by kind. through: sentences, one for each that got through or was answered by nobody."""

    payloads: Counter[str] = field(default_factory=Counter)
    through: list[str] = field(default_factory=list)

    def judge(self, kind: str, name: str, wrong: str) -> None:
        """wrong: empty where the payload did nothing."""
        self.payloads[kind] += 1
        if wrong:
            self.through.append(f"{kind}: {name}: {wrong}"[:400])


def get(path: str, *headers: str, host: str = "localhost", method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", _CLOSE, *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def _headers(answer: bytes) -> dict[str, str]:
    head = answer.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head)}


async def _paths(port: int, found: Attacks) -> None:
    for path in traversals():
        answer = await exchange(port, get(path))
        seen = statuses(answer)
        marks = [mark for mark in MARKS_OF_FILES if mark in answer]
        found.judge("traversal", path, "" if seen and seen[0] in (400, 404) and not marks else f"{seen} {marks}")


async def _scripts(port: int, found: Attacks) -> None:
    """Whatever comes back is no page with the script in it: JSON or text that no browser takes for one."""
    listed = await exchange(port, get("/v1/models"))
    assert HOSTILE_NAME in json.dumps(json.loads(listed.partition(b"\r\n\r\n")[2])).replace('\\"', '"'), (
        "else no name is hostile"
    )
    for path in _PAGES:
        answer = await exchange(port, get(path, "Accept: text/html"))
        found.judge("script", f"a hostile name in {path}", is_page_with(answer, HOSTILE_NAME))
    for script in SCRIPTS:
        for request in _requests_with(script):
            answer = await exchange(port, request)
            found.judge("script", f"{script!a} in {request[:60]!r}", is_page_with(answer, script))


def _requests_with(script: str) -> Iterator[bytes]:
    in_path, in_header = quote(script, safe=""), script.encode("ascii", "replace").decode().replace("\x01", "")
    accept = "Accept: text/html"
    yield get(f"/{in_path}", accept)
    yield get(f"/v1/models/{in_path}", accept)
    yield get(f"/v2/models/{in_path}/ready", accept)
    yield get(f"/metrics?callback={in_path}", accept)
    yield get(
        "/metrics", accept, f"Referer: {in_header}", f"X-Forwarded-Host: {in_header}", f"x-request-id: {in_header}"
    )
    for path in ("/v1/embeddings", "/embed", "/v2/rerank", "/v2/models/fake/infer"):
        body = {
            "model": script,
            "input": script,
            "inputs": [script, 1],
            "query": script,
            "documents": [{script: script}],
        }
        yield http_request(path, json.dumps(body).encode(), JSON_TYPE, accept, _CLOSE)
        yield http_request(path, script.encode(), JSON_TYPE, accept, _CLOSE)
    progress = {"name": script, "label": script, "row": script}
    yield http_request("/api/v1/benchmark", json.dumps(progress).encode(), JSON_TYPE, accept, _CLOSE)


def is_page_with(answer: bytes, script: str) -> str:
    """What is wrong with the answer to a script; empty where no browser would run it."""
    headers, body = _headers(answer), answer.partition(b"\r\n\r\n")[2]
    if not answer:
        return "no answer"
    kind = headers.get("content-type", "")
    is_page = kind.startswith(("text/html", "text/javascript", "text/css", "image/"))
    if is_page and script.encode() in body:
        return f"it stands in {kind}"
    # What the HTTP library refuses before any route is text, with none of our headers.
    if not kind.startswith("text/plain; charset=utf-8") and headers.get("x-content-type-options") != "nosniff":
        return f"{kind} without nosniff"
    if is_page and "script-src 'self'" not in headers.get("content-security-policy", ""):
        return "a page without a policy"
    return ""


async def _hosts(port: int, found: Attacks) -> None:
    for host in OWN_HOSTS:
        seen = statuses(await exchange(port, get("/metrics", host=host)))
        found.judge("host", f"{host} is our own", "" if seen == [200] else f"{seen}")
    for host in FOREIGN_HOSTS:
        for path in ("/metrics", "/", "/v1/models"):
            seen = statuses(await exchange(port, get(path, host=host)))
            found.judge("host", f"{host!a} {path}", "" if seen in ([421], [400]) else f"{seen}")
        body = b'{"inputs": "a"}'
        request = http_request("/embed", body, JSON_TYPE, _CLOSE).replace(b"Host: localhost", b"Host: " + host.encode())
        seen = statuses(await exchange(port, request))
        found.judge("host", f"{host!a} POST /embed", "" if seen in ([421], [400]) else f"{seen}")
    twice = get("/metrics", "Host: evil.example")
    found.judge("host", "two hosts", "" if statuses(await exchange(port, twice)) == [400] else "answered")


async def _origins(port: int, found: Attacks) -> None:
    def allows(answer: bytes) -> list[str]:
        return [name for name in _headers(answer) if name.startswith("access-control-")]

    answer = await exchange(port, get("/metrics", f"Origin: {ALLOWED_ORIGIN}"))
    told = _headers(answer).get("access-control-allow-origin")
    found.judge("origin", "the allowed one", "" if told == ALLOWED_ORIGIN else f"{told}")
    for origin in FOREIGN_ORIGINS:
        for path in ("/metrics", "/info", "/v1/models", "/embed"):
            answer = await exchange(port, get(path, f"Origin: {origin}"))
            found.judge("origin", f"{origin!a} {path}", " ".join(allows(answer)))
        asks = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type, authorization")
        for path in (*_POSTS, "/api/v1/benchmark", "/metrics"):
            answer = await exchange(port, get(path, f"Origin: {origin}", *asks, method="OPTIONS"))
            seen = statuses(answer)
            found.judge(
                "origin",
                f"{origin!a} asks for {path}",
                " ".join(allows(answer)) or ("" if seen == [405] else f"{seen}"),
            )
        progress = http_request("/api/v1/benchmark", b"{}", JSON_TYPE, f"Origin: {origin}", _CLOSE)
        seen = statuses(await exchange(port, progress))
        found.judge("origin", f"{origin!a} changes the server", "" if seen == [403] else f"{seen}")
    for kind in FORM_TYPES:
        for path in _POSTS:
            sent = http_request(
                path, b'{"inputs": "a"}', f"Content-Type: {kind}", "Origin: https://evil.example", _CLOSE
            )
            seen = statuses(await exchange(port, sent))
            found.judge("origin", f"{kind} to {path}", "" if seen == [415] else f"{seen}")


async def _hidden_requests(port: int, found: Attacks) -> None:
    """One answer at most, and it is a refusal."""
    two = http_request("/embed", b'{"inputs": "a"}', JSON_TYPE) + HIDDEN
    assert statuses(await exchange(port, two)) == [200, 404], "else nobody could see that a hidden one is answered"
    for name, request in smuggled():
        seen = statuses(await exchange(port, request))
        found.judge("smuggling", name, "" if len(seen) == 1 and 400 <= seen[0] < 500 else f"{seen}")


async def attack(tell: Callable[[int, int], None]) -> Attacks:
    """All payloads, one after another. The server has ended well, or one more thing is wrong."""
    found = Attacks()
    kinds = (_paths, _scripts, _hosts, _origins, _hidden_requests)
    with tempfile.TemporaryDirectory() as folder:
        async with input_server(Path(folder), _SETTINGS) as server:
            for done, kind in enumerate(kinds):
                await kind(server.http_port, found)
                tell(done + 1, len(kinds))
            lines: Iterable[str] = [*server.bugs(), *server.warnings()]
            found.through += [f"log: {line[:300]}" for line in lines]
            if code := await server.end():
                found.through.append(f"the server ended with code {code}")
    return found
