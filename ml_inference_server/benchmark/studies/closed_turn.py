"""A short closed loop of embeddings: what the studies compare that load several servers in turn."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ml_inference_server.benchmark.load.channel import Target, check_embeddings
from ml_inference_server.benchmark.target.conditions import process_cpu_s

_TIMEOUT_S = 60.0
_TEXT = "what is a cell and why does it have a membrane round what it is made of"


@dataclass(frozen=True, slots=True)
class ClosedTurn:
    """CPUs that were kept busy by server and client while the calls were answered."""

    calls_per_s: float
    server_cpus: float
    client_cpus: float

    @property
    def server_cpu_s_per_call(self) -> float:
        return self.server_cpus / self.calls_per_s


async def closed_turn(
    server_pid: int, targets: Sequence[Target], *, seconds: float, texts: int, in_flight: int
) -> ClosedTurn:
    """As soon as a call is answered, the next one is sent: `in_flight` at a time over each target.

    RuntimeError for an answer that does not hold a finite vector for each text.
    """
    batch = [_TEXT] * texts
    answered, began = 0, time.monotonic()
    server_s, client_s = process_cpu_s(server_pid) or 0.0, time.process_time()

    async def call(target: Target) -> None:
        nonlocal answered
        while time.monotonic() < began + seconds:
            reply = check_embeddings(await target.embed(batch, _TIMEOUT_S), texts)
            if reply.code != "OK":
                raise RuntimeError(reply.message)
            answered += 1

    await asyncio.gather(*(call(target) for target in targets for _ in range(in_flight)))
    took_s = time.monotonic() - began
    used_s = (process_cpu_s(server_pid) or 0.0) - server_s
    return ClosedTurn(answered / took_s, used_s / took_s, (time.process_time() - client_s) / took_s)
