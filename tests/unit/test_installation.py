"""What `mlis doctor` and the messages about missing packages rest on."""

import email.message
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ml_inference_server.utils import installation
from ml_inference_server.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a wheel: no checkout around the package, and the metadata of this project."""
    names = {name: [str(each) for each in packages] for name, packages in installation.extras().items()}
    folder = tmp_path / "ml_inference_server-0.1.0.dist-info"
    folder.mkdir()
    content = email.message.Message()
    content["Metadata-Version"], content["Name"], content["Version"] = "2.4", installation.DISTRIBUTION, "0.1.0"
    for line in names.pop(installation.CORE):
        content["Requires-Dist"] = line
    for name, lines in names.items():
        content["Provides-Extra"] = name
        for line in lines:
            content["Requires-Dist"] = f'{line.split(";")[0]}; extra == "{name}"'
    (folder / "METADATA").write_text(content.as_string())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(installation, "_ROOT", tmp_path)


def test_a_checkout_is_known() -> None:
    assert installation.checkout() == ROOT
    assert installation.results_folder() == ROOT / "ml_inference_server" / "docs"


@pytest.mark.usefixtures("installed")
def test_results_of_a_wheel_land_beside_the_caller() -> None:
    assert installation.checkout() is None
    assert installation.results_folder() == Path("ml_inference_server_results")


def test_extras_are_the_same_from_a_checkout_and_a_wheel(request: pytest.FixtureRequest) -> None:
    before = {name: {each.name for each in packages} for name, packages in installation.extras().items()}
    request.getfixturevalue("installed")
    after = {name: {each.name for each in packages} for name, packages in installation.extras().items()}
    assert after == before
    assert next(iter(after)) == installation.CORE


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("numpy", "core"),
        ("torch.nn", "torch"),
        ("sentence_transformers", "torch"),
        ("onnxruntime", "onnx"),
        ("onnx", "export"),
        ("nncf", "export"),
        ("scipy.stats", "bench"),
        ("opentelemetry.sdk", "tracing"),
        ("no_such_module", None),
    ],
)
def test_a_module_leads_to_the_smallest_extra_that_brings_it(module: str, extra: str | None) -> None:
    assert installation.extra_of(module) == extra


def test_what_is_lacking_is_named_with_what_is_there() -> None:
    version = metadata.version("numpy")
    wanted = [Requirement("numpy>=1"), Requirement("numpy>=1000"), Requirement("no-such-package")]
    assert installation.lacking(wanted) == [f"numpy>=1000 (it is {version})", "no-such-package"]


@pytest.mark.usefixtures("installed")
def test_a_missing_extra_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "lacking", lambda _: ["scipy"])
    with pytest.raises(ConfigError, match=r"needs scipy, .*: pip install 'ml-inference-server\[bench\]'$"):
        installation.require("bench")


def test_a_checkout_is_told_to_use_its_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.chdir(ROOT / "tests")
    assert installation.pip_install("bench") == "pip install -r ../requirements.txt"
    assert installation.pip_install("tracing") == "pip install -r ../requirements-tracing.txt"
