"""All HTTP routes of the dialects, as the sidecar takes them."""

from aiohttp import web

from ml_inference_server.server.calls import Calls
from ml_inference_server.server.http import openai
from ml_inference_server.server.http.dialect import Dialect, Refusal
from ml_inference_server.server.http.endpoint import Endpoints, answer_refusal
from ml_inference_server.server.state import ServerState

# The longest prefix of a path says whose form its errors have, those included that no route answers.
_FORMS: dict[str, Dialect] = {
    "/v1/": openai.DIALECT,
}


class HttpApi:
    def __init__(self, state: ServerState, calls: Calls) -> None:
        self._endpoints = Endpoints(calls, state.settings.server.max_message_bytes)
        openai.add_routes(self._endpoints, state)

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Put the routes beside those that `router` has."""
        self._endpoints.add_to(router)

    def takes_body(self, request: web.Request) -> bool:
        """Whether one of these routes takes this request with its body."""
        handler = request.match_info.route.handler
        return request.method == "POST" and self._endpoints.has(handler)

    def error(self, request: web.Request, status: int, message: str) -> web.Response | None:
        """An error that was found before or after a route did its work, in the form of its dialect; else None."""
        path = request.path
        prefix = max((each for each in _FORMS if path.startswith(each)), key=len, default=None)
        if prefix is None:
            return None
        return answer_refusal(_FORMS[prefix], Refusal(status, "MALFORMED_REQUEST", message))
