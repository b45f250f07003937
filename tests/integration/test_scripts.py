"""The shell scripts, really run: in a throw-away copy whose requirements need no download, from another folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted(ROOT.glob("*.sh")), ROOT / ".ci" / "run"]

# Stands where the server and the runner stand, and tells what reached it.
ECHO = """
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "pid": os.getpid(), "prefix": sys.prefix}))
sys.exit(7)
"""

# A package whose build never ends: it reports by opening a FIFO, and holds it open for as long as it lives.
ENDLESS_BUILD = """
import os, signal
def get_requires_for_build_wheel(config_settings=None):
    os.open({fifo!r}, os.O_WRONLY)
    signal.pause()
"""


def make_copy(folder: Path, requirements: str) -> Path:
    """A tree with the real scripts in a folder whose name holds a space."""
    copy = folder / "a clone"
    for name in ("server", "benchmark"):
        (copy / "ml_inference_server" / name).mkdir(parents=True)
    for script in SCRIPTS:
        target = copy / script.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(script, target)
    (copy / "requirements.txt").write_text(requirements)
    (copy / "requirements-dev.txt").write_text("-r requirements.txt\n")
    (copy / "ml_inference_server" / "__init__.py").touch()
    (copy / "ml_inference_server" / "benchmark" / "__init__.py").touch()
    (copy / "ml_inference_server" / "main.py").write_text(ECHO)
    (copy / "ml_inference_server" / "benchmark" / "runner.py").write_text(ECHO)
    return copy


def clean_env(**extra: str) -> dict[str, str]:
    """The caller's environment with no environment active, and with the Python of this test found first."""
    dropped = ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "PYTHONPATH")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env["PATH"] = f"{sys.base_prefix}/bin:{env['PATH']}"
    return env | extra


def run(
    script: Path, *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments],
        cwd=cwd,
        env=clean_env() if env is None else env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def bare_venv(folder: Path) -> Path:
    """An environment with nothing in it, not even pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose .venv the scripts made themselves; it needs pip, which every new environment brings."""
    copy = make_copy(tmp_path_factory.mktemp("built"), "pip\n")
    bare_venv(copy / "venv")  # incomplete, so it must be passed over
    made = run(copy / "run_server.sh", cwd=copy)
    assert made.returncode == 7, made.stderr
    assert "Setting up .venv with Python" in made.stderr
    assert "once only" in made.stderr
    assert json.loads(made.stdout.splitlines()[-1])["prefix"] == str(copy / ".venv")
    return copy


@pytest.fixture
def development(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy with the real requirements and tool settings, and this test's own environment active."""
    copy = make_copy(tmp_path, (ROOT / "requirements.txt").read_text())
    for name in ("requirements-dev.txt", "pyproject.toml"):
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


def test_arguments_folder_and_exit_code_pass_unharmed(built: Path, tmp_path: Path) -> None:
    odd = ["--set", "a.b=[1, 4]", "", "two  words", "*", "$HOME", 'quo"te', "--", "-x"]
    with subprocess.Popen(
        [str(built / "run_server.sh"), *odd], cwd=tmp_path, env=clean_env(), stdout=-1, stderr=-1, text=True
    ) as process:
        out, err = process.communicate(timeout=60)
    told = json.loads(out)
    assert told["argv"] == odd
    assert told["cwd"] == str(tmp_path)
    assert told["pid"] == process.pid, "the program must replace the shell, or signals do not reach it"
    assert process.returncode == 7
    assert err == "", "an environment that is up to date needs no word"


def test_run_experiment_knows_its_default_file(built: Path, tmp_path: Path) -> None:
    default = str(built / "ml_inference_server/experiments/minilm_baseline.yaml")
    script = built / "run_experiment.sh"
    for given, passed in (
        ([], [default]),
        (["--set", "a.b=1"], [default, "--set", "a.b=1"]),
        (["my file.yaml", "--set", "a.b=1"], ["my file.yaml", "--set", "a.b=1"]),
    ):
        assert json.loads(run(script, *given, cwd=tmp_path).stdout)["argv"] == passed


def test_changed_requirements_are_installed_once(built: Path) -> None:
    requirements = built / "requirements.txt"
    requirements.write_text("pip\n# changed\n")
    first = run(built / "run_server.sh", cwd=built)
    assert "up to date with requirements.txt" in first.stderr
    assert run(built / "run_server.sh", cwd=built).stderr == ""


def test_development_requirements_come_on_top(built: Path) -> None:
    first = run(built / "setup_env.sh", "requirements-dev.txt", cwd=built)
    assert "up to date with requirements-dev.txt" in first.stderr
    assert run(built / "setup_env.sh", "requirements-dev.txt", cwd=built).stderr == f"Ready: {built}/.venv/bin/python\n"
    assert run(built / "run_server.sh", cwd=built).stderr == ""
    assert run(built / "setup_env.sh", "nonsense.txt", cwd=built).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["installation cut short", "no python", "not a venv", "dead link"])
