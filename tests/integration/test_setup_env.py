"""How the scripts find, make, mend and share the Python environment: really run, on requirements without downloads."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.integration.script_copies import ROOT, bare_venv, clean_env, make_copy, run, started

# A package whose build does not end by itself (but for the alarm, should a test fail): it reports by opening a FIFO,
# and holds it open for as long as it lives.
ENDLESS_BUILD = """
import os, signal
def get_requires_for_build_wheel(config_settings=None):
    os.open({fifo!r}, os.O_WRONLY)
    signal.alarm(150)
    signal.pause()
"""


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
    two = run(built / "setup_env.sh", "requirements.txt", "requirements-dev.txt", cwd=built)
    assert (two.returncode, "expected one file, not 2" in two.stderr) == (2, True)


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
    with started(built / "run_server.sh", cwd=built) as one, started(built / "run_server.sh", cwd=built) as two:
        told = [process.communicate(timeout=150)[1] for process in (one, two)]
    assert [one.returncode, two.returncode] == [7, 7], told
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
    with started(script, cwd=copy) as process:
        with fifo.open("rb") as reader:  # opens when pip's own child is in the middle of its work
            # A second script waits for the first; it can be ended too, and takes nothing with it.
            with started(script, cwd=copy) as waiting:
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
