"""perf_analyzer drives the server as the document says."""

import json
import re
import shlex
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.clients.perf_analyzer import PerfAnalyzerMissing, perf_analyzer
from tests.clients.served import Served
from tests.integration.script_copies import ROOT

DOCUMENT = ROOT / "ml_inference_server" / "docs" / "clients.md"


def test_the_documented_command_reports_a_throughput(embedder: Served, tmp_path: Path) -> None:
    (command,) = re.findall(r"```bash\n(cat > texts.json.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    try:
        program = shlex.join(perf_analyzer())
    except PerfAnalyzerMissing as missing:
        pytest.skip(str(missing))
    command, replaced = re.subn("^perf_analyzer ", f"{program} ", command, flags=re.MULTILINE)
    assert replaced == 1
    command = command.replace("localhost:50051", embedder.grpc)
    counted_before = _inference_count(embedder)
    done = subprocess.run(
        ["bash", "-euc", command], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    asked = re.search(r"--request-count (\d+)", command)
    assert asked is not None
    client, server = done.stdout.split("Server:")
    assert f"Request count: {asked[1]}\n" in client
    assert _inference_count(embedder) - counted_before == int(asked[1])
    # perf_analyzer asks for its first statistics when its load may have begun: it can miss some of the first requests.
    shown = re.search(r"Inference count: (\d+)\n", server)
    assert shown is not None
    assert 0 < int(shown[1]) <= int(asked[1])
    throughput = re.search(r"Throughput: ([\d.]+) infer/sec", client)
    assert throughput is not None
    assert float(throughput[1]) > 0


def _inference_count(embedder: Served) -> int:
    with urllib.request.urlopen(f"{embedder.http}/v2/models/stats", timeout=30) as answer:  # noqa: S310
        return int(json.load(answer)["model_stats"][0]["inference_count"])
