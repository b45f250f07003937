"""What a server answers when it does not answer, as exceptions that a caller can act on.

ServerError                a status that is none of the following
├── InvalidRequestError    the input is wrong (`fields` says where); repeating it cannot help
├── WrongTaskError         the loaded model cannot do this
├── ModelNotFoundError     no model of that name is served there
├── SpaceMismatchError     the vectors would be of another space than expected
├── NotAllowedError        no key that the server knows, or one without the right to this
├── OverloadedError        the queue is full, or a message too large; `retry_after_s` says when to come back
├── DeadlineExceededError  the time ran out before the answer came
├── UnavailableError       nothing serves there now: loading, shutting down, or not reachable
└── ModelFailedError       the model failed on this input, or the server has a bug
"""

import re
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

    def moved_by(self, places: int) -> None:
        """Names the items as they stand in a list of which the request held those from `places` on."""
        self.args = (_moved(str(self.args[0]), places),)
        self.fields = tuple((_moved(field, places), _moved(problem, places)) for field, problem in self.fields)

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

    @property
    def is_lost_connection(self) -> bool:
        """Said by gRPC or a proxy and not by the server, which names a reason with all that it refuses.

        gRPC calls the end of a stream INTERNAL or UNKNOWN where it was reset, or where it ended during a write
        (grpc/grpc issue 36066).
        """
        return not self.reason and not (self.retry_after_s or 0.0) < 0 and self.code in _LOST


_LOST = ("UNAVAILABLE", "INTERNAL", "UNKNOWN")


def _moved(text: str, places: int) -> str:
    return re.sub(r"\b(texts|pairs|documents)\[(\d+)\]", lambda found: f"{found[1]}[{int(found[2]) + places}]", text)


class InvalidRequestError(ServerError):
    """The input is wrong; `fields` says where."""


class WrongTaskError(ServerError):
    """The loaded model cannot do this: an embedding from a cross-encoder, say."""


class ModelNotFoundError(ServerError):
    """No model of that name is served there; the message names those that are."""


class SpaceMismatchError(ServerError):
    """The vectors would be of another space than `expect_space_id`: another model, prompt, limit or dimension."""


class NotAllowedError(ServerError):
    """The server has keys: this client sent none that it knows, or one that has not the right to this."""


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
    "NOT_FOUND": ModelNotFoundError,
    "UNAUTHENTICATED": NotAllowedError,
    "PERMISSION_DENIED": NotAllowedError,
    "RESOURCE_EXHAUSTED": OverloadedError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "UNAVAILABLE": UnavailableError,
    "INTERNAL": ModelFailedError,
}
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


def error_of_call(error: Any) -> ServerError:
    """From what a call of grpc or grpc.aio raised: status, message and trailing metadata."""
    trailers = dict(error.trailing_metadata() or ())
    info, retry_after_s, fields = _details(trailers.get("grpc-status-details-bin", b""))
    pushback = trailers.get("grpc-retry-pushback-ms")
    if pushback is not None:  # gRPC's own rule: what is no number means not to come back
        text = pushback.decode(errors="replace") if isinstance(pushback, bytes) else str(pushback)
        retry_after_s = int(text) / 1e3 if text.isdecimal() else -1.0
    code, message = error.code().name, str(error.details() or error.code().name)
    if code == "RESOURCE_EXHAUSTED" and not info.reason and "larger than max" in message:
        message += ": send less at once, or raise server.max_message_bytes there"
    return _class_of(code, info.reason)(
        message,
        code=code,
        reason=info.reason,
        request_id=str(trailers.get("request-id", "")),
        retry_after_s=retry_after_s,
        fields=fields,
    )


def _details(status_bytes: bytes) -> tuple[details_pb.ErrorInfo, float | None, list[tuple[str, str]]]:
    """(reason, seconds to wait, fields); nothing of it where it is not to be read: the status itself still counts."""
    info, retry_after_s, fields = details_pb.ErrorInfo(), None, []
    try:
        for detail in details_pb.Status.FromString(status_bytes).details:
            name = detail.type_url.rpartition(".")[2]
            if name == "ErrorInfo":
                info = details_pb.ErrorInfo.FromString(detail.value)
            elif name == "BadRequest":
                bad = details_pb.BadRequest.FromString(detail.value)
                fields = [(each.field, each.description) for each in bad.field_violations]
            elif name == "RetryInfo":
                delay = details_pb.RetryInfo.FromString(detail.value).retry_delay
                retry_after_s = delay.seconds + delay.nanos / 1e9
    except DecodeError:  # of a proxy between
        return details_pb.ErrorInfo(), None, []
    return info, retry_after_s, fields


def _class_of(code: str, reason: str) -> type[ServerError]:
    """What says something about the model is only believed of the server itself."""
    if reason == "SPACE_MISMATCH":
        return SpaceMismatchError
    kind = _CLASSES.get(code, ServerError)
    return ServerError if kind in (WrongTaskError, ModelNotFoundError, ModelFailedError) and not reason else kind


def error_of_item(error: pb.StreamError) -> ServerError:
    """From the answer to one request on a stream."""
    code = _NAMES.get(error.code, "UNKNOWN")
    return _class_of(code, error.reason)(
        error.message or code,
        code=code,
        reason=error.reason,
        retry_after_s=error.retry_after_ms / 1e3 if error.retry_after_ms else None,
    )


def not_sent(field: str, problem: str) -> InvalidRequestError:
    """For input that no message can hold."""
    return InvalidRequestError(
        f"{field}: {problem}", code="INVALID_ARGUMENT", reason="MALFORMED_REQUEST", fields=[(field, problem)]
    )


def malformed_answer(problem: str, request_id: str = "") -> ServerError:
    """For an answer that is none to the question; nothing of it is given to the caller."""
    return ServerError(f"the answer {problem}", code="INTERNAL", reason="MALFORMED_ANSWER", request_id=request_id)
