"""What a server answers when it does not answer, as exceptions that a caller can act on.

ServerError                a status that is none of the following
├── InvalidRequestError    the input is wrong (`fields` says where); repeating it cannot help
├── WrongTaskError         the loaded model cannot do this
├── OverloadedError        the queue is full, or a message too large; `retry_after_s` says when to come back
├── DeadlineExceededError  the time ran out before the answer came
├── UnavailableError       nothing serves there now: loading, shutting down, or not reachable
└── ModelFailedError       the model failed on this input, or the server has a bug
"""

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ml_inference_server.proto import error_details_pb2 as details_pb
from ml_inference_server.proto import inference_pb2 as pb


class ServerError(Exception):
    """code: gRPC's status, such as INVALID_ARGUMENT. reason: the server's stable word for it, "" if it sent none.

    request_id: under which the server logged it, "" if unknown. retry_after_s: when the server expects to have room;
    None where it said nothing, below 0 where it asked not to come back. fields: (field, what is wrong with it).
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        reason: str = "",
        request_id: str = "",
        retry_after_s: float | None = None,
        fields: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.fields = tuple(fields)

    def __str__(self) -> str:
        return f"{self.reason or self.code}: {super().__str__()}"

    @property
    def is_about_size(self) -> bool:
        """The request is sound, but too large to be sent or answered at once."""
        own = self.reason in ("TOO_MANY_TEXTS", "REPLY_TOO_LARGE")
        return own or (self.code == "RESOURCE_EXHAUSTED" and not self.reason)

    @property
    def can_be_repeated(self) -> bool:
        """Whether the same call may succeed later."""
        if self.retry_after_s is not None and self.retry_after_s < 0:
            return False
        return self.code == "UNAVAILABLE" or (self.code == "RESOURCE_EXHAUSTED" and self.retry_after_s is not None)


class InvalidRequestError(ServerError):
    """The input is wrong; `fields` says where."""


class WrongTaskError(ServerError):
    """The loaded model cannot do this: an embedding from a cross-encoder, say."""


class OverloadedError(ServerError):
    """The server has no room; `retry_after_s` says when to come back. Without a reason: the message is too large."""


class DeadlineExceededError(ServerError):
    """The time ran out before the answer came."""


class UnavailableError(ServerError):
    """Nothing serves there now."""


class ModelFailedError(ServerError):
    """The model failed on this input, or the server has a bug; the server's log has the cause."""


_CLASSES: dict[str, type[ServerError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "FAILED_PRECONDITION": WrongTaskError,
    "RESOURCE_EXHAUSTED": OverloadedError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "UNAVAILABLE": UnavailableError,
    "INTERNAL": ModelFailedError,
}
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


def error_of_call(error: Any) -> ServerError:
    """From what a call of grpc or grpc.aio raised: status, message and trailing metadata."""
    trailers = dict(error.trailing_metadata() or ())
    status = details_pb.Status()
    try:
        status.ParseFromString(trailers.get("grpc-status-details-bin", b""))
    except DecodeError:  # of a proxy between: the status itself still counts
        status = details_pb.Status()
    info, retry, bad = details_pb.ErrorInfo(), details_pb.RetryInfo(), details_pb.BadRequest()
    retry_after_s: float | None = None
    for detail in status.details:
        name = detail.type_url.rpartition(".")[2]
        if name == "ErrorInfo":
            info.ParseFromString(detail.value)
        elif name == "BadRequest":
            bad.ParseFromString(detail.value)
        elif name == "RetryInfo":
            retry.ParseFromString(detail.value)
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    pushback = trailers.get("grpc-retry-pushback-ms")
    if pushback is not None:  # gRPC's own rule: what is no number means not to come back
        text = pushback.decode(errors="replace") if isinstance(pushback, bytes) else str(pushback)
        retry_after_s = int(text) / 1e3 if text.isdigit() else -1.0
    code, message = error.code().name, str(error.details() or error.code().name)
    if code == "RESOURCE_EXHAUSTED" and not info.reason and "larger than max" in message:
        message += ": send less at once, or raise server.max_message_bytes there"
    return _CLASSES.get(code, ServerError)(
        message,
        code=code,
        reason=info.reason,
        request_id=str(trailers.get("request-id", "")),
        retry_after_s=retry_after_s,
        fields=[(each.field, each.description) for each in bad.field_violations],
    )


def error_of_item(error: pb.StreamError) -> ServerError:
    """From the answer to one request on a stream."""
    code = _NAMES.get(error.code, "UNKNOWN")
    return _CLASSES.get(code, ServerError)(
        error.message or code,
        code=code,
        reason=error.reason,
        retry_after_s=error.retry_after_ms / 1e3 if error.retry_after_ms else None,
    )
