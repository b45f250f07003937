"""What the Containerfile says, so that a test runs its lines and not some of its own."""

import io
import shlex
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "ml_inference_server" / "deploy" / "container"
CONTAINERFILE = FOLDER / "Containerfile"


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, by its name, each with what stands behind it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for each in DockerfileParser(fileobj=io.BytesIO(CONTAINERFILE.read_bytes())).structure:
        if each["instruction"] == "FROM":
            current = found.setdefault(each["value"].split(" AS ")[1], [])
        elif found and each["instruction"] != "COMMENT":
            current.append((each["instruction"], each["value"]))
    return found


def values(stage: str, instruction: str) -> list[str]:
    return [value for name, value in stages()[stage] if name == instruction]


def environment(stage: str = "runtime") -> dict[str, str]:
    """What the image's ENV lines set."""
    words = (word for value in values(stage, "ENV") for word in shlex.split(value))
    return dict(word.split("=", 1) for word in words)
