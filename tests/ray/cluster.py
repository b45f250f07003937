"""A real Ray cluster for tests: started by a script in Ray's environment, steered over its pipes, always ended."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from tqdm import tqdm

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from tests.clients.environments import FOLDER, build_once, run_step
from tests.integration.script_copies import ROOT, clean_env

SCRIPT = Path(__file__).resolve().parent / "scripts" / "steer.py"
# What any client may have: the service config of gRPC's own retries.
RETRIES = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "3s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}
ATTEMPTS = 3
FAKE = ("model.backend=fake", "server.enable_test_faults=true")


def ray_python() -> Path:
    """Python of an environment with Ray, the core of this project and ONNX Runtime; ClientsMissing."""
    folder = FOLDER / "ray"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["ray"], *extras["onnx"]]
    python = folder / "bin" / "python"

    def build() -> None:
        bar: tqdm[Any]
        with tqdm(desc=f"Building {folder.relative_to(ROOT)}, once", unit=" packages", mininterval=1) as bar:
            run_step(bar, "venv", sys.executable, "-m", "venv", folder)
            # Compiled here: Ray gives its processes little time to start.
            install = ["install", "--disable-pip-version-check", "--no-input", "--retries", "2"]
            run_step(bar, "Ray", python, "-I", "-m", "pip", *install, *wanted)

    build_once(folder, "\n".join([sys.version, *wanted]), build)
    return python


@dataclass
class Cluster:
    """Ray, with a proxy of gRPC and HTTP on its head. `tell`: one command of scripts/steer.py, and its answer."""

    process: subprocess.Popen[str]
    port: int = 0
    http_port: int = 0

    def tell(self, do: str, **said: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"do": do, **said}), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer = json.loads(line.removeprefix("ANSWER "))
                assert "failed" not in answer, answer["failed"]
                return answer["value"]
        raise AssertionError(f"the script that steers Ray has ended with {self.process.wait()}")

    def deploy(
        self, *settings: str, name: str = "default", user_config: dict[str, Any] | None = None, **arguments: Any
    ) -> str:
        """Once it runs: empty; where it does not come to run: what Ray says of it."""
        fake = () if any(each.startswith("model.backend=") for each in settings) else FAKE
        said = {"cpus": 1, "set": [*fake, *settings], **arguments}
        answer: str = self.tell("deploy", arguments=said, user_config=user_config, name=name)
        return answer

    def channel(self, *, retries: bool = False) -> grpc.Channel:
        options = [("grpc.service_config", json.dumps(RETRIES))] if retries else [("grpc.enable_retries", 0)]
        return grpc.insecure_channel(f"127.0.0.1:{self.port}", options=options)

    @contextlib.contextmanager
    def stub(self, *, retries: bool = False) -> Iterator[Any]:
        with self.channel(retries=retries) as channel:
            yield rpc.InferenceServiceStub(channel)

    def pids(self, at_least: int = 1, limit_s: float = 30) -> set[int]:
        """Of the replicas that answer; asked until there are so many, or for so long.

        After a load Ray's proxy keeps for ten seconds to the replica that it believes to be the emptier one.
        """
        found: set[int] = set()
        give_up_at = time.monotonic() + limit_s
        with self.stub(retries=True) as stub:
            while len(found) < at_least and time.monotonic() < give_up_at:
                found.add(stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=30).pid)
        return found


@contextlib.contextmanager
def cluster(python: Path, *, nodes: int = 2, cpus: int = 2) -> Iterator[Cluster]:
    """Started again where Ray gives up on its own processes, which it grants 30 s on a machine that may be busy."""
    for attempt in range(1, ATTEMPTS + 1):
        with contextlib.ExitStack() as started:
            try:
                running = started.enter_context(_process(python, "--nodes", str(nodes), "--cpus", str(cpus)))
                ports = running.tell("start")
                running.port, running.http_port = ports["grpc"], ports["http"]
            except AssertionError:
                if attempt == ATTEMPTS:
                    raise
                continue
            yield running
            return


@contextlib.contextmanager
def _process(python: Path, *arguments: str) -> Iterator[Cluster]:
    """Its files are in a folder of its own with a short name: the paths of sockets have little room."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    with (folder / "stderr.txt").open("w") as stderr:
        process = subprocess.Popen(
            [python, SCRIPT, *arguments],
            cwd=ROOT,
            env=ray_environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    try:
        yield Cluster(process)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{(folder / 'stderr.txt').read_text()[-2000:]}") from error
    finally:
        end(process.pid)
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def ray_environment(folder: Path) -> dict[str, str]:
    """Ray keeps its token in HOME. A busy machine takes long to start Ray's own processes."""
    return clean_env(
        PYTHONPATH=str(ROOT),
        HOME=str(folder),
        RAY_TMPDIR=str(folder),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_agent_register_timeout_ms="100000",
        RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.5",
        NO_PROXY="*",
    )


def end(session: int) -> None:
    """Every process that was started for the cluster: Ray's leave their parents, and stay in the session."""
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(each.pid) == session:
                os.kill(each.pid, signal.SIGKILL)
