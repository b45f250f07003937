"""Several client processes that share one load; each is `python -m ml_inference_server.benchmark.load.fleet`.

A child reads its share as one JSON line, connects, answers `ready`, reads the common start instant (perf_counter, which
is one clock for all processes of the machine) and tells how far it is; at the end it writes one JSON line and its
records. `stop`, or the end of its input, ends it early with what it has.
"""

import asyncio
import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np

from ml_inference_server.benchmark.load.channel import Address, Target
from ml_inference_server.benchmark.load.dataset import Workload
from ml_inference_server.benchmark.load.driver import Driver, Left, Share
from ml_inference_server.benchmark.load.loops import ServerGone, event_loop
from ml_inference_server.utils.connection import Connection
from ml_inference_server.utils.errors import EXIT_FAILED_RUN, StartError
from ml_inference_server.utils.installation import child_environment

_TELL_EVERY_S = 0.5
# From the word that all are ready until the first request: enough for the slowest to read it.
_START_MARGIN_S = 0.2
_READY_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_LINE_BYTES = 1 << 30


class ClientProcessFailed(StartError):
    """One of the processes that send could not do its work."""

    exit_code = EXIT_FAILED_RUN


class Fleet:
    """Runs the shares in processes of their own. `left()` is right once `run` has ended, however it ended."""

    def __init__(self, address: Address, shares: Sequence[Share], on_done: Callable[[int], None]) -> None:
        self._address = address
        self._shares = shares
        self._on_done = on_done
        self._parts: list[Left] = []
        self._done = [0] * len(shares)
        self._gone = ""

    def left(self) -> Left:
        parts = self._parts
        errors = [part.first_error for part in parts if part.first_error]
        return Left(
            records=_joined(parts),
            started=sum(part.started for part in parts),
            seconds=max((part.seconds for part in parts), default=0.0),
            cpu_s=sum(part.cpu_s for part in parts),
            processes=len(self._shares),
            first_error=min(errors, key=lambda error: float(error["after_s"]), default=None),
        )

    async def run(self) -> None:
        """ServerGone as one process tells it; ClientProcessFailed if a process ends without its records."""
        children = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "ml_inference_server.benchmark.load.fleet"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=child_environment(),
                limit=_LINE_BYTES,
                start_new_session=True,  # Ctrl-C in the terminal reaches the parent only
            )
            for _ in self._shares
        ]
        try:
            for child, share in zip(children, self._shares, strict=True):
                job = json.dumps(
                    {
                        "address": self._address[:2],
                        # Through a pipe, which nobody else reads.
                        "connection": asdict(self._address.connection),
                        "share": asdict(share),
                    }
                )
                await _tell(child, job)
            async with asyncio.timeout(_READY_TIMEOUT_S):
                for child in children:
                    await _expect_ready(child)
            began_s = time.perf_counter() + _START_MARGIN_S
            for child in children:
                await _tell(child, repr(began_s))
            collecting = asyncio.gather(*(self._collect(number, child) for number, child in enumerate(children)))
            try:
                await asyncio.shield(collecting)
            except asyncio.CancelledError:
                for child in children:
                    with contextlib.suppress(ConnectionError):
                        await _tell(child, "stop")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(collecting, _STOP_TIMEOUT_S)
                raise
        except TimeoutError:
            raise ClientProcessFailed(
                f"a client process was not ready within {_READY_TIMEOUT_S:g} s: the machine has too much to do"
            ) from None
        finally:
            for child in children:
                if child.returncode is None:
                    child.kill()
                await child.wait()
        if self._gone:
            raise ServerGone(self._gone)

    async def _collect(self, number: int, child: asyncio.subprocess.Process) -> None:
        assert child.stdout is not None  # noqa: S101 - it was asked for
        while line := await child.stdout.readline():
            told = json.loads(line)
            if "left" not in told:
                self._done[number] = told["done"]
                self._on_done(sum(self._done))
                continue
            data = await child.stdout.readexactly(told["bytes"])
            self._parts.append(Left(**told["left"], records=np.load(io.BytesIO(data), allow_pickle=False)))
            self._gone = self._gone or told["gone"]
            assert child.stdin is not None  # noqa: S101 - it was asked for
            child.stdin.close()  # the child waits for one more line
            await child.wait()
            return
        raise ClientProcessFailed(f"a client process ended (exit code {await child.wait()}) without its records")


def _joined(parts: Sequence[Left]) -> Any:
    records = np.concatenate([part.records for part in parts]) if parts else Left().records
    return records[np.argsort(records["due_s"], kind="stable")]


async def _tell(child: asyncio.subprocess.Process, line: str) -> None:
    assert child.stdin is not None  # noqa: S101 - it was asked for
    child.stdin.write(line.encode() + b"\n")
    await child.stdin.drain()


async def _expect_ready(child: asyncio.subprocess.Process) -> None:
    assert child.stdout is not None  # noqa: S101 - it was asked for
    if (await child.stdout.readline()).strip() != b"ready":
        raise ClientProcessFailed(f"a client process did not start (exit code {await child.wait()})")


async def _child(source: BinaryIO, sink: BinaryIO) -> None:
    loop = asyncio.get_running_loop()
    job = json.loads(await loop.run_in_executor(None, source.readline))
    given = job["share"]
    given["workload"] = Workload(given["workload"]["kind"], tuple(_hashable(i) for i in given["workload"]["items"]))
    share = Share(**given)
    done = 0

    def count(_call: object) -> None:
        nonlocal done
        done += 1

    gone = ""
    host, port = job["address"]
    async with Target(host, port, Connection(**job["connection"])) as target:
        await target.is_alive()  # connects
        driver = Driver(target, share, count)
        sink.write(b"ready\n")
        sink.flush()
        began_s = float(await loop.run_in_executor(None, source.readline))
        load = asyncio.create_task(driver.run(began_s))
        stop = loop.run_in_executor(None, source.readline)
        while not load.done():
            either: set[asyncio.Future[Any]] = {load, stop}
            await asyncio.wait(either, timeout=_TELL_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                load.cancel()
                await asyncio.wait({load})
            elif not load.done():
                sink.write(json.dumps({"done": done}).encode() + b"\n")
                sink.flush()
        with contextlib.suppress(asyncio.CancelledError):
            try:
                load.result()
            except ServerGone as error:
                gone = str(error)
        left = asdict(driver.left())
    buffer = io.BytesIO()
    np.save(buffer, left.pop("records"), allow_pickle=False)
    head = {"left": left, "gone": gone, "bytes": len(buffer.getvalue())}
    sink.write(json.dumps(head).encode() + b"\n" + buffer.getvalue())
    sink.flush()


def _hashable(item: Any) -> Any:
    return tuple(item) if isinstance(item, list) else item


def main() -> None:
    with asyncio.Runner(loop_factory=event_loop) as runner:
        runner.run(_child(sys.stdin.buffer, sys.stdout.buffer))


if __name__ == "__main__":
    main()
