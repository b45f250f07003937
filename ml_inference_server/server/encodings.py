"""Smaller forms of a vector's numbers on the wire."""

from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Encoding(StrEnum):
    """How the numbers of a vector travel."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"  # each vector with a scale of its own: number = scale * int8
    BINARY = "binary"  # a bit for each sign, 8 in a byte from the highest on, minus 128: as sentence-transformers
    UBINARY = "ubinary"  # the same bytes, without the 128


class EncodedRows(NamedTuple):
    """rows: (texts, numbers) of the wire's type, little endian. scales: (texts,) for int8, else None."""

    rows: NDArray[Any]
    scales: NDArray[np.float32] | None = None

    def tobytes(self) -> bytes:
        return self.rows.tobytes()


_FLOAT32 = np.dtype("<f4")


def encode_rows(values: NDArray[np.float32], encoding: Encoding) -> EncodedRows:
    """values: (texts, dimension)."""
    match encoding:
        case Encoding.FLOAT32:  # nearly always, so it is asked for first
            return EncodedRows(np.ascontiguousarray(values, _FLOAT32))
        case Encoding.FLOAT16:
            # float16 ends at 65,504: a larger number becomes that, not infinity.
            return EncodedRows(np.clip(values, -65504, 65504).astype("<f2"))
        case Encoding.INT8:
            scales = np.abs(values).max(axis=1).astype(np.float32) / np.float32(127)
            safe = np.where(scales > 0, scales, np.float32(1))
            return EncodedRows(np.rint(values / safe[:, None]).clip(-127, 127).astype(np.int8), scales)
        case Encoding.BINARY:
            return EncodedRows((np.packbits(values > 0, axis=1).astype(np.int16) - 128).astype(np.int8))
        case Encoding.UBINARY:
            return EncodedRows(np.packbits(values > 0, axis=1))


def bytes_per_vector(dimension: int, encoding: Encoding) -> int:
    if encoding is Encoding.FLOAT32:
        return 4 * dimension
    sizes = {Encoding.FLOAT16: 2 * dimension, Encoding.INT8: dimension + 4}
    return sizes.get(encoding, -(-dimension // 8))
