"""What stands beside the tensors of an Open Inference request: our options, and what clients send of their own."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from ml_inference_server.server.call import Call
from ml_inference_server.server.options import Overflow
from ml_inference_server.utils.errors import InvalidRequest

# Clients send them with a request; they change nothing here.
_IGNORED = ("binary_data_output", "content_type", "headers")
_IGNORED_PREFIX = "triton_"
_MOST_US = 2**63 - 1  # JSON has no largest integer
_OF_PAIRS = ("overflow", "timeout")
_OF_TEXTS = ("dimensions", "expect_space_id", "input_type", "normalize", "overflow", "prompt_name", "timeout")

T = TypeVar("T", str, int, bool)


class InferParameters:
    """InvalidRequest names what is of the wrong type, or not known: a misspelt one must not pass without a word."""

    def __init__(self, given: Mapping[str, object]) -> None:
        self._given = {
            name: value
            for name, value in given.items()
            if name not in _IGNORED and not name.startswith(_IGNORED_PREFIX)
        }

    def text(self, name: str) -> str | None:
        return self._of_type(name, str, "a string")

    def whole(self, name: str) -> int | None:
        return self._of_type(name, int, "an integer")

    def flag(self, name: str) -> bool | None:
        return self._of_type(name, bool, "true or false")

    def overflow(self) -> Overflow:
        asked = self.text("overflow")
        try:
            return Overflow.CUT if asked is None else Overflow(asked)
        except ValueError:
            raise _wrong("overflow", f"expected {', '.join(Overflow)}") from None

    def within_timeout(self, call: Call) -> Call:
        """`call` with Triton's parameter `timeout`, in microseconds, as its deadline; 0 is none."""
        timeout_us = self.whole("timeout")
        if timeout_us is not None and timeout_us < 0:
            raise _wrong("timeout", "expected microseconds, 0 or more")
        if not timeout_us:
            return call
        timeout_s = min(timeout_us, _MOST_US) / 1e6
        return call._replace(deadline=min(call.deadline, call.received_at + timeout_s))

    def check_known_to_texts(self) -> None:
        self._check_known(_OF_TEXTS)

    def check_known_to_pairs(self) -> None:
        """A pair's prompts are the model's own, and its score has no dimensions."""
        self._check_known(_OF_PAIRS)

    def _check_known(self, known: Sequence[str]) -> None:
        if not self._given.keys() <= set(known):
            raise _wrong("parameters", f"one of them is not known here; known to these inputs: {', '.join(known)}")

    def _of_type(self, name: str, kind: type[T], said: str) -> T | None:
        value = self._given.get(name)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise _wrong(name, f"expected {said}")
        return value


def _wrong(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {message}", violations=[(name, message)])
