"""The server as main starts it, with a ledger of its own: how each request ended, and what the engine executed.

In place of ml_inference_server.main, with its arguments. MLIS_TEST_LEDGER: the folder of the ledger. Each process
writes with one system call for each event, so that one which is killed has told all that it did.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.backends.fake import FakeBackend, FakeTokenizer
from ml_inference_server.main import main
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.pending import Pending, Subscriptions
from ml_inference_server.server.turns import Item
from ml_inference_server.utils.process import end_process

LEDGER = "MLIS_TEST_LEDGER"
# The first two words of a text name its call: together they are no other's.
NAME_TOKENS = 2


def name_of(tokenizer: FakeTokenizer, text: str) -> tuple[int, int]:
    """What the engine's ledger calls the call that sent `text`."""
    first, second = tokenizer.encode([text])[0].ids[1 : 1 + NAME_TOKENS].tolist()
    return first, second


@dataclass
class ServerLedger:
    """ended: (method, code, reason) of each request id, once for each time that it ended. not_started: those who left,
    or whose time was over, before any of their texts was given to the engine. executed: how often the engine was given
    texts of a call, by the call's name."""

    ended: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    not_started: set[str] = field(default_factory=set)
    executed: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        """By method and code."""
        return Counter((method, code) for ends in self.ended.values() for method, code, _ in ends)


def read_ledger(folder: Path) -> ServerLedger:
    """What the processes of a server wrote there."""
    ledger = ServerLedger()
    for path in folder.glob("requests-*"):
        for line in path.read_text(encoding="ascii").splitlines():
            what, request_id, *rest = line.split("\t")
            if what == "ended":
                method, code, reason = rest
                ledger.ended.setdefault(request_id, []).append((method, code, reason))
            else:
                ledger.not_started.add(request_id)
    for path in folder.glob("executed-*"):
        names = np.fromfile(path, np.int32).reshape(-1, NAME_TOKENS)
        ledger.executed.update((first, second) for first, second in names.tolist())
    return ledger


class _File:
    """Made with the first line, in the process that writes it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._descriptor = -1

    def write(self, data: bytes) -> None:
        if self._descriptor < 0:
            path = Path(os.environ[LEDGER]) / f"{self._name}-{os.getpid()}"
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(self._descriptor, data)


def _names(batch: TokenBatch) -> Iterator[tuple[int, int]]:
    for start in batch.starts[:-1].tolist():
        first, second = batch.ids[start + 1 : start + 1 + NAME_TOKENS].tolist()
        yield first, second


def record() -> None:
    """From now on, in this process."""
    requests, executed = _File("requests"), _File("executed")
    finished, leave, infer = Metrics.request_finished, Subscriptions.leave, FakeBackend.infer

    def request_finished(self: Metrics, method: str, code: str, seconds: float, **more: Any) -> None:
        line = "\t".join(("ended", more["request_id"], method, code, more.get("reason", "")))
        requests.write(f"{line}\n".encode())
        finished(self, method, code, seconds, **more)

    def left(self: Subscriptions, pending: Pending) -> list[Item]:
        if pending.missing and not pending.is_dispatched:
            requests.write(f"not started\t{pending.call.request_id}\n".encode())
        return leave(self, pending)

    def inferred(self: FakeBackend, batch: TokenBatch) -> NDArray[np.float32]:
        executed.write(np.array(list(_names(batch)), np.int32).tobytes())
        return infer(self, batch)

    Metrics.request_finished = request_finished  # type: ignore[method-assign]
    Subscriptions.leave = left  # type: ignore[method-assign]
    FakeBackend.infer = inferred  # type: ignore[method-assign]


# The processes of the engine import this module under the second name before they begin.
if __name__ in ("__main__", "__mp_main__"):
    record()
if __name__ == "__main__":
    end_process(main())
