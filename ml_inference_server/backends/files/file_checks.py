"""What a file of a model must be before a library reads it: a regular file, JSON or safetensors, of a bounded size.

Libraries block on a pipe, read a device until the memory is full, and name neither file nor remedy.
"""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_inference_server.utils.errors import ModelError

# Configurations have kilobytes; a tokenizer's vocabulary, which is not read here, some megabytes.
_MOST_JSON_BYTES = 64 << 20
# The limit of the safetensors library.
_MOST_HEADER_BYTES = 100_000_000
# Files that the libraries read as JSON objects, where they are there.
_OBJECTS = (
    "config.json", "config_sentence_transformers.json", "sentence_*_config.json", "router_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "*.safetensors.index.json",
)  # fmt: skip
# Keys end so whose numbers Python makes one by one while it loads.
_COUNTS = ("layer", "layers", "labels", "blocks", "experts", "heads")
_MOST_COUNTED = 1 << 16


def check_regular(files: Iterable[Path]) -> None:
    """ModelError for anything in the place of a file that is none: a folder, a broken link, a pipe, a device."""
    for file in files:
        if file.is_file():
            continue
        if file.is_symlink() and not file.exists():
            what = "a link to a file that is not there"
        else:
            what = "a folder" if file.is_dir() else "a pipe, a socket or a device"
        raise ModelError(f"{file} is {what}, not a file: download the model again, or remove it")


def check_configurations(folder: Path) -> None:
    """ModelError if a configuration in `folder` is no JSON object, or counts what no memory holds."""
    for pattern in _OBJECTS:
        for file in sorted(folder.glob(pattern)):
            content = read_json(file)
            if not isinstance(content, dict):
                raise ModelError(f"{file} holds {_kind(content)} instead of a JSON object: download it again")
            if file.name == "config.json":
                _check_counts(file, content)
            if file.name.endswith(".index.json"):
                _check_index(file, content)


def _check_counts(file: Path, content: dict[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, dict):
            _check_counts(file, value)
        elif key.endswith(_COUNTS) and isinstance(value, int) and value > _MOST_COUNTED:
            raise ModelError(
                f"{file} says {key}: {str(value)[:20]}, above {_MOST_COUNTED}: no model has so many; download it again"
            )


def _check_index(file: Path, content: dict[str, Any]) -> None:
    """The weights' parts lie beside their index, all of them: others would be read without being verified."""
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(each, str) for each in places.values()):
        raise ModelError(f"{file} does not say which file holds which weights: download it again")
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ModelError(f"{file} names {name!r}, outside of its folder: refusing to read it; download it again")
        if not (file.parent / name).is_file():
            raise ModelError(f"{file.parent} misses {name}, a part of its weights: download it again")


def _kind(content: Any) -> str:
    kinds = {list: "a list", str: "a text", type(None): "null", bool: "a truth value"}
    return kinds.get(type(content), "a number")


def read_json(file: Path) -> Any:
    """What a JSON file of the model holds; None where it is not there. ModelError if it is damaged."""
    try:
        if file.stat().st_size > _MOST_JSON_BYTES:
            raise ModelError(
                f"{file} has more than {_MOST_JSON_BYTES >> 20} MiB: not a configuration; download it again"
            )
        if not file.is_file():
            check_regular([file])
        content = file.read_text(encoding="utf-8")
        if not content.strip():
            raise ModelError(f"{file} is empty: download it again")
        return json.loads(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)[:100]
        raise ModelError(f"{file} cannot be read ({type(error).__name__}: {reason}): download it again") from error


def check_safetensors(file: Path) -> dict[str, Any]:
    """The tensors' entries in the header of a safetensors file. ModelError if it is cut short or damaged."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            start = stream.read(8)
            if len(start) < 8:
                raise ModelError(f"weights file {file} is {'cut short' if start else 'empty'}: download it again")
            (header_bytes,) = struct.unpack("<Q", start)
            if header_bytes > min(size - 8, _MOST_HEADER_BYTES):
                raise ModelError(f"weights file {file} is truncated or damaged: download it again")
            header: dict[str, Any] = json.loads(stream.read(header_bytes))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if not all(_is_tensor(entry) for entry in tensors.values()):
            raise ModelError(f"weights file {file} describes its tensors wrongly: download it again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"weights file {file} cannot be read ({type(error).__name__}): download it again") from error
    wanted = 8 + header_bytes + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if wanted != size:
        raise ModelError(f"weights file {file} has {size} bytes instead of {wanted}: download it again")
    return tensors


def _is_tensor(entry: dict[str, Any]) -> bool:
    numbers = [*entry["shape"], *entry["data_offsets"]]
    return (
        isinstance(entry["dtype"], str)
        and len(entry["data_offsets"]) == 2
        and all(type(number) is int and number >= 0 for number in numbers)
    )
