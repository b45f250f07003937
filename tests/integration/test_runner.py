"""The runner: starts the real server round the fake backend, measures it, and never leaves it behind."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ml_inference_server.benchmark import __main__ as benchmark_commands
from ml_inference_server.benchmark import all_experiments, runner
from ml_inference_server.benchmark.load import channel
from ml_inference_server.benchmark.report.contenders import BASELINE
from ml_inference_server.benchmark.runner import Experiment, run_experiment
from ml_inference_server.benchmark.target.interrupt import Stop
from ml_inference_server.benchmark.target.server_process import ServerOptions, ServerProcess
from ml_inference_server.main import parse, settings_from
from ml_inference_server.utils.config import load_settings
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.layers import EXPERIMENTS_DIR
from tests.integration.benchmark_kit import ENVIRONMENT, ROOT, SCRIPTED, python, write_pairs

# The end of a process that was told to end; far above what it takes, so that only a real orphan reaches it.
END_TIMEOUT_S = 60

# A row of it lasts several ticks of the kernel's CPU clock (10 ms); of less, nothing can be said about other programs.
MODEL = "fake:base_ms=40"


def write_experiment(folder: Path, name: str = "trial", *, requests: int = 4, repeats: int = 1, more: str = "") -> Path:
    pairs = write_pairs(folder / "pairs.tsv")
    path = folder / f"{name}.yaml"
    path.write_text(
        f"name: {name}\n"
        f"model: {{backend: fake, name: '{MODEL}'}}\n"
        f"experiment: {{batch_sizes: [1, 2], concurrency_levels: [2], benchmark_requests: {requests},"
        f" warmup_iterations: 1, repeats: {repeats}, dataset: {pairs}}}\n{more}"
    )
    return path


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_one_experiment_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = runner.main([str(write_experiment(tmp_path)), "--output", str(tmp_path / "out.md"),
                        "--set", "experiment.seed=3"])  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0, shown.err
    document = read(tmp_path / "out.json")
    assert [(row["batch_size"], row["ok"], row["status"]) for row in document["runs"]] == [
        (1, 4, "valid"),
        (2, 4, "valid"),
    ]
    for row in document["runs"]:
        assert 0 <= row["batches"]["padding_share"] < 1, "from the counters of its metrics port"
        assert row["batches"]["mean_batch"] >= 1
        assert row["server_ms"]["total"] > 0
        assert row["conditions"]["others_share"] is not None
    server = document["servers"][0]
    assert server["info"]["resolved"]["backend"] == "fake"
    assert server["info"]["settings"]["experiment"]["seed"] == server["load"]["seed"] == 3
    assert not psutil.pid_exists(server["info"]["pid"])
    assert "the fake backend ran" in shown.out
    assert str(tmp_path / "out.md") in shown.out
    assert "stopped" in (tmp_path / "out_server.log").read_text()  # it was asked to end, not killed


def test_each_variant_has_a_server_of_its_own(tmp_path: Path) -> None:
    more = "variants:\n  'off': {batching.enabled: false}\n  'on': {batching.enabled: true}\n"
    code = runner.main([str(write_experiment(tmp_path, more=more)), "--output", str(tmp_path / "out.md")])
    assert code == 0
    document = read(tmp_path / "out.json")
    assert [(row["variant"], row["batch_size"]) for row in document["runs"]] == [
        ("off", 1),
        ("off", 2),
        ("on", 1),
        ("on", 2),
    ]
    assert [s["info"]["settings"]["batching"]["enabled"] for s in document["servers"]] == [False, True]
    assert "Ratios are to off under the same load" in (tmp_path / "out.md").read_text()


def test_a_variant_that_cannot_run_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "variants:\n  good: {}\n  bad: {model.device: cuda}\n"
    code = runner.main([str(write_experiment(tmp_path, more=more)), "--output", str(tmp_path / "out.md")])
    assert code == 3
    document = read(tmp_path / "out.json")
    assert {row["variant"] for row in document["runs"]} == {"good"}
    assert document["planned_rows"] == 2
    assert document["not_started"][0]["exit_code"] == 3
    assert "variant bad did not run (exit code 3): " in capsys.readouterr().out


def test_a_refusal_passes_on_the_servers_exit_code_and_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = runner.main([str(write_experiment(tmp_path)), "--output", str(tmp_path / "out.md"),
                        "--set", "model.backend=no_such_backend"])  # fmt: skip
    assert code == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("Error: ")
    assert "no_such_backend" in last
    assert not (tmp_path / "out.md").exists()


def test_bad_input_starts_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out.md")]
    good = str(write_experiment(tmp_path))
    for arguments, told in (
        ([str(tmp_path / "none.yaml")], "none.yaml: no such file"),
        ([good, "--set", "model.devise=cpu"], "did you mean model.device?"),
        ([good, "--set", "experiment.dataset=/nowhere.tsv"], "/nowhere.tsv: no such file"),
        ([good, "--port", "70000"], "--port 70000: server.port: "),
        (
            [good, "--port", "8080", "--set", "metrics.port=8080"],
            "--port 8080 and --set metrics.port=8080: ",
        ),
    ):
        assert runner.main([*arguments, *output]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "starting the server" not in error


@pytest.mark.parametrize(
    ("environment", "options", "ports"),
    [
        ({}, {}, (0, 0)),
        ({}, {"overrides": ["server.port=8080"]}, (8080, 0)),
        ({}, {"overrides": ["metrics.port=50051"]}, (0, 50051)),
        ({"MLIS_SERVER__PORT": "8080"}, {}, (8080, 0)),
        ({"MLIS_SERVER__PORT": "8080"}, {"overrides": ["server.port=6000"]}, (6000, 0)),
        ({"MLIS_METRICS__PORT": "1"}, {"overrides": ["server.port=1"], "port": 6000, "http_port": 6001}, (6000, 6001)),
    ],
)
def test_the_server_takes_free_ports_unless_somebody_names_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    options: dict[str, Any],
    ports: tuple[int, int],
) -> None:
    """The file's own are for a server that stays. What the children read is what the runner read."""
    for name, value in {**environment, "MLIS_SERVER__HOST": "0.0.0.0"}.items():
        monkeypatch.setenv(name, value)
    more = "server: {port: 7000}\nmetrics: {port: 7001}\nvariants: {v: {server.port: 7002}}\n"
    experiment = Experiment(file=write_experiment(tmp_path, more=more), **options)
    settings = experiment.settings("v")
    assert (settings.server.port, settings.metrics.port) == ports
    assert (settings.server.host, settings.metrics.host) == ("127.0.0.1", "127.0.0.1")
    assert settings_from(parse(experiment.settings_arguments("v"))) == settings


