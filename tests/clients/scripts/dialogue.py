"""What the scripts share: the task arrives on stdin, and one JSON document leaves on stdout."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """Where the server is, and what to ask it."""

    grpc: str
    http: str
    model: str
    texts: list[str]
    long: str
    query: str
    documents: list[str]

    @property
    def http_address(self) -> str:
        """Without the scheme."""
        return self.http.removeprefix("http://")


def task() -> Task:
    return Task(**json.load(sys.stdin))


def tell(**answers: Any) -> None:
    json.dump(answers, sys.stdout)


def refusal(call: Callable[[], object]) -> dict[str, str]:
    """The exception that a user of this client would see; an answer in its place is an error of the server."""
    try:
        answer = call()
    except Exception as error:
        return {"class": type(error).__name__, "text": str(error)}
    raise SystemExit(f"expected a refusal and got {answer!r}")
