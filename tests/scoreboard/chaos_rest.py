"""What is looked at beside the calls of the chaos row: health, scrapes, and at the end permits and the log."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping

import aiohttp
import grpc

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from tests.scoreboard.chaos_faults import ChaosFaults
from tests.scoreboard.chaos_ledger import Breach, fallen
from tests.scoreboard.real_server import FAULT_LINES, RealServer

_LOOK_EVERY_S, _SCRAPE_EVERY = 0.2, 5
# Until it serves again, and until all engines are there; the server itself allows a start a minute.
_RECOVERY_S, _WHOLE_S = 30.0, 90.0
_PERMIT_TRIES = 5
_MOST_LINES = 20
# Suffixes of what never falls.
_COUNTERS = ("_total", "_count", "_bucket", "_sum")
# A text that the model fails on has its cause in the log.
_WITH_CAUSE = ("the model failed on one text",)


class Watched:
    """Asks for health five times a second, and for the figures once. serving: (when, whether it says so), in order."""

    def __init__(self, server: RealServer) -> None:
        self._server = server
        self._before: Mapping[str, float] = {}
        self.serving: list[tuple[float, bool]] = []
        self.breaches: list[Breach] = []
        self.scrapes = 0

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Until it is cancelled."""
        # What lies between two runs is no silence: nobody called.
        self.serving.append((time.monotonic(), False))
        look = 0
        while True:
            async with session.get("/readyz") as answer:
                self.serving.append((time.monotonic(), answer.status == 200))
            if look % _SCRAPE_EVERY == 0:
                await self._scrape(session)
            look += 1
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _scrape(self, session: aiohttp.ClientSession) -> None:
        async with session.get("/metrics/prometheus") as answer:
            text = await answer.text()
            if answer.status != 200:
                self.breaches.append(Breach("V12", f"a scrape was answered with {answer.status}"))
                return
        self.scrapes += 1
        now = dict(_counters(text))
        self.breaches += fallen(self._before, now)
        self._before = now


def _counters(text: str) -> Iterator[tuple[str, float]]:
    """Our own lines, which need no parser: name with labels, blank, number."""
    for line in text.splitlines():
        series, _, value = line.rpartition(" ")
        if not line.startswith("#") and series.partition("{")[0].endswith(_COUNTERS):
            yield series, float(value)


async def recovered(server: RealServer, faults: ChaosFaults) -> list[Breach]:
    """V11: after the last fault the server says again that it serves, and then all engines come back."""
    found = []
    waits: tuple[tuple[str, float, Callable[[], bool]], ...] = (
        ("SERVING", _RECOVERY_S, lambda: True),
        ("all engines", _WHOLE_S, faults.is_whole),
    )
    async with aiohttp.ClientSession(server.url) as session:
        for what, limit_s, is_enough in waits:
            why = ""
            try:
                async with asyncio.timeout(limit_s):
                    while True:
                        async with session.get("/readyz") as answer:
                            why = await answer.text()
                            if answer.status == 200 and is_enough():
                                break
                        await asyncio.sleep(_LOOK_EVERY_S)
            except TimeoutError:
                found.append(Breach("V11", f"no {what} {limit_s:.0f} s after the last fault: {why}"))
    return found


async def permit_breaches(server: RealServer, token: str, most: int, streams: int) -> list[Breach]:
    """V4: as many requests as the queue takes are taken, and one more is refused: no permit was lost or made."""
    for _ in range(_PERMIT_TRIES):
        codes, beyond, was_full = await _fill(server, token, most, streams)
        if was_full or beyond == "RESOURCE_EXHAUSTED":
            break
    else:
        return [Breach("V4", f"not seen: {most} requests were never in flight at once in {_PERMIT_TRIES} tries")]
    found = []
    if codes != ["OK"] * most:
        found.append(Breach("V4", f"{most} requests have room, and {codes.count('OK')} were taken"))
    if beyond != "RESOURCE_EXHAUSTED":
        found.append(Breach("V4", f"{most} requests have room, and one more ended with {beyond}"))
    return found


async def _fill(server: RealServer, token: str, most: int, streams: int) -> tuple[list[str], str, bool]:
    """(How as many requests as the queue takes end, how one more ends, whether they were all in flight before it)."""
    metadata = (("authorization", f"Bearer {token}"),)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = rpc.InferenceServiceStub(channel)

        def call(number: int, word: str = "") -> "asyncio.Task[str]":
            own = (*metadata, ("x-request-id", f"permit{number}"))
            request = pb.EmbedRequest(texts=[f"permit{number} permit{number} {word}"])
            return asyncio.create_task(_code(stub.Embed(request, metadata=own, timeout=30)))

        def slow_run() -> bool:
            return not any(each.done() for each in slow)

        async def seen(name: str, number: int) -> None:
            while sum((await server.scrape(name)).values()) < number and slow_run():  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)

        slow: list[asyncio.Task[str]] = []
        for number in range(streams):  # one after the other, or they would travel in one batch
            slow.append(call(number, "!slow:600"))
            await seen("mlis_in_flight_batches", number + 1)
        others = [call(number) for number in range(streams, most)]
        await seen("mlis_in_flight_requests", most)
        beyond = await call(most)
        was_full = slow_run()
        return await asyncio.gather(*slow, *others), beyond, was_full


async def _code(call: "grpc.aio.UnaryUnaryCall[pb.EmbedRequest, pb.EmbedResponse]") -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


def log_breaches(server: RealServer) -> list[Breach]:
    """V14: every line is a record, none of them tells of a bug, and only what a text caused has a traceback."""
    found = []
    with server.log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                found.append(Breach("V14", f"in the log, and no record: {line.strip()[:200]}"))
                continue
            is_caused = str(record["message"]).startswith(_WITH_CAUSE)
            if any(fault in line for fault in FAULT_LINES) or ("exception" in record and not is_caused):
                found.append(Breach("V14", f"in the log: {line.strip()[:300]}"))
    return found[:_MOST_LINES]
