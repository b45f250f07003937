"""The requirements files and pyproject.toml ask for the same packages in the same ranges."""

import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ml_inference_server.utils.installation import DISTRIBUTION

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CORE = PYPROJECT["project"]["dependencies"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
DEV = PYPROJECT["dependency-groups"]["dev"]


def packages(lines: Iterable[str]) -> dict[str, str]:
    """Name to range and marker. AssertionError where one package is asked for in two ways."""
    found: dict[str, str] = {}
    for line in lines:
        each = Requirement(line)
        if each.name == DISTRIBUTION:
            continue
        wanted = f"{each.specifier}; {each.marker}"
        assert found.setdefault(canonicalize_name(each.name), wanted) == wanted, line
    return found


def written(name: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return packages(line for line in lines if line and not line.startswith("-r"))


def test_requirements_are_the_core_and_every_extra_but_tracing_and_ray() -> None:
    lists = [CORE, *(lines for name, lines in EXTRAS.items() if name not in ("tracing", "ray"))]
    assert written("requirements.txt") == packages(line for lines in lists for line in lines)


def test_requirements_of_tracing_are_its_extra() -> None:
    assert written("requirements-tracing.txt") == packages(EXTRAS["tracing"])


def test_requirements_of_ray_are_its_extra() -> None:
    assert written("requirements-ray.txt") == packages(EXTRAS["ray"])


def test_requirements_for_development_are_their_group_and_tracing() -> None:
    assert written("requirements-dev.txt") == packages([*DEV, *EXTRAS["tracing"]])
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()


def test_all_is_every_extra_but_ray_which_is_a_cluster() -> None:
    def named(extra: str) -> set[str]:
        own = (Requirement(line) for line in EXTRAS[extra])
        return {extra}.union(*(named(name) for each in own for name in each.extras))

    assert named("all") | {"ray"} == set(EXTRAS)


def test_the_core_brings_no_engine() -> None:
    heavy = {
        "torch",
        "transformers",
        "sentence-transformers",
        "onnxruntime",
        "openvino",
        "scipy",
        "matplotlib",
        "datasets",
        "ray",
    }
    assert heavy & set(packages(CORE)) == set()


def test_a_package_in_two_ranges_is_noticed() -> None:
    with pytest.raises(AssertionError):
        packages(["torch>=2", "torch>=1"])
