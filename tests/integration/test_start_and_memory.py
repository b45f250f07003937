"""What a result says of the start of its server and of its memory: taken from servers that really ran."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ml_inference_server.benchmark import runner
from ml_inference_server.benchmark.result.document import Document
from ml_inference_server.benchmark.result.stored import read
from ml_inference_server.benchmark.runner import Experiment
from ml_inference_server.benchmark.target.interrupt import Stop
from ml_inference_server.benchmark.target.memory import memory_of_processes, memory_of_server
from tests.integration.benchmark_kit import ROOT, write_pairs

SHARED_BYTES = 64 << 20
# Two processes that have read the same mapped file; each says so, and ends when its input does.
SHARING = f"""
import mmap, os, sys
pages = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), {SHARED_BYTES}, mmap.MAP_SHARED, mmap.PROT_READ)
os.fork()
sum(pages[::4096])
os.write(1, b".")
os.read(0, 1)
"""


def write_experiment(folder: Path, more: str = "") -> Path:
    path = folder / "trial.yaml"
    path.write_text(
        "name: trial\nmodel: {backend: fake, streams: 2, process_per_stream: true}\n"
        "experiment: {batch_sizes: [1], concurrency_levels: [2], benchmark_requests: 4, warmup_iterations: 1,"
        f" repeats: 2, dataset: {write_pairs(folder / 'pairs.tsv')}}}\n{more}"
    )
    return path


def result(path: Path) -> Document:
    document = read(path)
    assert isinstance(document, Document)
    return document


def test_a_result_tells_the_start_and_the_memory_of_all_processes(tmp_path: Path) -> None:
    assert runner.main([str(write_experiment(tmp_path)), "--output", str(tmp_path / "out.md")]) == 0
    (server,) = result(tmp_path / "out.json").servers
    (start,) = server.starts
    assert start.ready_s > 0
    assert not start.filled_cache, "the fake backend makes nothing"
    memory = start.memory
    assert memory is not None
    assert memory.processes >= 3, "the server, and a process for each stream"
    if sys.platform == "linux":
        assert memory.pss_bytes is not None
        assert memory.peak_rss_bytes is not None
        assert 0 < memory.pss_bytes < memory.rss_bytes <= memory.peak_rss_bytes
    assert "## Start and memory" in (tmp_path / "out.md").read_text()


async def test_only_the_start_that_filled_the_cache_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a first start that exports or compiles: a server that leaves a file in the cache if there is none."""
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "cache"))
    program = tmp_path / "first_start.py"
    program.write_text(
        "from ml_inference_server.utils.cache import cached\n"
        "from ml_inference_server.main import main\n"
        "cached('onnx', {'a': 1}, lambda folder: (folder / 'graph').touch())\n"
        "raise SystemExit(main())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    experiment = Experiment(
        write_experiment(tmp_path, "variants: {one: {}, two: {}}\n"),
        ["model.process_per_stream=false"],
        output=str(tmp_path / "out.md"),
        server_command=(sys.executable, str(program)),
    )
    outcome = await runner.run_experiment(experiment, Stop(), {})
    assert outcome.exit_code == 0
    servers = result(tmp_path / "out.json").servers
    assert {server.variant: [start.filled_cache for start in server.starts] for server in servers} == {
        "one": [True, False],
        "two": [False, False],
    }


def test_a_result_of_a_version_that_did_not_tell_is_read(tmp_path: Path) -> None:
    assert runner.main([str(write_experiment(tmp_path)), "--output", str(tmp_path / "out.md")]) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    del content["servers"][0]["starts"]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(content))
    assert result(earlier).servers[0].starts == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the PSS")
def test_pages_that_processes_share_count_once(tmp_path: Path) -> None:
    shared = tmp_path / "weights"
    shared.write_bytes(bytes(SHARED_BYTES))
    process = subprocess.Popen(
        [sys.executable, "-c", SHARING, str(shared)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(2) == b".."
        memory = memory_of_server(process.pid)
        each = list(memory_of_processes(process.pid))
        process.stdin.close()
    assert memory is not None
    assert memory.processes == len(each) == 2
    assert memory.rss_bytes > 2 * SHARED_BYTES
    assert memory.pss_bytes is not None
    assert SHARED_BYTES <= memory.pss_bytes < 1.5 * SHARED_BYTES
    assert all(one.private_bytes is not None and one.private_bytes < SHARED_BYTES for one in each)


def test_a_server_that_has_ended_holds_nothing_to_tell() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert memory_of_server(ended.pid) is None, "nobody has asked yet how it ended, so it still has its number"
    ended.wait()
    assert memory_of_server(ended.pid) is None
