"""What the sidecar's HTTP insists on: security headers, the Host allow-list, the form of answers."""

import ipaddress
import json
import re
from collections.abc import Iterable
from typing import Any

from aiohttp import web

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "ml-inference-server",
}

UNKNOWN_HOST = "this server is not known under that Host: add it to metrics.hosts (--set metrics.hosts=[NAME])"

_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on
_HOST_HEADER = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:@/?#\s]+))(?::[0-9]{1,5})?")
_PROMETHEUS_TYPES = ("text/plain", "application/openmetrics-text")


def allowed_hosts(bound_host: str, machine_name: str, *more: str) -> frozenset[str]:
    """The names under which a browser may come to a server that listens on `bound_host`; `more`: as configured."""
    names = ("localhost", "127.0.0.1", "::1", bound_host, machine_name, *more)
    return frozenset(name.lower() for name in names if name)


def is_host_allowed(header: str, allowed: Iterable[str], bound_host: str) -> bool:
    """Whether a Host header names this server. Any other name may be a foreign one that was made to point here.

    A server that listens on every address cannot list them; an address is nobody's domain, so there any one will do.
    """
    match = _HOST_HEADER.fullmatch(header.lower())
    if match is None:
        return False
    name = (match[1] or match[2]).removesuffix(".")
    return name in allowed or (bound_host in _WILDCARDS and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def wants_prometheus(accept: str) -> bool:
    """True when the Accept header prefers a Prometheus form to JSON; a tie, and silence, mean JSON."""
    weights = _weights(accept)
    return max(_weight(weights, kind) for kind in _PROMETHEUS_TYPES) > _weight(weights, "application/json")


def _weights(accept: str) -> dict[str, float]:
    """Media range -> the highest q that it comes with. A q that is no number counts as 0."""
    weights: dict[str, float] = {}
    for entry in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in entry.split(";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    weight = float(parameter[2:])
                except ValueError:
                    weight = 0.0
        if kind:
            weights[kind] = max(weight, weights.get(kind, 0.0))
    return weights


def _weight(weights: dict[str, float], kind: str) -> float:
    for media_range in (kind, f"{kind.partition('/')[0]}/*", "*/*"):
        if media_range in weights:
            return weights[media_range]
    return 0.0


def json_answer(status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> web.Response:
    """An answer that nobody may keep. ValueError for NaN and infinity, which JSON does not have."""
    return web.Response(
        status=status,
        text=json.dumps(content, allow_nan=False),
        content_type="application/json",
        headers={"Cache-Control": "no-store", "Vary": "Accept", **(headers or {})},
    )


def json_error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    """The one form of every error."""
    return json_answer(status, {"error": {"code": status, "message": message}}, headers)
