"""F7: starts that cannot succeed: each ends with its exit code and one line, in which the reason stands.

The table follows the catalogue: M1 to M9 (settings and models), N7 to N9 (ports and addresses). A failed reload (M6) is
not in it, as nothing is loaded a second time.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.server_process import ROOT, arguments
from tests.integration.test_server_process import BAD_STARTS
from tests.scoreboard.faults.outcome import Outcomes, figure
from tests.scoreboard.row import Figure, Row, Scope

_LIMIT_S = 120
_CUTS = 10
PYTORCH = ("--set", "model.backend=pytorch", "--set", "model.device=cpu")
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Start:
    """says: stands in the line. environment: besides this process's own."""

    name: str
    extra: Sequence[str]
    code: int
    says: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    code: int
    stderr: str

    def wrong(self, start: Start) -> list[str]:
        errors = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        found = []
        if self.code != start.code:
            found.append(f"{start.name}: exit code {self.code}, not {start.code}")
        if len(errors) != 1 or not self.stderr.rstrip().endswith(errors[0]):
            found.append(f"{start.name}: {len(errors)} lines begin with error:")
        elif start.says not in errors[0]:
            found.append(f"{start.name}: it says {errors[0][:200]!r}, not {start.says!r}")
        if "Traceback" in self.stderr:
            found.append(f"{start.name}: a traceback")
        return found


async def _ended(start: Start) -> Ended:
    process = await asyncio.create_subprocess_exec(
        *arguments("--set", "model.backend=fake", *start.extra),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | start.environment,
    )
    try:
        _, stderr = await asyncio.wait_for(process.communicate(), _LIMIT_S)
    except TimeoutError:
        return Ended(-1, f"it had not ended after {_LIMIT_S} s")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Ended(process.returncode or 0, stderr.decode(errors="replace"))


SETTINGS = [
    Start("M1 a value out of its range", ["--set", "batching.max_batch_size=0"], 2, "batching.max_batch_size"),
    Start("M1 a negative time", ["--set", "server.drain_timeout_ms=-1"], 2, "server.drain_timeout_ms"),
    Start("M1 a port that is none", ["--http-port", "70000"], 2, "metrics.port"),
    Start("M1 in the environment", [], 2, "MLIS_SERVER__NO_SUCH=1", {"MLIS_SERVER__NO_SUCH": "1"}),
    Start("M2 a text larger than a message",
          ["--set", "server.max_text_bytes=20000000"], 2, "server.max_message_bytes is smaller"),
    Start("M2 both ports the same", ["--port", "50999", "--http-port", "50999"], 2, "are both 50999"),
    Start("M2 a precision without quantized", ["--set", "model.quantization=int8"], 2, "set quantized: true"),
    Start("M2 a certificate without its key", ["--set", "server.tls.cert=/dev/null"], 2, "server.tls.key"),
    Start("M2 faults open to the network",
          ["--set", "server.enable_test_faults=true", "--host", "0.0.0.0"], 2, "needs server.host 127.0.0.1"),
    Start("M7 a hub's name without the hub",
          [*PYTORCH, "--model-name", "nobody/nothing"], 3, "was not found", _OFFLINE),
    Start("M8 CUDA where there is none", [*PYTORCH, "--device", "cuda"], 3, "allow_fallback: true",
          {"CUDA_VISIBLE_DEVICES": ""}),
    Start("M9 a warm-up of more than the process may take",
          ["--set", "model.process_per_stream=true", "--model-name", "fake:nonsense"], 3, "expected fake:base_ms"),
    Start("N9 a host that is no address", ["--host", "256.1.2.3"], 2, "256.1.2.3"),
    Start("N9 a name that nobody knows", ["--host", "no-such-host.invalid"], 2, "no-such-host.invalid"),
    Start("N9 an IPv6 address of another machine", ["--host", "2001:db8::1"], 2, "2001:db8::1"),
]  # fmt: skip


def _of_the_tests() -> list[Start]:
    return [Start(name, extra, code, says) for name, extra, code, says in BAD_STARTS]


@contextlib.contextmanager
def _taken_ports() -> Iterator[list[Start]]:
    """N7 and N8: held by another program, which listens, or has only bound it."""
    with socket.socket() as listening, socket.socket() as bound:
        for each in (listening, bound):
            each.bind(("127.0.0.1", 0))
        listening.listen(1)
        ports = listening.getsockname()[1], bound.getsockname()[1]
        yield [
            Start(f"{what} {how}", [flag, str(port)], 4, f"port {port}")
            for what, flag in (("N7 the gRPC port", "--port"), ("N8 the HTTP port", "--http-port"))
            for how, port in zip(("is listened on", "is bound"), ports, strict=True)
        ]


def _model_starts(folder: Path) -> list[Start]:
    """M3 to M5: what lies in the place of a model."""
    from tests.parity import damaged_models as damaged

    whole = damaged.save_embedder(folder)
    (folder / "empty").mkdir()
    (folder / "file").write_text("no model")

    def start(name: str, path: Path, says: str, *extra: str) -> Start:
        return Start(name, [*PYTORCH, "--model-name", str(path), *extra], 3, says, _OFFLINE)

    starts = [
        start("M3 no such folder", folder / "no" / "such", "does not exist"),
        start("M3 an empty folder", folder / "empty", str(folder / "empty")),
        start("M3 a file in its place", folder / "file", str(folder / "file")),
        start("M5 a cross-encoder without its head", whole, "", "--set", "model.task=cross_encoder"),
    ]
    for name in ("tokenizer.json", "config.json"):
        copy = shutil.copytree(whole, folder / f"without {name}")
        (copy / name).unlink()
        starts.append(start(f"M5 without {name}", copy, name))
    copy = shutil.copytree(whole, folder / "other width")
    damaged.set_value(copy, "config.json", ("hidden_size",), 2 * damaged.WIDTH)
    starts.append(start("M5 weights of another width", copy, ""))
    weights = "model.safetensors"
    size = (whole / weights).stat().st_size
    for number in range(_CUTS):
        at = size * number // _CUTS
        copy = shutil.copytree(whole, folder / f"cut at {at}")
        os.truncate(copy / weights, at)
        starts.append(start(f"M4 weights cut at {at} of {size} bytes", copy, weights))
    return starts


async def _run(scope: Scope) -> Figure:
    outcomes = Outcomes()

    async def all_of(starts: Sequence[Start], of: int) -> None:
        for start in starts:
            outcomes.add(
                start.name[:2] if start.name[1].isdigit() else "table of the tests", (await _ended(start)).wrong(start)
            )
            scope.tell(outcomes.tried.total(), of)

    with _taken_ports() as ports, tempfile.TemporaryDirectory() as folder:
        if scope.is_quick:
            quick = [SETTINGS[0], SETTINGS[4], SETTINGS[11], *ports[:1]]
            await all_of(quick, len(quick))
        else:
            models = await asyncio.to_thread(_model_starts, Path(folder))
            starts = [*_of_the_tests(), *SETTINGS, *ports, *models]
            await all_of(starts, len(starts))
    return figure(outcomes, not_tried="M6 (nothing is loaded a second time)")


ROW = Row(
    key="F7",
    title="Starts that cannot succeed: settings, models, devices, ports, addresses (M1 to M9, N7 to N9)",
    pass_line="right exit code and one clear line in all of them",
    run=_run,
)
