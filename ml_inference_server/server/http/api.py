"""All HTTP routes of the dialects, as the sidecar takes them."""

from typing import Any

from aiohttp import web

from ml_inference_server.door.rights import Needs
from ml_inference_server.metrics.view import View
from ml_inference_server.server.calls import Calls
from ml_inference_server.server.http import cohere, open_inference, openai, openapi, tei
from ml_inference_server.server.http.dialect import Dialect, Refusal
from ml_inference_server.server.http.endpoint import Endpoints, answer_refusal
from ml_inference_server.server.http.tei_answers import DIALECT as TEI
from ml_inference_server.server.http.tei_answers import info as tei_info
from ml_inference_server.server.state import ServerState
from ml_inference_server.utils.errors import Forbidden, Overloaded, Unauthenticated

# Whose form the errors of a path have, those included that no route answers; below it where it ends with a slash.
_FORMS: dict[str, Dialect] = {
    "/v1/": openai.DIALECT,
    "/embeddings": openai.DIALECT,
    **{f"/v{version}/{name}": cohere.DIALECT for version in (1, 2) for name in ("embed", "rerank")},
    **dict.fromkeys(tei.PATHS, TEI),
    **dict.fromkeys(("/v2", "/v2/"), open_inference.DIALECT),
}

_REASONS = {401: Unauthenticated.reason, 403: Forbidden.reason, 503: Overloaded.reason}
# As the sidecar's own routes write an error.
OWN = Dialect("This server", lambda refusal: {"error": {"code": refusal.status, "message": refusal.message}})


class HttpApi:
    def __init__(self, state: ServerState, calls: Calls, view: View) -> None:
        self._state = state
        self._endpoints = Endpoints(calls, state.settings.server.max_message_bytes, state.relay_key)
        openai.add_routes(self._endpoints, state)
        tei.add_routes(self._endpoints, state, cohere.add_routes(self._endpoints, state))
        open_inference.add_routes(self._endpoints, state, view)
        openapi.add_routes(self._endpoints, OWN)

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Put the routes beside those that `router` has."""
        self._endpoints.add_to(router)

    def info(self) -> dict[str, Any]:
        """What clients of the dialects look for in /info, beside what the server tells of itself."""
        return tei_info(self._state)

    def takes_body(self, request: web.Request) -> bool:
        """Whether one of these routes takes this request with its body."""
        return request.method == "POST" and self.needs(request) is not None

    def needs(self, request: web.Request) -> Needs | None:
        """What the route of this request asks of a key; None where it is none of these."""
        return self._endpoints.needs(request.match_info.route.handler)

    def error(self, request: web.Request, status: int, message: str) -> web.Response | None:
        """An error that was found before or after a route did its work, in the form of its dialect; else None."""
        dialect = dialect_of(request.method, request.path)
        if dialect is OWN:
            return None
        return answer_refusal(dialect, Refusal(status, _REASONS.get(status, "MALFORMED_REQUEST"), message))


def dialect_of(method: str, path: str) -> Dialect:
    """In whose form an error on this path is told, whether or not it is a route."""
    if (method, path) == ("POST", "/"):
        return TEI
    return _FORMS.get(path) or next((_FORMS[each] for each in _FORMS if path.startswith(each) and each[-1] == "/"), OWN)