def test_a_server_that_would_not_let_the_benchmark_in_is_not_started(tmp_path: Path) -> None:
    for override in ("server.auth.keys_file=keys.yaml", "server.tls={cert: a.crt, key: a.key}"):
        experiment = Experiment(file=write_experiment(tmp_path), overrides=[override])
        with pytest.raises(ConfigError, match="leave them out here, or start a server with them"):
            experiment.server_options("", tmp_path / "log")


def test_a_setting_from_the_environment_reaches_server_and_result_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLIS_BATCHING__MAX_BATCH_SIZE", "3")
    monkeypatch.setenv("MLIS_EXPERIMENT__BATCH_SIZES", "[1, 2, 3]")
    arguments = ["--set", "experiment.batch_sizes=[2]", "--set", "experiment.quality.enabled=false"]
    code = runner.main([str(write_experiment(tmp_path)), "--output", str(tmp_path / "out.md"), *arguments])
    assert code == 0
    document = read(tmp_path / "out.json")
    assert [row["batch_size"] for row in document["runs"]] == [2], "--set lies above the environment"
    ran = document["servers"][0]["info"]["settings"]
    assert ran == {**document["client"]["settings"], "variant": ""}
    assert ran["batching"]["max_batch_size"] == 3
    assert document["command"].startswith(
        "env MLIS_BATCHING__MAX_BATCH_SIZE=3 'MLIS_EXPERIMENT__BATCH_SIZES=[1, 2, 3]'"
    )
    log = (tmp_path / "out_server.log").read_text()
    assert "from the environment: MLIS_BATCHING__MAX_BATCH_SIZE=3, MLIS_EXPERIMENT__BATCH_SIZES=[1, 2, 3]" in log


