"""The command `mlis`: its commands on a real server, its help, its errors, its completion."""

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from ml_inference_server import cli
from ml_inference_server.benchmark import all_experiments
from ml_inference_server.benchmark.runner import Experiment
from ml_inference_server.utils import installation
from tests.integration.server_process import server_process

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """--target of a running server with the fake backend."""
    with server_process(tmp_path_factory.mktemp("server")) as server:
        yield ["--target", f"127.0.0.1:{server.ready()['grpc_port']}"]


def vectors_of(text: str) -> np.ndarray:
    return np.array([json.loads(line) for line in text.splitlines()], np.float32)


def test_embed_prints_a_vector_for_each_text(target: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["embed", "one", "two", "one", *target]) == 0
    one, two, again = vectors_of(capsys.readouterr().out)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, two)


def test_embed_reads_lines_and_writes_an_array(
    target: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More lines than go into one request; the vectors are those of the texts given as arguments."""
    texts = [f"text {number}" for number in range(150)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts) + "\n"))
    assert cli.main(["embed", "--output", str(tmp_path / "x.npy"), *target]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(["embed", *texts, *target]) == 0
    assert np.array_equal(np.load(tmp_path / "x.npy"), vectors_of(capsys.readouterr().out))


def test_a_reader_that_has_seen_enough_is_no_error(target: list[str]) -> None:
    """More vectors than a pipe holds, of which only the first line is read."""
    command = [sys.executable, "-m", "ml_inference_server", "embed", *map(str, range(500)), *target]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(json.loads(process.stdout.readline())) > 1
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_an_array_that_is_there_survives_a_failure(
    target: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "x.npy"
    output.write_bytes(b"earlier")
    assert cli.main(["embed", " ", "--output", str(output), *target]) == 5
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["embed", "--output", str(output), *target]) == 2
    assert "there is no text" in capsys.readouterr().err
    assert output.read_bytes() == b"earlier"


def test_rerank_prints_the_documents_best_first(target: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rerank", "a cell", "a bank", "a cell", "the sea", "--top-k", "2", *target]) == 0
    ranks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (ranks[0]["index"], ranks[0]["document"]) == (1, "a cell")
    assert len(ranks) == 2
    assert ranks[0]["score"] > ranks[1]["score"]


def test_info_tells_what_runs(target: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", *target]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["resolved"]["backend"] == "fake"
    assert info["settings"]["model"]["backend"] == "fake"


def test_health_says_whether_the_server_is_ready(target: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for service in ([], ["--service", "inference.GRPCInferenceService"]):
        assert cli.main(["health", *target, *service]) == 0
        assert capsys.readouterr().out == "SERVING\n"
    assert cli.main(["health", *target, "--service", "nobody's"]) == 5
    told = capsys.readouterr()
    assert (told.out, len(told.err.splitlines())) == ("", 1)
    assert "has no service" in told.err


def test_a_server_that_stops_is_not_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server_process(tmp_path, "--set", "server.drain_delay_ms=5000") as server:
        target = ["--target", f"127.0.0.1:{server.ready()['grpc_port']}"]
        server.signal(signal.SIGTERM)
        while cli.main(["health", *target]) == 0:
            pass
        assert "NOT_SERVING: it is starting, stopping" in capsys.readouterr().err


def test_a_refusal_is_one_line(target: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["embed", "fine", " "], ["rerank", "query", "fine", ""]):
        assert cli.main([*command, *target]) == 5
        told = capsys.readouterr()
        assert told.out == ""
        (line,) = told.err.splitlines()
        assert line.startswith("error: ")
        assert "EMPTY_TEXT" in line


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["embed", "a\udcff"], "a text is not valid UTF-8"),
        (["rerank", "a\udcff", "b"], "a query is not valid UTF-8"),
        (["rerank", "a", "b\udcff"], "a document is not valid UTF-8"),
        (["rerank", "a"], "there is no document"),
        (["embed"], "there is no text"),
        (["embed", "x", "--output", "/no/such/folder/x.npy"], "nothing can be written in /no/such/folder"),
    ],
)
def test_what_cannot_be_sent_is_one_line(
    command: list[str],
    told: str,
    target: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main([*command, *target]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_lines_that_are_not_utf8_are_one_line(
    target: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"fine\na\xff\n"), encoding="utf-8"))
    assert cli.main(["embed", *target]) == 2
    assert capsys.readouterr().err == "error: a text is not valid UTF-8\n"


@pytest.mark.parametrize(
    "command",
    [
        ["embed", "x", "--timeout-s", "0"],
        ["embed", "x", "--timeout-s", "nan"],
        ["info", "--target", ""],
        ["rerank", "x", "y", "--top-k", "-1"],
        ["rerank", "x", "y", "--top-k", "4294967296"],
    ],
)
def test_a_wrong_argument_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(command)
    assert refused.value.code == 2
    assert f"argument {command[-2]}: " in capsys.readouterr().err


@pytest.mark.parametrize("command", [["embed", "x"], ["rerank", "x", "y"], ["info"], ["health"]])
def test_a_server_that_is_not_there_is_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--target", "127.0.0.1:1"]) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no server answers at 127.0.0.1:1: start one with 'mlis serve'")


def test_a_model_that_is_named_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "one", "--model-name", "two"]) == 2
    assert capsys.readouterr().err == "error: the model is named twice: one and --model-name two\n"


def test_serve_takes_the_model_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as the error that names the folder: it was asked for as model.name."""
    assert cli.main(["serve", str(tmp_path / "gone"), "--port", "0", "--http-port", "0"]) == 3
    assert str(tmp_path / "gone") in capsys.readouterr().err.splitlines()[-1]


def test_experiments_finds_one_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Path] = []

    async def run_all(experiments: list[Experiment], *_: object) -> list[object]:
        seen.extend(experiment.file for experiment in experiments)
        return []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(all_experiments, "run_all", run_all)
    own = tmp_path / "minilm_onnx"
    own.write_text("name: own\n")
    assert cli.main(["experiments", "minilm_baseline", "quickstart.yaml", "minilm_onnx", "--output-dir", "out"]) == 0
    shipped = ROOT / "ml_inference_server" / "experiments"
    assert seen == [shipped / "minilm_baseline.yaml", shipped / "quickstart.yaml", Path("minilm_onnx")]


