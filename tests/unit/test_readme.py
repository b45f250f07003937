"""The reference is complete: every setting, flag, RPC and exit code stands in it; no document links to nothing."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ml_inference_server import cli, client, main
from ml_inference_server.benchmark import all_experiments, runner
from ml_inference_server.metrics.table import REASONS
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.utils import errors
from ml_inference_server.utils.config import setting_rows

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "ml_inference_server" / "docs"
SETTINGS, RPCS, COMMANDS = (
    (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("settings", "rpcs", "commands")
)
# Results of experiments land beside the documents and link to what only their machine has.
WRITTEN = [ROOT / "README.md", *(path for path in sorted(DOCS.glob("*.md")) if not path.stem.endswith("_results"))]


@pytest.mark.parametrize(("key", "default", "description"), setting_rows(), ids=[row[0] for row in setting_rows()])
def test_every_setting_is_described_as_in_the_code(key: str, default: object, description: str) -> None:
    row = next((line for line in SETTINGS.splitlines() if line.startswith(f"| `{key}` |")), "")
    assert description in row
    if isinstance(default, int | float | str) and not isinstance(default, bool) and default != "":
        assert f"`{default}`" in row


def test_every_rpc_is_described() -> None:
    for method in pb.DESCRIPTOR.services_by_name["InferenceService"].methods:
        assert f"`{method.name}`" in RPCS


def test_every_server_flag_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.parse(["--help"])
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert flags
    row = next(line for line in COMMANDS.splitlines() if line.startswith("| `run_server.sh` |"))
    assert {flag for flag in flags if f"`{flag}" not in row} == set()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run_client.sh", client.main),
        ("run_experiment.sh [FILE]", runner.main),
        ("run_all_experiments.py [FILE...]", all_experiments.main),
    ],
)
def test_every_flag_of_the_benchmark_is_listed(
    name: str, arguments: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        arguments(["--help"])
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    row = next(line for line in COMMANDS.splitlines() if line.startswith(f"| `{name}` |"))
    assert {flag for flag in flags if f"`{flag}" not in row} == set()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_of_mlis_is_listed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = next(line for line in COMMANDS.splitlines() if f"`mlis {command}" in line)
    program = re.search(r"those of `([^`]+)`", row)
    if program is not None:
        row += next(line for line in COMMANDS.splitlines() if line.startswith(f"| `{program[1]}"))
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert {flag for flag in flags if f"`{flag}" not in row} == set()


def test_every_reason_of_a_refusal_is_counted_by_its_name() -> None:
    rows = re.findall(r"^\| `[A-Z_]+` \| (`[A-Z_`, ]+`) \|", RPCS, re.MULTILINE)
    listed = {reason for row in rows for reason in re.findall("[A-Z_]+", row)}
    assert "EMPTY_REQUEST" in listed
    assert listed - set(REASONS) == set()


def test_every_exit_code_is_listed() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    table = COMMANDS[COMMANDS.index("| exit code |") :].split("\n\n")[0]
    assert {code for code in codes if not re.search(rf"\b{code}\b", table)} == set()


@pytest.mark.parametrize("document", WRITTEN, ids=lambda path: path.name)
def test_every_file_that_is_linked_exists(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_readme_links_to_every_document() -> None:
    readme = WRITTEN[0].read_text(encoding="utf-8")
    assert [path.name for path in WRITTEN[1:] if f"docs/{path.name}" not in readme] == []