def test_a_first_look_obeys_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLIS_SERVER__PORT", "8080")
    monkeypatch.setenv("MLIS_EXPERIMENT__BATCH_SIZES", "[5, 6, 7]")
    assert "experiment.batch_sizes=[5, 7]" in all_experiments.quick(write_experiment(tmp_path))


def test_a_server_killed_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(channel, "PROBE_TIMEOUT_S", 0.3)
    experiment = Experiment(
        file=write_experiment(tmp_path),
        output=str(tmp_path / "out.md"),
        server_command=(*SCRIPTED, '{"die_at": 4, "experiment": "trial"}'),
    )
    outcome = asyncio.run(run_experiment(experiment, Stop(), {}))
    assert outcome.exit_code == 5
    document = read(tmp_path / "out.json")
    assert [row["status"] for row in document["runs"]] == ["invalid"]
    assert document["servers"][0]["died"].startswith("the server was killed by SIGKILL")
    assert "1 of 2 rows were not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "code", "told"),
    [
        ("import sys; print('error: no memory left', file=sys.stderr); sys.exit(3)", 3, "no memory left"),
        ("import sys; sys.exit(0)", 70, "it wrote nothing"),
        ("import os; os.kill(os.getpid(), 9)", 70, "killed by SIGKILL"),
    ],
)
def test_a_server_that_ends_while_it_starts(tmp_path: Path, program: str, code: int, told: str) -> None:
    experiment = Experiment(
        file=write_experiment(tmp_path),
        output=str(tmp_path / "out.md"),
        server_command=(sys.executable, "-c", program),
    )
    outcome = asyncio.run(run_experiment(experiment, Stop(), {}))
    assert outcome.exit_code == code
    assert told in outcome.message


def test_a_server_that_never_becomes_ready_is_ended(tmp_path: Path) -> None:
    experiment = Experiment(
        file=write_experiment(tmp_path),
        output=str(tmp_path / "out.md"),
        start_timeout_s=0.5,
        server_command=(sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(999)"),
    )
    outcome = asyncio.run(run_experiment(experiment, Stop(), {}))
    assert outcome.exit_code == 3
    assert "was not ready within 0.5 s" in outcome.message
    assert not psutil.pid_exists(int((tmp_path / "out_server.log").read_text()))


async def test_a_second_ctrl_c_does_not_wait_for_a_server_that_will_not_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(999)"
    stop = Stop()
    server = ServerProcess(ServerOptions((), log, 999.0, 999.0, (sys.executable, "-c", stubborn)), stop)
    start = asyncio.create_task(server.start())
    async with asyncio.timeout(END_TIMEOUT_S):
        while not (log.exists() and "up" in log.read_text()):  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        stop.request(130)
        stop.request(130)
        assert await server.end() == -signal.SIGKILL


@contextlib.contextmanager
def running(tmp_path: Path) -> "Iterator[tuple[subprocess.Popen[str], psutil.Process]]":
    """A runner with hours of work before it, and its server, both once that serves."""
    process = python("-m", "ml_inference_server.benchmark.runner", str(write_experiment(tmp_path, requests=9_000_000)),
                     "--output", "out.md", cwd=tmp_path)  # fmt: skip
    with process:
        children: list[psutil.Process] = []
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("serving on port"):
                    break
            children = psutil.Process(process.pid).children()
            (server,) = children
            yield process, server
        finally:
            process.kill()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interruption_leaves_no_server_and_keeps_the_row(tmp_path: Path, number: int, expected: int) -> None:
    with running(tmp_path) as (process, server):
        os.killpg(process.pid, number)  # as a terminal does: every process of the group gets it
        _, err = process.communicate(timeout=END_TIMEOUT_S)
        assert process.returncode == expected, err
        assert "Traceback" not in err
        assert not server.is_running()
    assert "press Ctrl-C again" not in (tmp_path / "out_server.log").read_text()  # only the runner was interrupted
    if (tmp_path / "out.json").exists():  # the signal may come before the first row
        assert read(tmp_path / "out.json")["interrupted"] is True


def test_a_terminal_that_closes_costs_no_result(tmp_path: Path) -> None:
    """Everything that is printed after that fails; what was measured is written nevertheless."""
    program = (
        "import fcntl, os, runpy, sys, termios; os.setsid(); fcntl.ioctl(1, termios.TIOCSCTTY, 0);"
        "runpy.run_module('ml_inference_server.benchmark.runner', run_name='__main__')"
    )
    master, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(write_experiment(tmp_path, requests=9_000_000)), "--output", "out.md"],
        stdin=terminal, stdout=terminal, stderr=terminal, env=ENVIRONMENT, cwd=tmp_path,
    )  # fmt: skip
    os.close(terminal)
    with process:
        try:
            shown = b""
            while not (url := re.search(rb"live figures: (http://[\d.:]+)\r", shown)):
                shown += os.read(master, 65536)
            while not is_measuring(url[1].decode()):
                time.sleep(0.01)
            os.close(master)
            assert process.wait(END_TIMEOUT_S) == 129
        finally:
            process.kill()
    assert read(tmp_path / "out.json")["interrupted"] is True
    assert "INTERRUPTED" in (tmp_path / "out.md").read_text()