def test_help_shows_every_command_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, summary in cli.COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, summary] for line in lines), name


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: mlis {command}" in capsys.readouterr().out


def test_help_loads_nothing_that_is_slow() -> None:
    slow = {"grpc", "numpy", "pydantic", "aiohttp", "uvloop", "tqdm"}
    program = (
        f"import sys, ml_inference_server.cli as c; c.build_parser([]); print(sorted({slow!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_doctor_names_what_is_missing_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = metadata.version

    def version(name: str) -> str:
        if name in ("onnxruntime", installation.DISTRIBUTION):
            raise metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.chdir(ROOT)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["extras"]["onnx"]["missing"] == found["extras"]["export"]["missing"] == ["onnxruntime"]
    assert found["extras"]["core"]["missing"] == []
    assert found["extras"]["onnx"]["install"] == "pip install -r requirements.txt"
    assert found["machine"]["cpus"] > 0
    assert cli.main(["doctor"]) == 0
    assert "lacks onnxruntime" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["bench"], ["experiments"], ["compare", "a", "b"], ["report", "a"]])
def test_a_missing_extra_is_told_before_anything_is_done(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installation, "lacking", lambda _: ["scipy"])
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.lower().startswith("error: this needs scipy, not installed here: pip install ")


def completions(script: str, *words: str) -> set[str]:
    """What bash offers for the last of the words."""
    typed = " ".join(f"'{word}'" for word in words)
    program = f"{script}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}\n_shtab_mlis mlis {words[-1]!r}\n"
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bash_completes_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completions(script, "mlis", "") >= set(cli.COMMANDS)
    assert completions(script, "mlis", "re") == {"report", "rerank"}
    assert completions(script, "mlis", "serve", "--http") == {"--http-port"}
    assert "--max-regression" in completions(script, "mlis", "compare", "--")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_command(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each shell checks the syntax itself, where it is installed."""
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert [command for command in cli.COMMANDS if command not in script] == []
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([program, "-n", str(tmp_path / "script")], check=True, timeout=20)
