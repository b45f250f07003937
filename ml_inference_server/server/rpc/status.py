"""An error as gRPC carries it: code, text, rich details and hints."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from ml_inference_server.server.field_names import renamed
from ml_inference_server.server.status import status_of
from ml_inference_server.utils.errors import InvalidRequest, ServiceError

DOMAIN = "ml_inference_server"
MAX_MESSAGE_BYTES = 512


def _our_words(reason: str, at: str, message: str) -> str:
    return message


@dataclass(frozen=True)
class RpcDialect:
    """What a protocol has of its own in errors; all of it left out is the server's own wire.

    codes: by reason, where they differ from server/status.py. fields: what it calls the service's fields. worded: its
    message, of the reason, the field where the error lies (or empty), and our message.
    """

    codes: Mapping[str, grpc.StatusCode] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    worded: Callable[[str, str, str], str] = _our_words

    def code(self, error: ServiceError) -> grpc.StatusCode:
        return self.codes.get(error.reason, grpc_code(error))

    def violations(self, error: ServiceError) -> list[tuple[str, str]]:
        """(field, what is wrong with it)."""
        if not isinstance(error, InvalidRequest):
            return []
        return [(renamed(at, self.fields), what) for at, what in error.violations]

    def text(self, error: ServiceError) -> str:
        at = next((at for at, _ in self.violations(error)), "")
        return self.worded(error.reason, at, renamed(str(error), self.fields))


OWN_WIRE = RpcDialect()


def grpc_code(error: ServiceError) -> grpc.StatusCode:
    return grpc.StatusCode[status_of(error).grpc]


def status_text(error: ServiceError, dialect: RpcDialect = OWN_WIRE) -> str:
    """The message as it may travel in a header: printable ASCII, at most 512 bytes."""
    text = dialect.text(error)
    if not (text.isascii() and text.isprintable()):
        text = "".join(c if " " <= c <= "~" else "?" for c in text)
    return text[:MAX_MESSAGE_BYTES]


def trailing_metadata(
    error: ServiceError, request_id: str, dialect: RpcDialect = OWN_WIRE
) -> tuple[tuple[str, str | bytes], ...]:
    """Rich error details: ErrorInfo always, BadRequest for input faults, RetryInfo and pushback where waiting helps."""
    status = status_pb2.Status(code=dialect.code(error).value[0], message=status_text(error, dialect))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={"request_id": request_id})
    status.details.add().Pack(info)
    if violations := dialect.violations(error):
        bad = error_details_pb2.BadRequest()
        for at, description in violations:
            bad.field_violations.add(field=at, description=description)
        status.details.add().Pack(bad)
    trailers: list[tuple[str, str | bytes]] = [("request-id", request_id)]
    if error.retry_after_ms is not None:
        delay = Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        trailers.append(("grpc-retry-pushback-ms", str(error.retry_after_ms)))
    trailers.append(("grpc-status-details-bin", status.SerializeToString()))
    return tuple(trailers)
