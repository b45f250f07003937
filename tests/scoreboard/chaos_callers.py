"""Callers of the chaos row: a process that sends calls of all kinds and writes down how each ended.

For each line on its standard input, {"calls": 1000}, it makes so many calls, and answers with a line when they have
ended.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from tests.scoreboard.chaos_ledger import CallEnd
from tests.scoreboard.chaos_plan import KINDS, PlannedCall, planned

SERVICE = "/ml_inference_server.v1.InferenceService/"
TIMEOUT_S = 10.0
_IN_FLIGHT = 24
# Between two calls of one caller, in the mean.
_THINK_S = 0.02
_LAG_EVERY_S = 0.05
_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 300)]


def options(name: str) -> list[tuple[str, Any]]:
    """Of a channel that shares no connection with another."""
    return [*_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.primary_user_agent", name)]


class ChaosCaller:
    """Makes calls over channels by lane, with the key of each lane, and hands over how they ended."""

    def __init__(self, channels: Mapping[str, grpc.aio.Channel], tokens: Mapping[str, str]) -> None:
        self._methods: dict[tuple[str, str], Any] = {
            (lane, method): channel.unary_unary(SERVICE + method)
            for lane, channel in channels.items()
            for method in ("Embed", "Score", "Rerank")
        }
        self._tokens = tokens

    async def call(self, each: PlannedCall) -> CallEnd:
        lane = KINDS[each.kind].lane
        method = self._methods["proxied" if lane == "proxied" else "", each.method]
        token = self._tokens.get(lane, self._tokens[""])
        metadata = (("authorization", f"Bearer {token}"), ("x-request-id", each.name))
        body = each.body
        began_at = time.monotonic()
        call = method(body, timeout=each.timeout_s, metadata=metadata, wait_for_ready=lane == "proxied")
        if each.after_s:
            asyncio.get_running_loop().call_later(each.after_s, call.cancel)
        code, reason, is_right, by_server, has_hints = "OK", "", True, True, True
        try:
            reply = await call
        except asyncio.CancelledError:
            code, by_server = "CANCELLED", False
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            trailers = dict(error.trailing_metadata() or ())
            by_server = "request-id" in trailers or code == "UNAUTHENTICATED"
            reason, has_retry_info = error_details(trailers.get("grpc-status-details-bin", b""))
            has_hints = has_retry_info and "grpc-retry-pushback-ms" in trailers
        ended_at = time.monotonic()
        if code == "OK":
            is_right = each.is_right(reply)
        return CallEnd(
            name=each.name,
            kind=each.kind,
            method=each.method,
            code=code,
            reason=reason,
            began_at=began_at,
            ended_at=ended_at,
            timeout_s=each.timeout_s,
            by_server=by_server,
            has_hints=has_hints,
            is_right=is_right,
        )


def error_details(raw: str | bytes) -> tuple[str, bool]:
    """The reason, and whether it says when to come again."""
    reason, has_retry_info = "", False
    for detail in status_pb2.Status.FromString(raw if isinstance(raw, bytes) else raw.encode()).details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason = info.reason
        has_retry_info |= detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    return reason, has_retry_info


class _Lag:
    """How late the loop of this process is, at most: what callers see late may be late for that."""

    most_s = 0.0

    async def watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(_LAG_EVERY_S)
            self.most_s = max(self.most_s, time.monotonic() - before - _LAG_EVERY_S)


async def _segment(caller: ChaosCaller, calls: int, first: int, seed: str, number: int, file: IO[str]) -> None:
    numbers = iter(range(first, first + calls))

    async def call_until_over() -> None:
        for each in numbers:
            rng = random.Random(f"{seed}/{number}/{each}")
            ended = await caller.call(planned(rng, f"{number}c{each}", TIMEOUT_S))
            file.write(ended.line())
            await asyncio.sleep(rng.expovariate(1 / _THINK_S))

    await asyncio.gather(*(call_until_over() for _ in range(_IN_FLIGHT)))
    file.flush()


async def _run(given: argparse.Namespace, file: IO[str]) -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tokens: dict[str, str] = json.loads((await reader.readline()).decode())
    first = 0
    async for line in reader:
        calls = json.loads(line)["calls"]
        lag = _Lag()
        watching = asyncio.create_task(lag.watch())
        # Anew for each segment: at rest the server holds no connection of ours.
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{given.port}", options=options("plain")) as channel,
            grpc.aio.insecure_channel(f"127.0.0.1:{given.proxy_port}", options=options("proxied")) as proxied,
        ):
            caller = ChaosCaller({"": channel, "proxied": proxied}, tokens)
            await _segment(caller, calls, first, given.seed, given.number, file)
        watching.cancel()
        first += calls
        print(json.dumps({"ended": calls, "lag_s": lag.most_s}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Callers of the chaos row. The first line: keys by lane, as JSON.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--proxy-port", type=int, required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--seed", required=True)
    parser.add_argument("--ledger", required=True)
    given = parser.parse_args()
    with Path(given.ledger).open("w", encoding="ascii") as file:
        asyncio.run(_run(given, file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
