"""One record for each request, kept compactly: every figure of a report can be made from them again."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from ml_inference_server.utils.errors import ConfigError

# Times in seconds from the start of the row; those of the server in microseconds, 0 where no answer brought them.
RECORD = np.dtype(
    [
        ("due_s", "<f8"),
        ("sent_s", "<f8"),
        ("done_s", "<f8"),
        ("code", "u1"),
        ("tokenize_us", "<u4"),
        ("queue_us", "<u4"),
        ("compute_us", "<u4"),
        ("total_us", "<u4"),
    ]
)
UNFINISHED = "UNFINISHED"
# The position is what a record holds: never change the order.
CODES = (
    *(code.name for code in sorted(grpc.StatusCode, key=lambda code: code.value[0])),
    "INVALID_RESPONSE",
    "CLIENT_ERROR",
    UNFINISHED,
)
CODE_NUMBERS = {name: number for number, name in enumerate(CODES)}
_UINT32_MAX = 2**32 - 1

Records = NDArray[Any]


def record(
    due_s: float, sent_s: float, done_s: float, code: str, timing_us: tuple[int, int, int, int]
) -> tuple[float | int, ...]:
    """One row of RECORD."""
    return (due_s, sent_s, done_s, CODE_NUMBERS[code], *(min(us, _UINT32_MAX) for us in timing_us))


def as_records(rows: list[tuple[float | int, ...]]) -> Records:
    """The rows in the order in which they were due."""
    records = np.array(rows, dtype=RECORD)
    in_order: Records = records[np.argsort(records["due_s"], kind="stable")]
    return in_order


def ok_only(records: Records) -> Records:
    kept: Records = records[records["code"] == CODE_NUMBERS["OK"]]
    return kept


def counts(records: Records) -> dict[str, int]:
    """How many requests ended with which code, the most frequent first; UNFINISHED among them."""
    numbers, amounts = np.unique(records["code"], return_counts=True)
    found = {CODES[number]: int(amount) for number, amount in zip(numbers, amounts, strict=True)}
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def encode(runs: Mapping[str, Records]) -> bytes:
    """An .npz file: one array of RECORD for each run."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(runs)
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read(path: Path) -> dict[str, Records]:
    """What `encode` wrote. ConfigError if it is missing or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: the raw records cannot be read: {error}") from error
    if any(records.dtype != RECORD for records in found.values()):
        raise ConfigError(f"{path}: not the raw records of a benchmark")
    return found