def test_half_made_environment_is_made_again(built: Path, damage: str) -> None:
    venv = built / ".venv"
    if damage == "installation cut short":
        (venv / ".setup-unfinished").touch()
    elif damage == "no python":
        for python in (venv / "bin").glob("python*"):
            python.unlink()
    elif damage == "not a venv":  # its python still runs, but as the system's
        (venv / "pyvenv.cfg").unlink()
    else:
        shutil.rmtree(venv)
        venv.symlink_to(built / "gone")
    mended = run(built / "run_server.sh", cwd=built)
    assert ".venv is unfinished or broken; making it again." in mended.stderr
    assert mended.returncode == 7
    assert not (built / ".venv.discarded").exists()
    assert run(built / "run_server.sh", cwd=built).stderr == ""


@pytest.mark.slow
def test_two_scripts_at_once_build_one_environment(built: Path) -> None:
    shutil.rmtree(built / ".venv")
    processes = [
        subprocess.Popen([str(built / "run_server.sh")], cwd=built, env=clean_env(), stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=150)[1] for process in processes]
    assert [process.returncode for process in processes] == [7, 7], told
    assert sorted("Setting up .venv" in text for text in told) == [False, True]
    assert sorted("Another script is setting up .venv" in text for text in told) == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_during_set_up_leaves_no_process(tmp_path: Path, signum: signal.Signals, status: int) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    package = tmp_path / "endless"
    package.mkdir()
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (package / "backend.py").write_text(ENDLESS_BUILD.format(fifo=str(fifo)))
    copy = make_copy(tmp_path, f"endless @ file://{package}\n")
    script = copy / "run_server.sh"
    with subprocess.Popen([str(script)], cwd=copy, env=clean_env(), stdout=-1, stderr=-1, text=True) as process:
        with fifo.open("rb") as reader:  # opens when pip's own child is in the middle of its work
            # A second script waits for the first; it can be ended too, and takes nothing with it.
            with subprocess.Popen([str(script)], cwd=copy, env=clean_env(), stdout=-1, stderr=-1, text=True) as waiting:
                assert waiting.stderr is not None
                assert "waiting for it" in waiting.stderr.readline()
                waiting.send_signal(signum)
                waiting.communicate(timeout=30)
            assert waiting.returncode == status
            assert process.poll() is None
            process.send_signal(signum)
            assert reader.read() == b"", "the end of the file tells that pip's child is gone"
        process.communicate(timeout=30)
    assert process.returncode == status
    assert (copy / ".venv" / ".setup-unfinished").exists(), "by this the next run knows"


def test_active_environment_without_the_packages_is_refused(tmp_path: Path) -> None:
    own = bare_venv(tmp_path / "my env")
    before = sorted(own.rglob("*"))
    refused = run(ROOT / "run_server.sh", cwd=tmp_path, env=clean_env(VIRTUAL_ENV=str(own)))
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "torch" in refused.stderr
    assert f"install -r {ROOT}/requirements.txt" in refused.stderr
    assert sorted(own.rglob("*")) == before


def test_active_environment_that_is_gone_is_named(built: Path) -> None:
    refused = run(built / "run_server.sh", cwd=built, env=clean_env(VIRTUAL_ENV="/nowhere/env"))
    assert refused.returncode == 2
    assert "/nowhere/env has no Python that runs: deactivate it" in refused.stderr


def test_conda_base_counts_only_if_complete(built: Path, tmp_path: Path) -> None:
    conda = bare_venv(tmp_path / "conda")
    base = run(built / "run_server.sh", cwd=built, env=clean_env(CONDA_PREFIX=str(conda), CONDA_DEFAULT_ENV="base"))
    assert json.loads(base.stdout.splitlines()[-1])["prefix"] == str(built / ".venv")
    chosen = run(built / "run_server.sh", cwd=built, env=clean_env(CONDA_PREFIX=str(conda), CONDA_DEFAULT_ENV="mine"))
    assert chosen.returncode == 2
    assert "lacks pip" in chosen.stderr


def test_complete_venv_folder_is_used_without_activation(tmp_path: Path) -> None:
    copy = make_copy(tmp_path, "# nothing is needed\n")
    bare_venv(copy / "venv")
    used = run(copy / "run_server.sh", cwd=tmp_path)
    assert json.loads(used.stdout)["prefix"] == str(copy / "venv")
    assert not (copy / ".venv").exists()


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("echo 3.9", "Python 3.11 to 3.14 is needed, python3 is 3.9: install one"),
        ("echo 3.15", "python3 is 3.15: install one"),
        ("echo 'pyenv: python3: command not found' >&2; exit 127", "needed and no Python was found: install one"),
        ('case "$*" in *ensurepip*) exit 1 ;; *) echo 3.12 ;; esac', "sudo apt install python3-venv"),
    ],
    ids=["too old", "too new", "shim of nothing", "Debian without venv"],
)
def test_unfit_python_is_explained(tmp_path: Path, python: str, message: str) -> None:
    copy = make_copy(tmp_path, "pip\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "cat", "dirname", "mkdir", "rm"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    (tools / "python3").write_text(f"#!/bin/sh\n{python}\n")
    (tools / "python3").chmod(0o755)
    refused = run(copy / "run_experiment.sh", cwd=tmp_path, env=clean_env() | {"PATH": str(tools)})
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (copy / ".venv").exists()


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
