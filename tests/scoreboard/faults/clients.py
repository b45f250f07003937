"""F5: what clients and the network do to a server, while neighbours on connections of their own call on."""

import asyncio
import random
import signal
import socket
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from tests.faults.faulty_proxy import FaultyProxy
from tests.faults.raw_http2 import HEADERS, PREFACE, SETTINGS, frame, headers_of_a_call
from tests.integration.server_process import ROOT
from tests.scoreboard.faults.live import FAULT_WORDS, Live, ending, live_server, loop_lag, new_text, until, until_async
from tests.scoreboard.faults.outcome import NotProven, Outcomes, TooLate, figure, in_time
from tests.scoreboard.row import Figure, Row, Scope

REPEATS = 10
CALLS = 30
LEAST_STRUCK = 4
# So slow that most of the calls of a client wait when it goes.
SETTINGS_OF_SERVER = (*FAULT_WORDS, "--model-name", "fake:base_ms=30", "--set", "batching.max_batch_size=4")
_KEEPALIVE_S = 30.0  # 20 until the server asks, 10 until it gives up
_END_HEADERS, _DATA = 4, 0
_CLIENT = """
import sys, time
import grpc
from ml_inference_server.proto import inference_pb2 as pb, inference_pb2_grpc as rpc
channel = grpc.insecure_channel(sys.argv[1])
stub = rpc.InferenceServiceStub(channel)
calls = [stub.Embed.future(pb.EmbedRequest(texts=[f"{sys.argv[2]} {i}"])) for i in range(100)]
calls[0].result()
print("under way", flush=True)
time.sleep(600)
"""


async def _in_flight(live: Live) -> int:
    return int(sum((await live.figures())["in_flight"].values()))


async def _until_in_flight(live: Live, least: int) -> None:
    async def there() -> bool:
        return await _in_flight(live) >= least

    await until_async(there, f"{least} calls are in flight")


async def _cancelled(live: Live) -> int:
    return int((await live.figures())["totals"]["by_method_and_code"].get("Embed", {}).get("CANCELLED", 0))


def _channel(port: int) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])


def _calls(channel: grpc.aio.Channel, count: int = CALLS) -> list[Any]:
    stub = rpc.InferenceServiceStub(channel)
    return [stub.Embed(pb.EmbedRequest(texts=[new_text()]), timeout=60) for _ in range(count)]


async def _first_ended(calls: list[Any]) -> None:
    await until(lambda: any(call.done() for call in calls), "a call is answered")


async def _all_ended(calls: list[Any]) -> Counter[str]:
    ends: Counter[str] = Counter()
    for call in calls:
        try:
            ends[await ending(call)] += 1
        except asyncio.CancelledError:
            ends["CANCELLED"] += 1
    return ends


async def _cancel(live: Live, rng: random.Random) -> int:
    """Some wait, some are in a batch, some have just ended."""
    before = await _cancelled(live)
    async with _channel(live.ports["grpc_port"]) as channel:
        calls = _calls(channel)
        await _first_ended(calls)
        for call in rng.sample(calls, len(calls)):
            call.cancel()
        ends = await _all_ended(calls)

    async def counted() -> bool:
        return await _cancelled(live) > before

    if not ends["CANCELLED"]:
        raise TooLate("all calls had been answered")
    try:
        await until_async(counted, "the server counts cancelled calls", limit_s=10)
    except TimeoutError as error:
        raise TooLate("the server had answered all calls") from error
    return ends["CANCELLED"]


async def _reset(live: Live, rng: random.Random) -> int:
    return await _through_proxy(live, FaultyProxy.reset)


async def _half_close(live: Live, rng: random.Random) -> int:
    return await _through_proxy(live, FaultyProxy.half_close)


async def _through_proxy(live: Live, fault: Callable[[FaultyProxy], None]) -> int:
    async with FaultyProxy(live.ports["grpc_port"]).running() as proxy, _channel(proxy.port) as channel:
        calls = _calls(channel)
        await _first_ended(calls)
        fault(proxy)
        ends = await _all_ended(calls)
    return ends.total() - ends["OK"]


async def _kill_client(live: Live, rng: random.Random) -> int:
    """A process with a hundred calls in flight."""
    before = await _cancelled(live)
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _CLIENT, live.address, new_text(), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert client.stdout is not None
        if await client.stdout.readline() != b"under way\n":
            raise NotProven("the client did not begin")
    finally:
        client.send_signal(signal.SIGKILL)
        await client.wait()

    async def counted() -> bool:
        return await _cancelled(live) > before

    try:
        await until_async(counted, "the server counts the calls of the client that was killed", limit_s=10)
    except TimeoutError as error:
        raise TooLate("the server had answered all calls") from error
    return await _cancelled(live) - before


async def _slow_read(live: Live, rng: random.Random) -> int:
    """Of streams whose answers are much more than the sockets hold; in the end the reader goes."""
    large = pb.EmbedRequest(texts=[new_text() for _ in range(1000)])
    async with FaultyProxy(live.ports["grpc_port"]).running() as proxy, _channel(proxy.port) as channel:
        streams = [rpc.InferenceServiceStub(channel).EmbedStream(timeout=60) for _ in range(4)]
        for stream in streams:
            await stream.write(pb.EmbedStreamRequest(id=1, request=pb.EmbedRequest(texts=[new_text()])))
            await stream.read()
        proxy.stop_reading()
        before = proxy.bytes_to_client
        writing = [asyncio.create_task(_write_on(stream, large)) for stream in streams]
        await until(lambda: all(task.done() for task in writing), "the server takes no more", limit_s=60)
        if proxy.bytes_to_client > before + 65536:
            raise NotProven("the proxy read on")
        for stream in streams:
            stream.cancel()
        proxy.reset()
    return len(streams)