def is_measuring(url: str) -> bool:
    """Whether the benchmark has told the server at `url` of its first row, and got some answers since."""
    with urllib.request.urlopen(f"{url}/metrics") as reply:  # noqa: S310 - of our own server
        figures = json.load(reply)
    return figures["benchmark"] is not None and figures["answered_per_s"] * figures["window_s"] > 40


def test_ctrl_c_twice_loses_nothing(tmp_path: Path) -> None:
    """The second one comes while the first is still being obeyed."""
    with running(tmp_path) as (process, server):
        assert process.stderr is not None
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=END_TIMEOUT_S)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert not server.is_running()
    if (tmp_path / "out.json").exists():  # the signals may come before the first row
        document = read(tmp_path / "out.json")
        (row,) = document["runs"]
        assert row["status"] == "interrupted"
        assert row["started"] == row["ok"] + sum(row["errors"].values()) + row["unfinished"]


def test_a_runner_killed_outright_takes_its_server_with_it(tmp_path: Path) -> None:
    with running(tmp_path) as (process, server):
        process.kill()
        server.wait(timeout=END_TIMEOUT_S)
        assert not server.is_running()


def test_all_experiments_survive_one_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_experiment(tmp_path, "good")
    refused = write_experiment(tmp_path, "refused")
    refused.write_text(refused.read_text().replace("backend: fake", "backend: fake, device: cuda"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("nmae: x\n")
    folder = tmp_path / "results"

    code = all_experiments.main([str(good), str(refused), "--quick", "--output-dir", str(folder)])
    assert code == 0  # a clean refusal is an answer
    verdicts = {e["experiment"]: (e["verdict"], e["exit_code"]) for e in read(folder / "summary.json")["experiments"]}
    assert verdicts == {"good": ("ok", 0), "refused": ("refused", 3)}

    code = all_experiments.main([str(broken), str(good), "--quick", "--output-dir", str(folder)])
    assert code == 5
    summary = read(folder / "summary.json")
    assert [(e["experiment"], e["verdict"]) for e in summary["experiments"]] == [
        ("broken", "FAILED"),
        ("good", "ok"),
    ]
    assert summary["experiments"][0]["exit_code"] == 2
    text = (folder / "summary.md").read_text()
    assert "did you mean name?" in text
    assert "| FAILED (exit code 2) |" in text
    assert "[good_results.md](good_results.md)" in text
    assert "Fastest: `good`" in capsys.readouterr().out
    assert len(list(folder.glob("good_results.*.json"))) == 1  # the first result was kept
    assert len(list(folder.glob("summary.*.md"))) == 1


def test_the_quickstart_is_the_baseline_on_few_rows() -> None:
    parts = ("model", "batching", "server", "metrics", "variants")
    quickstart, baseline = (load_settings(EXPERIMENTS_DIR / f"{name}.yaml") for name in ("quickstart", BASELINE))
    assert [getattr(quickstart, part) for part in parts] == [getattr(baseline, part) for part in parts]
    measured = quickstart.experiment
    assert measured.workload == baseline.experiment.workload
    assert measured.quality == baseline.experiment.quality
    assert set(measured.batch_sizes) <= set(baseline.experiment.batch_sizes)
    assert set(measured.concurrency_levels) <= set(baseline.experiment.concurrency_levels)


def test_without_a_file_the_quickstart_runs_and_names_the_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--set", "experiment.benchmark_requests=2", "--set", "experiment.quality.enabled=false"]
    fake = ["--set", "model.backend=fake", "--set", f"model.name={MODEL}"]
    monkeypatch.chdir(tmp_path)
    assert runner.main([*few, *fake, "--output", "out.md"]) == 0
    assert read(tmp_path / "out.json")["name"] == "quickstart"
    last = capsys.readouterr().out.splitlines()[-1]
    assert "The whole baseline takes some minutes: " in last
    script, file = last.split(": ")[1].split()
    assert (ROOT / "run_experiment.sh").samefile(script)
    assert (EXPERIMENTS_DIR / f"{BASELINE}.yaml").samefile(file)


def test_the_choice_of_experiments() -> None:
    names = [path.stem for path in all_experiments.choose([], None)]
    assert {"base_config", "quickstart"} & set(names) == set()
    assert "minilm_baseline" in names
    assert [path.stem for path in all_experiments.choose([], "*_onnx")] == ["minilm_onnx"]
    with pytest.raises(ConfigError, match=r"no experiment is called that; there are: .*minilm_baseline"):
        all_experiments.choose([], "nothing*")
    first = all_experiments.quick(all_experiments.choose([], "minilm_baseline")[0])
    assert "experiment.benchmark_requests=24" in first


def test_run_all_experiments_without_dependencies_says_how_to_install_them(tmp_path: Path) -> None:
    """-S hides site-packages, as a Python without the requirements would."""
    script = shutil.copy(ROOT / "run_all_experiments.py", tmp_path)
    (tmp_path / "ml_inference_server").symlink_to(ROOT / "ml_inference_server")
    done = subprocess.run([sys.executable, "-S", script], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "is not installed here: run '" in line
    assert "requirements.txt" in line


def test_run_all_experiments_works_from_another_folder(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "run_all_experiments.py")]
    done = subprocess.run([*script, "--only", "nothing*"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "no experiment is called that" in done.stderr


def test_a_run_of_all_experiments_goes_on_where_it_was_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(write_experiment(tmp_path, name)) for name in ("one", "two")]
    output = ["--output-dir", str(tmp_path / "results")]
    assert all_experiments.main([files[0], *output]) == 0
    first = read(tmp_path / "results" / "summary.json")["experiments"]
    capsys.readouterr()
    assert all_experiments.main([*files, *output, "--resume"]) == 0
    err = capsys.readouterr().err
    assert "one: there already" in err
    assert "=== 1/1 two.yaml" in err
    summary = read(tmp_path / "results" / "summary.json")
    assert [entry["experiment"] for entry in summary["experiments"]] == ["one", "two"]
    assert summary["experiments"][:1] == first
    assert summary["finished"] is True
    # Other settings are other rows: what was measured with the old ones may not stand for them.
    assert all_experiments.main([*files, *output, "--resume", "--repeats", "2"]) == 0
    assert "one: its settings changed since, so it is run again" in capsys.readouterr().err
    assert {run["repeat"] for run in read(tmp_path / "results" / "summary.json")["experiments"][0]["runs"]} == {1, 2}


def test_a_second_runner_does_not_touch_the_results_of_the_first(tmp_path: Path) -> None:
    with running(tmp_path) as (process, _server):
        second = python("-m", "ml_inference_server.benchmark.runner", str(tmp_path / "trial.yaml"),
                        "--output", "out.md", cwd=tmp_path)  # fmt: skip
        _, err = second.communicate(timeout=END_TIMEOUT_S)
        assert second.returncode == 2
        assert f"another benchmark (process {process.pid}) is writing out.json" in err
        assert process.poll() is None


def test_a_runner_killed_outright_leaves_what_it_had_measured(tmp_path: Path) -> None:
    experiment = write_experiment(tmp_path, requests=30)
    command = ["-m", "ml_inference_server.benchmark.runner", str(experiment), "--output", "out.md",
               "--set", "experiment.repeats=100"]  # fmt: skip
    with python(*command, cwd=tmp_path) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("row 3/"):
                break
        process.kill()
    saved = read(tmp_path / "out.partial.json")
    assert len(saved["runs"]) >= 1
    assert all(run["ok"] == 30 for run in saved["runs"])
    assert benchmark_commands.main(["report", str(tmp_path / "out.partial.json")]) == 0
    assert "the benchmark was interrupted" in (tmp_path / "out.partial.md").read_text()
