"""How this project is installed: as a checkout or a wheel, which extras are complete, what to install for more."""

import os
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ml_inference_server.utils.errors import ConfigError

DISTRIBUTION = "ml-inference-server"
CORE = "core"
_ROOT = Path(__file__).resolve().parents[2]
# The extras that `requirements.txt` leaves out, and the files that hold them.
_FILES = {"tracing": "requirements-tracing.txt", "ray": "requirements-ray.txt"}


def checkout() -> Path | None:
    """The folder of the project's checkout; None where the package was installed from a wheel."""
    return _ROOT if (_ROOT / "pyproject.toml").is_file() else None


def results_folder() -> Path:
    """Where results go that nobody gave a place: `docs` in a checkout, else a folder beside the caller."""
    root = checkout()
    return Path("ml_inference_server_results") if root is None else root / "ml_inference_server" / "docs"


def extras() -> dict[str, list[Requirement]]:
    """What each extra consists of, extras of extras resolved; the first one is the core, without any."""
    found = _declared()
    return {name: list(_resolved(found, found[name])) for name in found}


def _declared() -> dict[str, list[Requirement]]:
    """The extras as they stand in pyproject.toml or in the wheel, without what this system has no need of."""
    root = checkout()
    if root is not None:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lists = {CORE: project["dependencies"], **project["optional-dependencies"]}
        written = {name: [Requirement(line) for line in lines] for name, lines in lists.items()}
        return {name: [each for each in lines if _applies(each, "")] for name, lines in written.items()}
    every = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    core = [each for each in every if _applies(each, "")]
    names = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or ()
    return {CORE: core} | {
        name: [each for each in every if _applies(each, name) and each not in core] for name in names
    }


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _resolved(found: dict[str, list[Requirement]], requirements: Iterable[Requirement]) -> Iterator[Requirement]:
    for each in requirements:
        if canonicalize_name(each.name) == DISTRIBUTION:
            for name in sorted(each.extras):
                yield from _resolved(found, found[name])
        else:
            yield each


def version_of(requirement: Requirement) -> str | None:
    """The installed version, None where the package is not installed."""
    try:
        return metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return None


def lacking(requirements: Iterable[Requirement]) -> list[str]:
    """What is not installed as asked, ready for a message."""
    found = []
    for each in requirements:
        version = version_of(each)
        if version is None:
            found.append(each.name)
        elif not each.specifier.contains(version, prereleases=True):
            found.append(f"{each.name}{each.specifier} (it is {version})")
    return found


def pip_install(extra: str) -> str:
    """The command that installs an extra here."""
    root = checkout()
    try:
        metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        if root is not None:
            return f"pip install -r {os.path.relpath(root / _FILES.get(extra, 'requirements.txt'))}"
    return f"pip install {DISTRIBUTION}" if extra == CORE else f"pip install '{DISTRIBUTION}[{extra}]'"


def extra_of(module: str) -> str | None:
    """The smallest extra that brings the module with this import name; None where no extra does."""
    name = canonicalize_name(module.split(".")[0])
    sizes = sorted(extras().items(), key=lambda item: (item[0] != CORE, len(item[1])))
    for is_it in (name.__eq__, lambda package: package.startswith(f"{name}-")):
        for extra, requirements in sizes:
            if any(is_it(canonicalize_name(each.name)) for each in requirements):
                return extra
    return None


def remedy(module: str) -> str:
    """What to do about a module that is missing."""
    extra = extra_of(module)
    return f"pip install {module}" if extra is None else pip_install(extra)


def require(extra: str) -> None:
    """ConfigError with the command that installs it, unless this extra is complete."""
    missing = lacking(extras()[extra])
    if missing:
        raise ConfigError(f"this needs {', '.join(missing)}, not installed here: {pip_install(extra)}")


def child_environment(**extra: str) -> dict[str, str]:
    """The environment for a Python child that imports this project from whatever folder it is started in."""
    path = [str(root)] if (root := checkout()) else []
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **extra}
