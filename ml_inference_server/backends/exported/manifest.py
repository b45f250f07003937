"""The manifest of an exported folder: what the folder holds, and the hash of every file in it. Read and written here.

An exported folder is a model without its libraries: a graph for one engine, a tokenizer, and the FP32 answers that the
gate at the start compares with. `mlis export` writes one; a server whose `model.name` is the folder runs it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ml_inference_server.backends.base import Company
from ml_inference_server.backends.files.file_checks import check_regular
from ml_inference_server.backends.files.model_files import sha256_of
from ml_inference_server.backends.files.model_kind import Task
from ml_inference_server.backends.model.export import GraphFacts
from ml_inference_server.utils.config import Quantization
from ml_inference_server.utils.errors import ModelError
from ml_inference_server.utils.files import replace_file

MANIFEST = "mlis_export.json"
# Raise it when a reader of before would read a new folder wrongly.
FORMAT_VERSION: Literal[1] = 1
REMEDY = "copy the folder again, or export the model again with mlis export"
_OWN_HASH = "manifest_sha256"
_MOST_BYTES = 16 << 20

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), strict=True)


class Graph(_Part):
    """output: the name of the rows. weights: what the graph was made from, in words. facts: None where the engine tells
    them itself."""

    file: FileName
    output: str
    precision: Quantization
    weights: str
    facts: GraphFacts | None


class TextRules(_Part):
    """What makes tokens of a text besides the tokenizer's own file; prompt "" is the default."""

    file: FileName
    max_tokens: int = Field(ge=1)
    pad_id: int = Field(ge=0)
    truncation_side: Literal["left", "right"]
    takes_segments: bool
    prompts: dict[str, str]


class Source(_Part):
    """The model that was exported: its name as it was given, and what its files say. pooling: see `pooling_of`."""

    model: str
    found_in: str
    weights_sha256: str
    model_sha256: Sha256
    parameters: int
    random_weights: bool
    pooling: str = ""


class MeasuredParity(_Part):
    """To FP32, when the folder was written: mean and least cosine, or the correlation of a cross-encoder's logits."""

    mean: float
    least: float


class Manifest(_Part):
    """files: the SHA-256 of every other file. made_with: versions of what made them. parity: None while it is made."""

    format_version: Literal[1] = FORMAT_VERSION
    backend: Literal["onnx", "openvino"]
    task: Task
    similarity: str
    dimension: int = Field(ge=1)
    company: Company
    graph: Graph
    text: TextRules
    source: Source
    parity: MeasuredParity | None
    made_with: dict[str, str]
    files: dict[FileName, Sha256]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = manifest.model_dump(mode="json")
    content[_OWN_HASH] = _hash_of(content)
    replace_file(folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """ModelError, with the remedy, if it is damaged, was changed, or is of another format."""
    file = folder / MANIFEST
    check_regular([file])
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("too large for a manifest")
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read ({_short(error)}): {REMEDY}") from error
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{file} has format_version {version!r:.40}, and this server reads {FORMAT_VERSION}: export the model "
            f"again with the mlis export of this version"
        )
    if content.pop(_OWN_HASH, None) != _hash_of(content):
        raise ModelError(f"{file} was changed after the export: {REMEDY}")
    try:
        manifest = Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ModelError(f"{file} is not a manifest ({place}: {first['msg']}): {REMEDY}") from error
    missing = {manifest.graph.file, manifest.text.file} - manifest.files.keys()
    if missing:
        raise ModelError(f"{file} gives no hash of {min(missing)}: {REMEDY}")
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """ModelError for the first file that is missing, or is another than at the export."""
    for name, digest in manifest.files.items():
        file = folder / name
        if not file.exists() and not file.is_symlink():
            raise ModelError(f"{folder} misses {name}: {REMEDY}")
        check_regular([file])
        try:
            found = sha256_of(file)
        except OSError as error:
            raise ModelError(f"{file} cannot be read ({_short(error)}): {REMEDY}") from error
        if found != digest:
            raise ModelError(f"{file} was changed after the export, or is damaged: {REMEDY}")


def _hash_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _short(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"{type(error).__name__}: {str(reason)[:100]}"
