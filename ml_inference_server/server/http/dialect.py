"""What one family of routes has of its own: the form of its errors, its statuses, and its names of fields."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_inference_server.server.field_names import renamed
from ml_inference_server.server.status import HTTP_STATUS_OF_REASON, status_of
from ml_inference_server.utils.errors import InvalidRequest, ServiceError


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error on its way out. status: of HTTP. reason: a stable word (utils/errors.py). field: where it lies."""

    status: int
    reason: str
    message: str
    field: str = ""


@dataclass(frozen=True, eq=False)
class Dialect:
    """body: a refusal as this dialect writes it. statuses: by reason, where they differ from server/status.py.

    fields: what the dialect calls the service's fields (texts: input), for the messages.
    """

    name: str
    body: Callable[[Refusal], Mapping[str, Any]]
    statuses: Mapping[str, int] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)

    def refusal(self, error: ServiceError) -> Refusal:
        told = HTTP_STATUS_OF_REASON.get(error.reason, status_of(error).http)
        status = self.statuses.get(error.reason, told)
        message, at = str(error), ""
        if isinstance(error, InvalidRequest):
            at = error.violations[0][0] if error.violations else ""
            if not error.names_as_sent:
                at, message = renamed(at, self.fields), renamed(message, self.fields)
        return Refusal(status, error.reason, message, at)
