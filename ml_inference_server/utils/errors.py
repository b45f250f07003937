"""The errors of the project.

StartError                    the process ends, with `exit_code` and one line on stderr
├── ConfigError          2    a setting is unknown, ill-typed or contradicts another; or a limit is too low
├── ModelError           3    the model cannot be found, read or run as asked
└── PortInUse            4    a port is taken
ServiceError                  one request is answered with an error; the server goes on
├── Unauthenticated           no key, or none that is known here
├── Forbidden                 the key may not do this
├── InvalidRequest            the input is wrong; repeating it cannot help
│   └── BodyRefused           the body of an HTTP request was not read to its end
├── WrongTask                 the loaded model cannot do this
├── ModelNotFound             no model of that name is served here
├── SpaceMismatch             the caller expects vectors of another space
├── Overloaded                the queue is full, or a limit of the caller's reached; come back after `retry_after_ms`
├── DeadlinePassed            the caller's time ran out before an answer was ready
├── Unavailable               loading or shutting down, or the engine hangs; safe to retry
└── BackendFailure            the model failed on this input, alone
    ├── NonFiniteOutput       the model answered NaN or infinity
    └── OutOfMemory           the memory does not suffice for this input, alone

No error carries a gRPC or HTTP number: `server/status.py` maps them, in one place.
"""

from collections.abc import Sequence

EXIT_OK = 0
EXIT_CONFIG = 2
EXIT_MODEL = 3
EXIT_PORT = 4
EXIT_FAILED_RUN = 5
EXIT_ENGINE_LOST = 6
EXIT_INTERNAL = 70
EXIT_HUNG_UP = 129
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class StartError(Exception):
    """The process cannot start; the message is one line that says what to do.

    What a name or a file brings into it cannot break the line: whatever does not print is shown as its escape.
    """

    exit_code = EXIT_INTERNAL

    def __str__(self) -> str:
        return "".join(each if each.isprintable() else repr(each)[1:-1] for each in super().__str__())


class ConfigError(StartError):
    """A setting is unknown, has the wrong type or range, or contradicts another."""

    exit_code = EXIT_CONFIG


class ModelError(StartError):
    """The model, the device or the precision that was asked for cannot be had."""

    exit_code = EXIT_MODEL


class PortInUse(StartError):
    """A port that the server was told to listen on is taken."""

    exit_code = EXIT_PORT


class ServiceError(Exception):
    """One request fails; `reason` is a stable upper-case word for programs, the message a sentence for people."""

    reason = "INTERNAL_BUG"
    retry_after_ms: int | None = None

    def __init__(self, message: str, *, reason: str | None = None, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason
        if retry_after_ms is not None:
            self.retry_after_ms = retry_after_ms


class Unauthenticated(ServiceError):
    """The caller has no key that is known here. The message is the same whatever is wrong with it."""

    reason = "UNAUTHENTICATED"

    def __init__(self) -> None:
        super().__init__("a valid key is needed: send it as 'authorization: Bearer KEY'")


class Forbidden(ServiceError):
    """The caller's key is known, and has not the right to this."""

    reason = "PERMISSION_DENIED"


class InvalidRequest(ServiceError):
    """The input is wrong. `violations` lists (field path, what is wrong with it), the first 16 of them.

    names_as_sent: the paths are those of the caller's own request, and not the service's names of them.
    """

    reason = "INVALID_FIELD"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        violations: Sequence[tuple[str, str]] = (),
        names_as_sent: bool = False,
    ) -> None:
        super().__init__(message, reason=reason)
        self.violations = tuple(violations[:16])
        self.names_as_sent = names_as_sent


class BodyRefused(InvalidRequest):
    """The body of an HTTP request was not read to its end; its connection cannot be used again."""

    reason = "MALFORMED_REQUEST"


class WrongTask(ServiceError):
    """The loaded model cannot do what was asked (an embedding from a cross-encoder, say)."""

    reason = "WRONG_TASK"


class ModelNotFound(ServiceError):
    """The request names a model that is not served here; the message names those that are, never the one asked for."""

    reason = "MODEL_NOT_FOUND"


class SpaceMismatch(ServiceError):
    """The request expects vectors of another space than this server's: another model, prompt, limit or dimension."""

    reason = "SPACE_MISMATCH"


class Overloaded(ServiceError):
    """The queue is full, the wait in it too long (WAIT_TOO_LONG), or a caller asks for more than he may (CALLER_LIMIT).

    `retry_after_ms` estimates when there is room; of requests and tokens per second it is exact.
    """

    reason = "QUEUE_FULL"


class DeadlinePassed(ServiceError):
    """The deadline passed before the work was done."""

    reason = "DEADLINE_EXCEEDED"


class Unavailable(ServiceError):
    """The server is loading or draining, or its engine hangs; the request was not started and can be retried."""

    reason = "DRAINING"
    retry_after_ms = 1000


class BackendFailure(ServiceError):
    """The model raised on this input although it ran alone; its own message goes to the log only."""

    reason = "BACKEND_ERROR"


class NonFiniteOutput(BackendFailure):
    """The model's answer for this input holds NaN or infinity."""

    reason = "NON_FINITE_OUTPUT"


class OutOfMemory(BackendFailure):
    """The engine ran out of memory on this input although it ran alone."""

    reason = "OUT_OF_MEMORY"