async def _write_on(stream: Any, large: pb.EmbedRequest) -> None:
    """Until the server takes no more for a second, or has taken sixty."""
    for number in range(2, 62):
        try:
            await asyncio.wait_for(stream.write(pb.EmbedStreamRequest(id=number, request=large)), 1)
        except (TimeoutError, asyncio.CancelledError, asyncio.InvalidStateError, grpc.aio.AioRpcError):
            return


async def _slow_write(live: Live, rng: random.Random) -> int:
    """Calls that begin and whose messages never come; they hold nothing, and their connections are reset."""
    block = headers_of_a_call("Embed", live.address)
    connections = []
    try:
        for _ in range(4):
            connection = socket.create_connection(("127.0.0.1", live.ports["grpc_port"]))
            connections.append(connection)
            connection.sendall(PREFACE + frame(SETTINGS) + frame(SETTINGS, flags=1))
            for stream in range(1, 2 * CALLS, 2):
                connection.sendall(frame(HEADERS, stream, block, _END_HEADERS))
                connection.sendall(frame(_DATA, stream, b"\0"))  # a fifth of a message's head
        # Answered after them: the server has them by then.
        await live.ask()
        if (waiting := (await live.figures())["queue"]["texts"]) >= CALLS:  # of the neighbours it is a few
            raise AssertionError(f"{waiting} texts wait, though the calls have sent none")
        for connection in connections:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    finally:
        for connection in connections:
            connection.close()
    return 4 * CALLS


async def _cut(live: Live, rng: random.Random) -> int:
    """Nothing comes through any more, and nobody is told: the server has to find out by itself."""
    async with FaultyProxy(live.ports["grpc_port"]).running() as proxy, _channel(proxy.port) as channel:
        streams = [rpc.InferenceServiceStub(channel).EmbedStream() for _ in range(CALLS)]
        for stream in streams:
            await stream.write(pb.EmbedStreamRequest(id=1, request=pb.EmbedRequest(texts=[new_text()])))
        await asyncio.gather(*(stream.read() for stream in streams))
        calls = _calls(channel)
        await _first_ended(calls)
        proxy.cut()
        (leg,) = proxy.legs
        await asyncio.wait_for(leg.is_ended.wait(), 2 * _KEEPALIVE_S)
        for each in [*streams, *calls]:
            each.cancel()
    return CALLS


Fault = Callable[[Live, random.Random], Awaitable[int]]
KINDS: dict[str, Fault] = {
    "cancel": _cancel,
    "RST": _reset,
    "kill of the client": _kill_client,
    "half-close": _half_close,
    "slow read": _slow_read,
    "slow write": _slow_write,
    "silent cut": _cut,
}
# It takes as long as the server waits for an answer to its ping.
_SLOW = {"silent cut"}


async def _struck(live: Live, rng: random.Random, name: str) -> int:
    """How many calls of the client it struck."""
    if (count := await KINDS[name](live, rng)) < LEAST_STRUCK:
        raise TooLate(f"{name}: only {count} calls of the client were struck")
    return count


async def _run(scope: Scope) -> Figure:
    rng = random.Random(scope.seed)
    outcomes, leaked, harmed, struck, called = Outcomes(), 0, 0, Counter[str](), 0
    kinds = [name for name in KINDS if not (scope.is_quick and name in _SLOW)]
    repeats = {name: 1 if scope.is_quick or name in _SLOW else REPEATS for name in kinds}
    async with loop_lag() as lag, live_server(*SETTINGS_OF_SERVER) as live:
        for name in kinds:
            for _ in range(repeats[name]):
                async with live.neighbours() as neighbours:
                    await until(lambda n=neighbours: n.ends["OK"] > 3, "the neighbours are served")  # type: ignore[misc]
                    count = await in_time(lambda name=name: _struck(live, rng, name))  # type: ignore[misc]
                    answered = neighbours.ends["OK"]
                    await until(lambda n=neighbours, a=answered: n.ends["OK"] > a + 3, "they are served on")  # type: ignore[misc]
                left = await live.permits_left_over()
                struck[name] += count
                leaked, harmed, called = leaked + left, harmed + neighbours.harmed, called + neighbours.ends.total()
                wrong = [f"{left} permits are left over"] * bool(left)
                wrong += [f"neighbours ended with {dict(neighbours.ends)}"] * bool(neighbours.harmed)
                outcomes.add(name, wrong)
                scope.tell(outcomes.tried.total(), sum(repeats.values()))
    found = figure(
        outcomes, lag=lag, neighbours_calls=called, **{f"{name}: calls_struck": n for name, n in struck.items()}
    )
    return replace(
        found,
        text=f"{leaked} permits leaked, {harmed} of {called} calls of neighbours harmed",
    )


ROW = Row(
    key="F5",
    title=f"Clients that go wrong while neighbours call: {', '.join(KINDS)}",
    pass_line="0 permits leaked, 0 neighbours harmed",
    run=_run,
)
