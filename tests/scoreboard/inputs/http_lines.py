"""First lines of requests: paths, methods, versions, and what is no HTTP."""

from collections.abc import Iterator

from tests.fuzz.http_wire import http_request
from tests.scoreboard.inputs.case import HttpCase
from tests.scoreboard.inputs.http_json import OPENAI
from tests.scoreboard.inputs.http_transport import head, raw


def path_cases() -> Iterator[HttpCase]:
    def get(name: str, path: str, status: int, says: str = "", method: str = "GET") -> HttpCase:
        return raw("paths", name, http_request(path, b"", method=method), status, says)

    for name, path in {
        "no such path": "/nothing",
        "a slash behind": "/metrics/",
        "two slashes": "//metrics",
        "capitals": "/METRICS",
        "a semicolon": "/metrics;a=b",
        "NUL": "/metrics%00",
        "an encoded question": "/metrics%3Fa=b",
        "dots": "/..",
        "dots within": "/a/../metrics",
        "a line break": "/metrics%0d%0aX-A:%20b",
        "no UTF-8": "/%ff%fe",
        "5,000 characters": "/" + "a" * 5000,
        "an earlier version": "/v0/embeddings",
        "a file of ours": "/main.py",
    }.items():
        yield get(name, path, 404)
    for name, path in {
        "a question": "/metrics?format=../../x",
        "an encoded letter": "/%6Detrics",
        "a fragment": "/metrics#a",
    }.items():
        yield get(name, path, 200)
    for name, model in {
        "a path": "..%2F..%2Fetc%2Fpasswd",
        "HTML": "%3Cscript%3E",
        "NUL": "%00",
        "no UTF-8": "%ff",
        "5,000 characters": "m" * 5000,
    }.items():
        yield get(f"a model named {name}", f"/v1/models/{model}", 404, "no such model is served here")
        yield get(f"a tensor model named {name}", f"/v2/models/{model}", 404, "no such model is served here")
    for place in ("/v1/models", "/v2/models"):
        yield get(f"a line break as a model of {place}", f"{place}/a%0d%0ab", 404)
    for version in ("0", "-1", "2", "1.0", "01", "latest", "%00"):
        yield get(f"version {version}", f"/v2/models/fake/versions/{version}", 404, "no such version")
    lines = {
        "a word": b"NOT HTTP\r\n\r\n",
        "version 7": b"GET / HTTP/7.3\r\nHost: a\r\n\r\n",
        "a version of words": b"GET / HTTP/a.b\r\nHost: localhost\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "a line of 10 kB": b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "no host": b"GET /metrics HTTP/1.1\r\n\r\n",
        "a target that is none": b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "bytes in the target": b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "a tab in the line": b"GET\t/metrics\tHTTP/1.1\r\nHost: localhost\r\n\r\n",
        "NUL in the line": b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "Redis": b"*1\r\n$4\r\nPING\r\n\r\n",
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        "blank lines": b"\r\n\r\n\r\nX\r\n\r\n",
    }
    for name, line in lines.items():
        yield raw("paths", f"a first line of {name}", line, 400)
    # As RFC 9112 allows it, and without a body to disagree about.
    yield raw("paths", "a first line with blanks", b"GET  /metrics  HTTP/1.1\r\nHost: localhost\r\n\r\n", 200)
    yield raw("paths", "a first line of HTTP/0.9", b"GET /metrics\r\n\r\n", 421)


def method_cases() -> Iterator[HttpCase]:
    for path, methods in {
        "/metrics": ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"),
        OPENAI: ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"),
        "/api/v1/benchmark": ("GET", "DELETE"),
        "/": ("PUT", "DELETE", "OPTIONS"),
        "/v2": ("POST", "DELETE"),
    }.items():
        for method in methods:
            yield raw("methods", f"{method} {path}", http_request(path, b"", method=method), 405)
    for method in ("BREW", "get", "G\xcbT", "A" * 1000):
        line = f"{method} /metrics HTTP/1.1"
        yield raw("methods", f"a method that is none: {method[:10]}", head(line=line), 400)
    connect = head(line="CONNECT localhost:22 HTTP/1.1")
    yield raw("methods", "a tunnel", connect, 404)


def all_cases() -> list[HttpCase]:
    """Paths and methods."""
    return [*path_cases(), *method_cases()]
