"""X1: all nasty inputs against server processes, each followed by a right call, and what came of them."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from tests.scoreboard.inputs import (
    grpc_own,
    grpc_tei,
    grpc_transport,
    grpc_triton,
    http_fields,
    http_json,
    http_lines,
    http_transport,
    send_grpc,
    send_http,
)
from tests.scoreboard.inputs.case import Case, GrpcCase, HttpCase
from tests.scoreboard.inputs.send_grpc import GrpcSender
from tests.scoreboard.inputs.send_http import HttpSender
from tests.scoreboard.inputs.servers import SETTINGS, InputServer, input_server


def all_cases() -> list[GrpcCase | HttpCase]:
    """Over both protocols."""
    return [
        *(case for table in (grpc_own, grpc_tei, grpc_triton, grpc_transport) for case in table.all_cases()),
        *(case for table in (http_json, http_fields, http_transport, http_lines) for case in table.all_cases()),
    ]


@dataclass
class Tally:
    """inputs: by group and name. faults: (kind, sentence), of UNKNOWN, 500, hang, crash, wrong, after and log."""

    inputs: set[tuple[str, str]] = field(default_factory=set)
    sent: Counter[str] = field(default_factory=Counter)
    slowest_ms: float = 0.0
    slowest: str = ""
    faults: list[tuple[str, str]] = field(default_factory=list)

    def add(self, kind: str, case: Case, what: object) -> None:
        told = " ".join(str(what).split())[:400]
        self.faults.append((kind, f"{case.group}: {case.name} ({type(case).__name__}, {case.server}): {told}"))

    def count(self, kind: str) -> int:
        return sum(each == kind for each, _ in self.faults)


class _Tries:
    """At one server."""

    def __init__(self, server: InputServer, name: str, tally: Tally) -> None:
        self._server = server
        self._is_cross_encoder = name == "cross"
        self._tally = tally
        self._grpc = GrpcSender(server.grpc_port)
        self._http = HttpSender(server.http_port)

    async def close(self) -> None:
        await self._grpc.close()
        await self._http.close()

    async def try_one(self, case: GrpcCase | HttpCase) -> None:
        tally = self._tally
        tally.inputs.add((case.group, case.name))
        tally.sent[type(case).__name__] += 1
        began = time.monotonic()
        try:
            await self._send(case)
        except TimeoutError:
            tally.add("hang", case, "no end within the limit")
        except AssertionError as error:
            tally.add("wrong", case, error)
        except Exception as error:
            tally.add("wrong", case, repr(error))
        took_ms = 1000 * (time.monotonic() - began)
        if took_ms > tally.slowest_ms:
            tally.slowest_ms, tally.slowest = took_ms, f"{case.group}: {case.name}"
        if not self._server.lives:
            tally.add("crash", case, f"exit code {self._server.process.returncode}")
            return
        sender = self._grpc if isinstance(case, GrpcCase) else self._http
        try:
            await sender.check_well(self._is_cross_encoder)
        except (AssertionError, TimeoutError, EOFError, OSError, grpc.RpcError) as error:
            tally.add("after", case, repr(error))

    async def _send(self, case: GrpcCase | HttpCase) -> None:
        if isinstance(case, GrpcCase):
            outcome = await self._grpc.send(case)
            if outcome.code in send_grpc.NEVER:
                self._tally.add("UNKNOWN", case, outcome.error.details())
            else:
                send_grpc.check(case, outcome)
            return
        reply = await self._http.send(case)
        if reply.status == 500 != case.status:
            self._tally.add("500", case, reply.body[:200])
        else:
            send_http.check(case, reply)


async def try_all(cases: Sequence[GrpcCase | HttpCase], tell: Callable[[int, int], None]) -> Tally:
    """One after another, so that each fault is of one input. tell: called with (done, of)."""
    tally, done = Tally(), 0
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in SETTINGS.items():
            own = [case for case in cases if case.server == name]
            if not own:
                continue
            async with input_server(Path(folder) / name, settings) as server:
                tries = _Tries(server, name, tally)
                for case in own:
                    await tries.try_one(case)
                    done += 1
                    tell(done, len(cases))
                    if not server.lives:
                        break
                await tries.close()
                code = await server.end()
                # An engine that fails is worth a line, as an operator must see it.
                lines = server.bugs() + ([] if name == "faults" else server.warnings())
                tally.faults += [("log", line[:400]) for line in lines]
                if code:
                    tally.faults.append(("crash", f"{name}: exit code {code}"))
    return tally
