"""Callers of a soak: a process that keeps calls in flight, some of which are cancelled, and some of which fail.

It prints lines of JSON: {"done": 1200} as it goes on, and at the end {"ends": {"plain OK": 12, ...}, "wrong": [...]}.
"""

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from typing import Any

import grpc
import numpy as np

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto import inference_pb2 as pb

_METHOD = "/ml_inference_server.v1.InferenceService/Embed"
_CHECK_EVERY = 20
_MOST_TOLD = 20
_TIMEOUT_S, _SHORT_S = 60.0, 0.002
# A call that is to be cancelled is so after a moment between none and this.
_CANCELLED_AFTER_S = 0.05
_TELL_EVERY_S = 0.05

# How a call fails, how often among those that fail, and what it may end with.
FAILURES: dict[str, tuple[int, frozenset[str]]] = {
    "empty": (34, frozenset({"INVALID_ARGUMENT"})),
    "malformed": (10, frozenset({"INVALID_ARGUMENT"})),
    "nan": (30, frozenset({"INTERNAL"})),
    "late": (25, frozenset({"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "OK"})),
    "raise": (1, frozenset({"INTERNAL"})),
}
ALLOWED = {name: ends for name, (_, ends) in FAILURES.items()} | {
    "plain": frozenset({"OK"}),
    "cancel": frozenset({"OK", "CANCELLED"}),
}


class SoakCallers:
    """`calls` calls, of which the shares `cancelled` and `failing` end so.

    A cancellation may come too late, and a short deadline suffice: then another call is cancelled or fails instead.
    """

    def __init__(self, calls: int, *, cancelled: float, failing: float, seed: int) -> None:
        self._left = calls
        self._shares = {"cancelled": cancelled, "failing": failing}
        self._rng = random.Random(seed)
        self._name = f"{seed:x}"
        self._begun = 0
        self._due: Counter[str] = Counter()  # calls that ended so, and calls under way that are to end so
        self.done = 0
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, port: int, in_flight: int) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            method: Any = channel.unary_unary(_METHOD)
            telling = asyncio.create_task(self._tell_progress())
            await asyncio.gather(*(self._call_until_over(method) for _ in range(in_flight)))
            telling.cancel()

    async def _tell_progress(self) -> None:
        while True:
            await asyncio.sleep(_TELL_EVERY_S)
            print(json.dumps({"done": self.done}), flush=True)

    async def _call_until_over(self, method: Any) -> None:
        while self._left:
            self._left -= 1
            self._begun += 1
            kind, group = self._next()
            self._due[group] += 1
            code = await self._call(method, kind, self._begun)
            if group and code == "OK":
                self._due[group] -= 1
            self.done += 1
            self.ends[f"{kind} {code}"] += 1
            if code not in ALLOWED[kind]:
                self._tell(f"{kind} ended with {code}")

    def _next(self) -> tuple[str, str]:
        """A kind, and which share it counts for."""
        for group, share in self._shares.items():
            if self._due[group] < share * self._begun:
                if group == "cancelled":
                    return "cancel", group
                return self._rng.choices(list(FAILURES), [weight for weight, _ in FAILURES.values()])[0], group
        return "plain", ""

    async def _call(self, method: Any, kind: str, number: int) -> str:
        text = f"{self._name} {number}"
        if kind == "empty":
            text = " "
        elif kind in ("nan", "raise"):
            text = f"!{kind} {text}"
        body = b"\xff" if kind == "malformed" else pb.EmbedRequest(texts=[text]).SerializeToString()
        call = method(body, timeout=_SHORT_S if kind == "late" else _TIMEOUT_S)
        if kind == "cancel":
            asyncio.get_running_loop().call_later(self._rng.uniform(0, _CANCELLED_AFTER_S), call.cancel)
        try:
            reply = await call
        except asyncio.CancelledError:
            return "CANCELLED"
        except grpc.aio.AioRpcError as error:
            return error.code().name
        if number % _CHECK_EVERY == 0:
            got = np.frombuffer(pb.EmbedResponse.FromString(reply).embeddings, "<f4")
            if not np.array_equal(got, fake_embedding(text)):
                self._tell(f"another answer for {text!r}")
        return "OK"

    def _tell(self, what: str) -> None:
        self.ends["wrong"] += 1
        if len(self.wrong) < _MOST_TOLD:
            self.wrong.append(what)


def main() -> int:
    parser = argparse.ArgumentParser(description="Callers of a soak.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--calls", type=int, required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--cancelled", type=float, default=0.0)
    parser.add_argument("--failing", type=float, default=0.0)
    parser.add_argument("--seed", type=int, required=True)
    given = parser.parse_args()
    callers = SoakCallers(given.calls, cancelled=given.cancelled, failing=given.failing, seed=given.seed)
    asyncio.run(callers.run(given.port, given.in_flight))
    print(json.dumps({"ends": callers.ends, "wrong": callers.wrong}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
