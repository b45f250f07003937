"""An error as gRPC carries it: code, text, rich details and hints."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from ml_inference_server.server.field_names import renamed
from ml_inference_server.server.status import status_of
from ml_inference_server.utils.errors import InvalidRequest, ServiceError

DOMAIN = "ml_inference_server"
MAX_MESSAGE_BYTES = 512


def grpc_code(error: ServiceError) -> grpc.StatusCode:
    return grpc.StatusCode[status_of(error).grpc]


def status_text(error: ServiceError) -> str:
    """The message as it may travel in a header: printable ASCII, at most 512 bytes."""
    printable = "".join(c if " " <= c <= "~" else "?" for c in str(error))
    return printable[:MAX_MESSAGE_BYTES]


@dataclass(frozen=True)
class RpcDialect:
    """What a foreign protocol has of its own in errors.

    codes: by reason, where they differ from server/status.py. fields: what it calls the service's fields.
    """

    codes: Mapping[str, grpc.StatusCode] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)

    def code(self, error: ServiceError) -> grpc.StatusCode:
        return self.codes.get(error.reason, grpc_code(error))

    def in_its_words(self, error: ServiceError) -> ServiceError:
        if not self.fields or not isinstance(error, InvalidRequest):
            return error
        violations = [(renamed(at, self.fields), what) for at, what in error.violations]
        return InvalidRequest(renamed(str(error), self.fields), reason=error.reason, violations=violations)


OWN_WIRE = RpcDialect()


def trailing_metadata(
    error: ServiceError, request_id: str, code: grpc.StatusCode | None = None
) -> tuple[tuple[str, str | bytes], ...]:
    """Rich error details: ErrorInfo always, BadRequest for input faults, RetryInfo and pushback where waiting helps.

    code: where it is another than that of the table.
    """
    status = status_pb2.Status(code=(code or grpc_code(error)).value[0], message=status_text(error))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={"request_id": request_id})
    status.details.add().Pack(info)
    if isinstance(error, InvalidRequest) and error.violations:
        bad = error_details_pb2.BadRequest()
        for field, description in error.violations:
            bad.field_violations.add(field=field, description=description)
        status.details.add().Pack(bad)
    trailers: list[tuple[str, str | bytes]] = [("request-id", request_id)]
    if error.retry_after_ms is not None:
        delay = Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        trailers.append(("grpc-retry-pushback-ms", str(error.retry_after_ms)))
    trailers.append(("grpc-status-details-bin", status.SerializeToString()))
    return tuple(trailers)
