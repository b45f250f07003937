"""The locks hold what pyproject.toml asks for, each package with its hashes; list and audit are made of them."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy.containerfile import FOLDER, ROOT
from tests.integration.script_copies import clean_env
from tests.unit.test_requirements import CORE, EXTRAS

# Its programs start slowly where the machine is busy.
pytestmark = pytest.mark.timeout(600)

LOCK = ROOT / "requirements.lock"
BUILDER = FOLDER / "builder.lock"
STALE = "run ./supply_chain.sh lock"
# As markers see the systems that are supported; extra: none.
SYSTEMS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": system,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system],
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "os_name": "posix",
        "extra": "",
    }
    for python in ("3.11", "3.12", "3.13", "3.14")
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
]


@dataclass
class Pin:
    requirement: Requirement
    hashes: list[str] = field(default_factory=list)

    @property
    def version(self) -> Version:
        (only,) = self.requirement.specifier
        assert only.operator == "=="
        return Version(only.version)


def pins(lock: Path) -> list[Pin]:
    text = re.sub(r"\\\n\s*", " ", lock.read_text(encoding="utf-8"))
    found = []
    for line in text.splitlines():
        if line and not line.lstrip().startswith("#"):
            wanted, *hashes = line.split(" --hash=")
            found.append(Pin(Requirement(wanted.strip()), [each.strip() for each in hashes]))
    return found


def pin_of(name: str, system: dict[str, str], lock: list[Pin]) -> Pin | None:
    found = [
        pin
        for pin in lock
        if canonicalize_name(pin.requirement.name) == canonicalize_name(name)
        and (pin.requirement.marker is None or pin.requirement.marker.evaluate(system))
    ]
    assert len(found) <= 1, f"{name} is locked twice for {system}"
    return found[0] if found else None


def wanted_by_the_project() -> Iterator[Requirement]:
    for line in [*CORE, *(line for lines in EXTRAS.values() for line in lines)]:
        requirement = Requirement(line)
        if requirement.name != "ml-inference-server":
            yield requirement


@pytest.mark.parametrize("lock", [LOCK, BUILDER], ids=lambda path: path.name)
def test_every_pin_has_hashes_and_none_comes_from_elsewhere(lock: Path) -> None:
    found = pins(lock)
    assert len(found) > 5
    for pin in found:
        assert pin.version
        assert pin.requirement.url is None
        assert pin.hashes, pin.requirement.name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in pin.hashes)
    assert "://" not in lock.read_text(encoding="utf-8")


def test_what_the_project_asks_for_is_locked_within_its_range() -> None:
    lock = pins(LOCK)
    for requirement in wanted_by_the_project():
        for system in SYSTEMS:
            if requirement.marker is None or requirement.marker.evaluate(system):
                pin = pin_of(requirement.name, system, lock)
                assert pin is not None, f"{requirement} is not locked for {system}: {STALE}"
                assert pin.version in requirement.specifier, f"{requirement}: {pin.version} is locked: {STALE}"


def test_what_the_locked_packages_ask_for_is_locked_too() -> None:
    """Of those that are installed here in the locked version, which tell what they need."""
    lock = pins(LOCK)
    compared = 0
    for pin in lock:
        try:
            installed = metadata.distribution(pin.requirement.name)
        except metadata.PackageNotFoundError:
            continue
        # CPU builds of torch need no CUDA, and have no hash in the lock.
        if Version(installed.version) != pin.version:
            continue
        compared += 1
        for line in installed.requires or []:
            needed = Requirement(line)
            for system in SYSTEMS:
                is_locked_there = pin.requirement.marker is None or pin.requirement.marker.evaluate(system)
                if is_locked_there and (needed.marker is None or needed.marker.evaluate(system)):
                    found = pin_of(needed.name, system, lock)
                    assert found is not None, f"{pin.requirement.name} needs {needed}, not locked: {STALE}"
                    assert needed.specifier.contains(found.version, prereleases=True), f"{needed}: {found.version}"
    assert compared > 40


def test_the_builder_is_locked() -> None:
    wanted = [Requirement(line) for line in (FOLDER / "builder.in").read_text(encoding="utf-8").split()]
    lock = pins(BUILDER)
    for requirement in wanted:
        pin = pin_of(requirement.name, SYSTEMS[0], lock)
        assert pin is not None
        assert pin.version in requirement.specifier


def test_a_lock_that_is_behind_is_noticed(tmp_path: Path) -> None:
    shorter = re.sub(r"^tqdm==.*?(?=^\S)", "", LOCK.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "lock").write_text(shorter)
    assert pin_of("tqdm", SYSTEMS[0], pins(LOCK)) is not None
    assert pin_of("tqdm", SYSTEMS[0], pins(tmp_path / "lock")) is None


def supply_chain(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "supply_chain.sh"), *arguments], capture_output=True, text=True, timeout=500, check=False,
        env=clean_env(**env), stdin=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip


def test_the_list_has_every_locked_package_with_its_hashes(tmp_path: Path) -> None:
    done = supply_chain("sbom", str(tmp_path / "sbom.json"))
    assert done.returncode == 0, done.stderr
    listed = json.loads((tmp_path / "sbom.json").read_text())
    assert listed["bomFormat"] == "CycloneDX"
    assert listed["metadata"]["component"]["name"] == "ml-inference-server"
    found = {(each["name"], each["version"]) for each in listed["components"]}
    assert found == {(pin.requirement.name, str(next(iter(pin.requirement.specifier)).version)) for pin in pins(LOCK)}
    assert all(each["externalReferences"][0]["hashes"] for each in listed["components"])
    assert all(each["purl"].startswith("pkg:pypi/") for each in listed["components"])


def test_an_audit_that_reached_nobody_does_not_pass() -> None:
    """Its tool ends well where it could ask about nothing, unless it is told not to."""
    unreachable = "http://127.0.0.1:1"
    done = supply_chain("audit", HTTPS_PROXY=unreachable, https_proxy=unreachable, HTTP_PROXY=unreachable)
    assert done.returncode == 5
    assert "was NOT audited" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments", [(), ("sbom",), ("lock", "--newest"), ("audit", "x")])
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...]) -> None:
    done = supply_chain(*arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "usage:" in done.stderr


def test_the_container_takes_the_locks_and_nothing_without_a_hash() -> None:
    script = (FOLDER / "build_root.sh").read_text(encoding="utf-8")
    assert "--only-binary :all: --require-hashes --constraints requirements.lock" in script
    assert os.access(FOLDER / "build_root.sh", os.X_OK)
