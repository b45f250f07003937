"""The shell scripts, really run: in a throw-away copy whose requirements need no download, from another folder."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.script_copies import ROOT, SCRIPTS, bare_venv, clean_env, make_copy, run, started


@pytest.fixture
def echoing(tmp_path: Path) -> Path:
    """A copy that is ready: it needs no package, and has the `venv` of the quick start."""
    copy = make_copy(tmp_path, "# nothing is needed\n")
    bare_venv(copy / "venv")
    return copy


@pytest.fixture
def development(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy with the real requirements and tool settings, and this test's own environment active."""
    copy = make_copy(tmp_path, (ROOT / "requirements.txt").read_text())
    for name in ("requirements-dev.txt", "pyproject.toml", ".clang-format"):
        shutil.copy(ROOT / name, copy / name)
    shutil.rmtree(copy / "ml_inference_server" / "benchmark")
    (copy / "ml_inference_server" / "main.py").write_text('"""Nothing to do."""\n')
    (copy / "run_all_experiments.py").write_text('"""Nothing to do."""\n')
    shutil.copytree(
        ROOT / "ml_inference_server" / "proto", copy / "ml_inference_server" / "proto",
        ignore=shutil.ignore_patterns("__pycache__"),
    )  # fmt: skip
    (copy / "tests").mkdir()
    (copy / "tests" / "test_small.py").write_text(
        "def test_first() -> None:\n    assert True\n\n\ndef test_second() -> None:\n    assert True\n"
    )
    return copy, clean_env(VIRTUAL_ENV=sys.prefix)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_valid_and_portable(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    checked = subprocess.run([str(shellcheck), "-x", script.name], cwd=script.parent, capture_output=True, text=True)
    assert checked.stdout == ""
    # bash 3.2 and BSD tools know none of these.
    newer = (
        r"mapfile|readarray|declare -A|\$\{\w+(,|\^)|&>>|\bcoproc\b|readlink -f|sed -i|\btimeout \d|\bflock -|date -d"
    )
    assert not re.search(newer, script.read_text())


def test_arguments_folder_and_exit_code_pass_unharmed(echoing: Path, tmp_path: Path) -> None:
    odd = ["--set", "a.b=[1, 4]", "", "two  words", "*", "$HOME", 'quo"te', "--", "-x"]
    with started(echoing / "run_server.sh", *odd, cwd=tmp_path) as process:
        out, err = process.communicate(timeout=60)
    told = json.loads(out)
    assert told["argv"] == odd
    assert told["cwd"] == str(tmp_path)
    assert told["pid"] == process.pid, "the program must replace the shell, or signals do not reach it"
    assert process.returncode == 7
    assert err == "", "an environment that is up to date needs no word"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_does_not_keep_a_script_from_running(echoing: Path, tmp_path: Path, closed: str) -> None:
    command = ["sh", "-c", f'exec "$0" {closed}', str(echoing / "run_server.sh")]
    assert subprocess.run(command, cwd=tmp_path, env=clean_env(), check=False, timeout=60).returncode == 7


def test_run_experiment_leaves_the_choice_of_a_file_to_the_runner(echoing: Path, tmp_path: Path) -> None:
    script = echoing / "run_experiment.sh"
    for given in ([], ["--set", "a.b=1"], ["my file.yaml", "--set", "a.b=1"]):
        assert json.loads(run(script, *given, cwd=tmp_path).stdout)["argv"] == given


def test_run_tests_takes_paths_from_the_callers_folder(
    development: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    copy, env = development
    script = copy / "run_tests.sh"
    assert "1 passed, 1 deselected" in run(script, "-k", "first", cwd=tmp_path, env=env).stdout
    assert "2 passed" in run(script, "test_small.py", cwd=copy / "tests", env=env).stdout
    assert "1 passed" in run(script, "tests/test_small.py::test_second", cwd=copy, env=env).stdout
    assert run(script, "-k", "nothing_of_that_name", cwd=copy, env=env).returncode == 5


@pytest.mark.slow
def test_lint_checks_without_editing_and_fixes_on_demand(development: tuple[Path, dict[str, str]]) -> None:
    copy, env = development
    script = copy / "lint.sh"
    clean = run(script, cwd=copy.parent, env=env)
    assert clean.stdout.splitlines()[-1] == "Lint ok."
    assert clean.returncode == 0

    main = copy / "ml_inference_server" / "main.py"
    stub = copy / "ml_inference_server" / "proto" / "inference_pb2.pyi"
    main.write_text("import os\nx = [ 1 ]\n")
    stub.write_text(stub.read_text() + "# edited\n")
    (copy / "run_server.sh").write_text("#!/usr/bin/env bash\necho $1\n")
    before = {path: path.read_bytes() for path in (main, stub)}
    found = run(script, cwd=copy.parent, env=env)
    assert found.stdout.splitlines()[-1] == (
        "Lint FAILED: ruff format --check, ruff check, shellcheck, stubs match the proto"
    )
    assert found.returncode == 1
    assert {path: path.read_bytes() for path in (main, stub)} == before

    fixed = run(script, "--fix", cwd=copy.parent, env=env)
    assert fixed.stdout.splitlines()[-1] == "Lint FAILED: shellcheck"
    assert main.read_text() == "x = [1]\n"
    assert "# edited" not in stub.read_text()
    assert run(script, "--wrong", cwd=copy, env=env).returncode == 2
