"""GET /openapi.json, written from the schemas that check requests, and the page that shows it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic.json_schema import models_json_schema

from ml_inference_server import __version__
from ml_inference_server.door.rights import OPEN
from ml_inference_server.server.http.answer import json_bytes
from ml_inference_server.server.http.dialect import Dialect, Refusal
from ml_inference_server.server.http.endpoint import Endpoints, Route, Schema

_PAGE = Path(__file__).resolve().parent / "page"
_FILES = {
    "/docs": ("docs.html", "text/html"),
    "/docs.js": ("docs.js", "text/javascript"),
    "/docs.css": ("docs.css", "text/css"),
}
_DESCRIPTION = (
    "Requests of every dialect meet in one queue and one model, and no dialect changes a bit of what it answers. "
    "Answers tell how many tokens each text had, which texts were cut, and the space of their vectors."
)
_STATUSES = {
    400: "The request is wrong; the message says where",
    401: "No valid key, where the server has keys",
    403: "The key has not the right to this",
    404: "No such model, or no such route",
    408: "The body came too slowly",
    412: "The vectors would be of another space than expected",
    413: "The body is too long",
    415: "The body is no JSON, or compressed",
    417: "It expects something else than 100-continue",
    422: "The request is wrong; the message says where",
    424: "The model cannot do this",
    429: "The queue is full: come back after Retry-After",
    500: "The model failed on this input",
    503: "The model is being loaded, or the server shuts down",
    504: "The deadline passed",
}
_PATTERN = re.compile(r"\{(\w+)(?::[^{}]*)?\}")


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    schemas = list(dict.fromkeys(schema for route in routes for schema in _schemas(route)))
    _, definitions = models_json_schema(
        [(schema, "validation") for schema in schemas], ref_template="#/components/schemas/{model}"
    )
    dialects = list(dict.fromkeys(route.dialect for route in routes))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(_PATTERN.sub(r"{\1}", route.path), {})[route.method.lower()] = _operation(route)
    errors = {f"{_word(dialect)}Error": _error_schema(dialect) for dialect in dialects}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ML inference server", "version": __version__, "description": _DESCRIPTION},
        "tags": [{"name": dialect.name} for dialect in dialects],
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), **errors},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def add_routes(endpoints: Endpoints, dialect: Dialect) -> None:
    """The document and its page; call it when all other routes are there."""
    body = json_bytes(document(endpoints.routes))
    endpoints.question("GET", "/openapi.json", dialect, _giving(body, "application/json"), "This description", OPEN)
    for path, (name, content_type) in _FILES.items():
        give = _giving((_PAGE / name).read_bytes(), content_type)
        endpoints.question("GET", path, dialect, give, "The page of this description", OPEN)


def _giving(body: bytes, content_type: str) -> Callable[[web.Request], web.Response]:
    charset = None if content_type == "application/json" else "utf-8"

    def give(_: web.Request) -> web.Response:
        return web.Response(
            body=body, content_type=content_type, charset=charset, headers={"Cache-Control": "no-cache"}
        )

    return give


def _schemas(route: Route) -> Iterable[type[Schema]]:
    return filter(None, (route.schema, *route.others))


def _operation(route: Route) -> dict[str, Any]:
    forms = [
        {"$ref": f"#/components/schemas/{_word(dialect)}Error"} for dialect in (route.dialect, *route.other_dialects)
    ]
    error = {"application/json": {"schema": forms[0] if len(forms) == 1 else {"anyOf": forms}}}
    operation: dict[str, Any] = {
        "tags": [route.dialect.name],
        "summary": route.summary,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}_{_PATTERN.sub('by_name', route.path)}").strip("_"),
        "responses": {
            "200": {"description": "Done"},
            **{str(status): {"description": text, "content": error} for status, text in _STATUSES.items()},
        },
    }
    if route.needs:
        operation["security"] = [{}, {"key": []}]
        operation["description"] = f"Where the server has keys: one with the right {' or '.join(sorted(route.needs))}."
    if names := _PATTERN.findall(route.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    references = [{"$ref": f"#/components/schemas/{schema.__name__}"} for schema in _schemas(route)]
    if references:
        schema = references[0] if len(references) == 1 else {"anyOf": references}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _word(dialect: Dialect) -> str:
    return re.sub(r"\W", "", dialect.name.title())


def _error_schema(dialect: Dialect) -> dict[str, Any]:
    """Of the dialect's errors, read off one of them."""
    return _shape(dialect.body(Refusal(400, "INVALID_FIELD", "a sentence", "field")))


def _shape(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        properties = {name: _shape(each) for name, each in value.items()}
        return {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "integer"} if isinstance(value, int) else {"type": ["string", "null"]}
