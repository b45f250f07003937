"""What a contender goes through: bad inputs, clients that misbehave, a crowd, a freeze, a stop under load.

Black box: only HTTP, signals, and what the operating system says of its processes.
"""

import asyncio
import contextlib
import json
import random
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.fuzz.http_wire import JSON_TYPE, http_request, read_reply
from tests.scoreboard.inputs import http_fields, http_json, http_lines
from tests.scoreboard.peer.contender import MODEL_NAME, ROUTE, Caller, Contender, Contestant, contest, launched

# No answer comes as late as that.
_HANG_S = 60.0
_CALLERS = 8
_BEFORE_THE_STOP_S, _FROZEN_S = 2.0, 3.0
_ORPHANS_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much of each there is."""

    every_input: int  # one of so many inputs is sent
    noise: int
    bad_clients: int
    crowd: int
    stops: int


FULL = Extent(every_input=1, noise=300, bad_clients=60, crowd=1000, stops=5)
# A model is loaded for each stop, which takes longer than a quick row may.
QUICK = Extent(every_input=12, noise=20, bad_clients=6, crowd=60, stops=0)


@dataclass(slots=True)
class Score:
    """By name, what came of it; faults: of whom each count is the less the better."""

    counts: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float | str] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)


def openai_inputs() -> list[tuple[str, bytes]]:
    """(name, request) of every nasty input that is not meant for another dialect."""
    ours = [case for table in (http_json, http_fields) for case in table.all_cases() if case.server == "plain"]
    to_openai = [case for case in ours if case.request.startswith(f"POST {ROUTE} ".encode())]
    return [(f"{case.group}: {case.name}", case.request) for case in [*to_openai, *http_lines.all_cases()]]


def noisy_inputs(count: int, seed: int) -> list[tuple[str, bytes]]:
    """A sound request with some bytes of its body changed, cut or doubled."""
    rng = random.Random(seed)
    sound = json.dumps({"model": MODEL_NAME, "input": ["one text", "another one"], "encoding_format": "float"}).encode()
    made = []
    for number in range(count):
        body = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(body) + 1)
            match rng.randrange(3):
                case 0:
                    body[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(1, 3))
                case 1:
                    body[at:at] = rng.choice([b"\\", b'"', b"[", b"{", b",", b"\0", b"\xff", b"9" * 30])
                case _:
                    del body[at : at + rng.randint(1, 8)]
        made.append((f"noise {number}", http_request(ROUTE, bytes(body), JSON_TYPE)))
    return made


async def _send(port: int, request: bytes) -> str:
    """A status, "hang", or "closed" without an answer."""
    writer = None
    try:
        async with asyncio.timeout(_HANG_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError):  # refused before it was all sent: the answer says why
                writer.write(request)
                await writer.drain()
            if request.startswith(b"HEAD "):
                return (await reader.readline()).decode("latin-1").split()[1]
            return str((await read_reply(reader)).status)
    except TimeoutError:
        return "hang"
    except (asyncio.IncompleteReadError, ConnectionError, IndexError, ValueError):
        return "closed"
    finally:
        if writer is not None:
            writer.close()


@contextlib.asynccontextmanager
async def _traffic(caller: Caller, callers: int) -> AsyncIterator[Counter[str]]:
    """Good calls one after the other, and how they ended; a caller whose call did not goes on all the same."""
    ends: Counter[str] = Counter()
    over = asyncio.Event()

    async def go_on() -> None:
        while not over.is_set():
            ends[await caller.good_call(_HANG_S)] += 1
            await asyncio.sleep(0.02)  # a caller, and not a load

    tasks = [asyncio.create_task(go_on()) for _ in range(callers)]
    try:
        yield ends
    finally:
        over.set()
        await asyncio.gather(*tasks)


def _harmed(ends: Counter[str]) -> int:
    return ends.total() - ends["ok"]


async def bad_inputs(contestant: Contestant, caller: Caller, inputs: Sequence[tuple[str, bytes]], score: Score) -> None:
    """One after the other beside two good callers; after each a good call has to be answered."""
    statuses: Counter[str] = Counter()
    async with _traffic(caller, 2) as ends:
        for name, request in inputs:
            end = await _send(contestant.port, request)
            statuses[end] += 1
            well = await caller.good_call()
            is_error = end.isdecimal() and int(end) >= 500 and end not in ("501", "503", "505")
            for kind, is_so in {"5xx": is_error, "hang": end == "hang", "not well after": well != "ok"}.items():
                score.counts[f"bad inputs: {kind}"] = score.counts.get(f"bad inputs: {kind}", 0) + is_so
                if is_so:
                    score.examples.append(f"{kind}: {name}"[:120])
            if not contestant.lives:
                score.examples.append(f"crash: {name}"[:120])
                break
    score.counts["bad inputs: crash"] = int(not contestant.lives)
    score.counts["bad inputs: good calls beside them harmed"] = _harmed(ends)
    score.figures["bad inputs sent"] = statuses.total()
    score.figures["answered with"] = ", ".join(f"{end}: {count}" for end, count in sorted(statuses.items()))


async def bad_clients(contestant: Contestant, caller: Caller, count: int, score: Score) -> None:
    """Some cut the connection with their request in work, some stop in the middle of it, some do not read."""
    descriptors_before = _descriptors(contestant)
    long = [f"text {number} of many" for number in range(32)]
    body = json.dumps({"model": MODEL_NAME, "input": long}).encode()
    request = http_request(ROUTE, body, JSON_TYPE)
    async with _traffic(caller, 4) as ends, contextlib.AsyncExitStack() as open_ones:
        for number in range(count):
            reader, writer = await asyncio.open_connection("127.0.0.1", contestant.port)
            kind = number % 3
            writer.write(request if kind != 1 else request[: len(request) // 2])
            await writer.drain()
            if kind == 0:
                raw: socket.socket = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST and not FIN
                await asyncio.sleep(0.01)
                writer.transport.abort()
            else:
                if kind == 2:
                    writer.transport.pause_reading()  # type: ignore[attr-defined]
                open_ones.callback(writer.transport.abort)
            del reader
        began_at = time.monotonic()
        well = await caller.good_call()
        score.figures["seconds to a good answer after the bad clients"] = round(time.monotonic() - began_at, 2)
    score.counts["bad clients: good calls beside them harmed"] = _harmed(ends) + (well != "ok")
    await _until(lambda: _descriptors(contestant) <= descriptors_before, 30.0)
    score.counts["bad clients: descriptors left open"] = max(0, _descriptors(contestant) - descriptors_before)
    score.figures["bad clients"] = count


async def crowd(contestant: Contestant, caller: Caller, count: int, score: Score) -> None:
    """So many calls at once over 100 connections: each is answered, or told to come back; health answers meanwhile."""
    waits_s: list[float] = []

    async def health() -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                began_at = time.monotonic()
                async with session.get(
                    f"{contestant.url}/health", timeout=aiohttp.ClientTimeout(total=_HANG_S)
                ) as told:
                    await told.read()
                waits_s.append(time.monotonic() - began_at)
                await asyncio.sleep(0.05)

    watching = asyncio.create_task(health())
    ends = Counter(await asyncio.gather(*(caller.good_call(2 * _HANG_S) for _ in range(count))))
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError, TimeoutError):
        await watching
    good = ends["ok"] + ends["429"] + ends["503"]
    score.counts["crowd: calls neither answered nor told to come back"] = ends.total() - good
    score.figures["crowd"] = ", ".join(f"{end}: {number}" for end, number in ends.items())
    score.figures["crowd: slowest health answer, s"] = round(max(waits_s, default=-1.0), 2)


async def freeze(contestant: Contestant, caller: Caller, score: Score) -> None:
    """All of its processes stand still for some seconds."""
    async with _traffic(caller, _CALLERS) as ends:
        await asyncio.sleep(0.5)
        family = contestant.family()
        for each in family:
            each.send_signal(signal.SIGSTOP)
        await asyncio.sleep(_FROZEN_S)
        for each in family:
            each.send_signal(signal.SIGCONT)
        await asyncio.sleep(1.0)
    score.counts["frozen for 3 s: calls lost"] = _harmed(ends)


async def stop_under_load(contender: Contender, folder: Path, count: int, score: Score) -> None:
    """SIGTERM while callers call. A call is lost if it got in and ended without an answer that says to come back."""
    lost = slow = 0
    all_ends: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    for _ in range(count):
        async with contest(contender, folder) as (contestant, caller):
            last = [asyncio.create_task(_until_it_ends(caller)) for _ in range(_CALLERS)]
            await asyncio.sleep(_BEFORE_THE_STOP_S)
            code, took_s = await contestant.stop()
            slow += code is None
            codes[str(code)] += 1
            score.figures["stop: slowest, s"] = max(float(score.figures.get("stop: slowest, s", 0.0)), round(took_s, 1))
            if code is None:
                contestant.process.kill()
            ends = Counter(await asyncio.gather(*last))
        all_ends += ends
        lost += ends.total() - ends["refused"] - ends["503"]
    score.counts["stops under load: calls lost"] = lost
    score.counts["stops under load: did not end in 60 s"] = slow
    score.figures["stops under load"] = count
    score.figures["stops: how the last calls ended"] = ", ".join(f"{end}: {n}" for end, n in all_ends.items())
    score.figures["stops: exit codes"] = ", ".join(f"{code}: {n}" for code, n in codes.items())


async def _until_it_ends(caller: Caller) -> str:
    while (end := await caller.good_call(_HANG_S)) == "ok":
        pass
    return end


async def ends_of_process(contender: Contender, folder: Path, score: Score) -> None:
    """SIGTERM while it loads; and SIGKILL, after which none of its processes may be left."""
    async with launched(contender, folder) as contestant:
        await asyncio.sleep(1.0)
        code, took_s = await contestant.stop()
        score.counts["SIGTERM while loading: did not end in 60 s"] = int(code is None)
        score.figures["SIGTERM while loading: seconds, exit code"] = f"{took_s:.1f}, {code}"
    async with contest(contender, folder) as (contestant, _):
        children = contestant.family()[1:]
        contestant.process.kill()
        await contestant.process.wait()
        await _until(lambda: not any(child.is_running() for child in children), _ORPHANS_S)
        score.counts["SIGKILL: processes left"] = sum(child.is_running() for child in children)


def _descriptors(contestant: Contestant) -> int:
    return sum(each.num_fds() for each in contestant.family())


async def _until(condition: object, limit_s: float) -> None:
    assert callable(condition)
    give_up_at = time.monotonic() + limit_s
    while not condition() and time.monotonic() < give_up_at:  # noqa: ASYNC110 - the state of other processes
        await asyncio.sleep(0.1)


async def go_through(contender: Contender, folder: Path, extent: Extent, seed: int) -> Score:
    """Everything, one after the other; without stops no process is ended either."""
    score = Score()
    inputs = [*openai_inputs()[:: extent.every_input], *noisy_inputs(extent.noise, seed)]
    async with contest(contender, folder) as (contestant, caller):
        await bad_clients(contestant, caller, extent.bad_clients, score)
        await crowd(contestant, caller, extent.crowd, score)
        await freeze(contestant, caller, score)
        await bad_inputs(contestant, caller, inputs, score)
    if extent.stops:
        await stop_under_load(contender, folder, extent.stops, score)
        await ends_of_process(contender, folder, score)
    return score
