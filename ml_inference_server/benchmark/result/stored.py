"""Results and summaries as JSON: written in this version's schema, read in this and earlier ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ml_inference_server.benchmark.result.document import SCHEMA, SUMMARY, TAGS, Document, Summary, Verdict
from ml_inference_server.utils.errors import ConfigError


def to_json(document: Document | Summary) -> str:
    """Indented for people, but each run of a result on one line."""
    content = {"schema": SCHEMA, **document.model_dump(mode="json")}
    # A summary has no runs of its own; readers of every version ask for the key.
    runs = content.pop("runs", [])
    head = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    lines = ",\n    ".join(json.dumps(run, ensure_ascii=False, allow_nan=False) for run in runs)
    return head.removesuffix("\n}") + ',\n  "runs": [' + (f"\n    {lines}\n  " if lines else "") + "]\n}\n"


def read(path: Path) -> Document | Summary:
    """What `to_json` of this or an earlier version wrote. ConfigError, in one line, if it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a result is the .json beside its Markdown") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not the JSON of a result: {error}") from None
    if not isinstance(content, dict) or not {"schema", "kind", "runs"} <= content.keys():
        raise ConfigError(f"{path}: not the JSON of a result of this benchmark")
    number = content["schema"]
    if not isinstance(number, int) or number > SCHEMA:
        raise ConfigError(
            f"{path}: has schema {number}, and this version reads up to {SCHEMA}: use the version that wrote it, or a"
            " later one"
        )
    if number < min(_UPGRADES):
        raise ConfigError(
            f"{path}: has schema {number}, and this version reads from {min(_UPGRADES)} on: measure again"
        )
    kind: type[Document | Summary] = Summary if content["kind"] == SUMMARY else Document
    try:
        for earlier in range(number, SCHEMA):
            content = _UPGRADES[earlier](content)
        # As JSON: in Python's own types, strictness would ask for tuples and enums.
        return kind.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_fault(error)}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a result of schema {number}: {type(error).__name__} {error}") from None


def _first_fault(error: ValidationError) -> str:
    """The field and what is wrong with it."""
    fault = error.errors(include_url=False)[0]
    field = ""
    for part in fault["loc"]:
        if isinstance(part, int):
            field += f"[{part}]"
        elif part not in TAGS:
            field += f".{part}" if field else part
    more = error.error_count() - 1
    return f"{field}: {fault['msg'][:1].lower()}{fault['msg'][1:]}" + (f" (and {more} more)" if more else "")


def _from_2(content: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 had no `cause` of a row, and an exit code inside the verdict of a summary's entry."""

    def caused(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"cause": None, **run} for run in runs]

    if content["kind"] != SUMMARY:
        return {**content, "runs": caused(content["runs"])}
    known = set(Verdict)
    return {
        **content,
        "experiments": [
            {
                **entry,
                "runs": caused(entry["runs"]),
                "verdict": entry["verdict"] if entry["verdict"] in known else Verdict.FAILED,
            }
            for entry in content["experiments"]
        ],
    }


# Each makes a document of its schema into one of the next.
_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {2: _from_2}
