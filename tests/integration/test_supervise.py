"""A server that is kept running: real supervisors round real servers that crash, hang, fall silent and are stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from ml_inference_server.cli import build_parser
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.utils.errors import EXIT_CONFIG, EXIT_MODEL
from tests.faults.restarts import free_ports
from tests.integration.server_process import ROOT, run_to_end, server_process

FAULTS = ("--supervise", "--set", "server.enable_test_faults=true", "--set", "model.streams=1")


def answered(stub: Any) -> Any:
    """The answer, however often a server that ends or begins has to be asked; pytest's timeout is the limit."""
    while True:
        try:
            return stub.Embed(pb.EmbedRequest(texts=["a"]), wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise


@pytest.mark.parametrize(
    ("text", "extra", "said"),
    [
        ("!crash", (), "the server ended (signal SIGKILL): starting it again in 1 s"),
        ("!hang", ("--set", "server.hang_timeout_ms=200"), "the server ended (exit code 6): starting it again in 1 s"),
    ],
)
def test_a_server_that_crashes_or_hangs_comes_back_on_its_port(
    tmp_path: Path, text: str, extra: tuple[str, ...], said: str
) -> None:
    (port,) = free_ports(1)
    with server_process(tmp_path, *FAULTS, *extra, "--port", str(port)) as supervisor:
        first = supervisor.ready()
        assert first["pid"] != supervisor.process.pid
        options = [("grpc.max_reconnect_backoff_ms", 200), ("grpc.initial_reconnect_backoff_ms", 100)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            stub = rpc.InferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError) as ended:
                stub.Embed(pb.EmbedRequest(texts=[text]), timeout=60)
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
            assert answered(stub).count == 1
        second = supervisor.ready()
        assert (second["grpc_port"], second["pid"] != first["pid"]) == (port, True)
        supervisor.signal(signal.SIGTERM)
        code, stderr = supervisor.end()
    assert code == 0
    assert stderr.count("starting it again") == 1
    assert said in stderr
    assert not supervisor.ready_file.exists()


def test_ctrl_c_reaches_the_server_once_and_ends_both(tmp_path: Path) -> None:
    """A terminal sends it to the whole group; a second one would end the server at once."""
    with server_process(tmp_path, "--supervise") as supervisor:
        supervisor.ready()
        os.killpg(supervisor.process.pid, signal.SIGINT)
        code, stderr = supervisor.end()
    assert code == 130
    assert stderr.count("press Ctrl-C again") == 1


@pytest.mark.parametrize(("extra", "code"), [(("--set", "nonsense=1"), 2), (("--model-name", "fake:nonsense"), 3)])
def test_a_bad_start_is_final(extra: tuple[str, ...], code: int) -> None:
    got, line = run_to_end("--supervise", *extra)
    assert (got, line.startswith("error: ")) == (code, True), line


def test_a_server_whose_supervisor_is_killed_ends_by_itself(tmp_path: Path) -> None:
    with server_process(tmp_path, "--supervise") as supervisor:
        supervisor.ready()
        supervisor.signal(signal.SIGKILL)
        assert supervisor.process.stderr is not None
        supervisor.process.stderr.read()  # until the server has closed it too
        assert not supervisor.ready_file.exists()


SUPERVISE = """
import json, sys
from ml_inference_server.utils.supervise import Supervisor
sys.exit(Supervisor(json.loads(sys.argv[1]), silence_s=0.5, first_pause_s=0.01).run())
"""
# Lives once for each word of its file: how it ends. Its arguments: the file, and the flag and descriptor it is given.
LIVES = """
import os, signal, sys, time
from pathlib import Path
file, beats = Path(sys.argv[1]), int(sys.argv[3])
word, *left = file.read_text().split()
file.write_text(" ".join(left))
if word == "late":
    time.sleep(2)
os.write(beats, b".")
if word == "silent":
    time.sleep(600)
elif word == "stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
elif word not in ("late", "0"):
    sys.exit(int(word))
"""


@pytest.mark.parametrize(
    ("lives", "code", "left"),
    [
        ("silent stopped 6 70 5 0 6", 0, "6"),
        ("late 6", 0, "6"),  # what has not begun to beat is not silent
        ("6 4 3 0", 0, ""),  # a port that is held a moment longer
        ("4 0", 4, "0"),
        ("6 2 0", 2, "0"),
        ("143 0", 143, "0"),
    ],
)
def test_what_is_started_again_and_what_is_final(tmp_path: Path, lives: str, code: int, left: str) -> None:
    file = tmp_path / "lives"
    file.write_text(lives)
    command = json.dumps([sys.executable, "-c", LIVES, str(file)])
    done = subprocess.run([sys.executable, "-c", SUPERVISE, command], cwd=ROOT, check=False, timeout=60)
    assert (done.returncode, file.read_text()) == (code, left)


def test_the_unit_for_systemd_runs_a_command_that_there_is() -> None:
    unit = (ROOT / "ml_inference_server" / "deploy" / "systemd" / "ml-inference-server.service").read_text()
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    program, command, *rest = settings["ExecStart"].split()
    assert Path(program).name == "mlis"
    parsed = build_parser([command]).parse_args([command, *rest])
    assert parsed.supervise
    assert settings["RestartPreventExitStatus"].split() == [str(EXIT_CONFIG), str(EXIT_MODEL)]
