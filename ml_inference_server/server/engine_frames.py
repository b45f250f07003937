"""What the server and a process of the engine say to each other: frames over a socket pair.

A frame says what it is, which question it belongs to and how long it is; then comes the payload. A batch travels as the
arrays that it is. What is no frame, or answers a question that is not open, ends the process: from then on nobody could
tell which answer belongs to whom.
"""

import itertools
import socket
import struct
from enum import IntEnum
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.server.workers import Output

_MAGIC = b"MLE1"
_FRAME = struct.Struct("<4sBIQ")  # magic, kind, number of the question, bytes of the payload
FRAME_BYTES = _FRAME.size  # before the payload
NO_QUESTION, MOST_QUESTIONS = 0, 2**32 - 1
_RUN = struct.Struct("<I??xx")  # texts, whether segments follow the ids, and then variants
ROWS_HEAD = struct.Struct("<IIdd")  # rows, dimension, started_at, ended_at
# Far more than the largest batch has: a head that tells of more is none.
_MOST_PAYLOAD_BYTES = 2**36


class FrameKind(IntEnum):
    """What a frame holds."""

    PHASE = 1  # a sentence: what the start is busy with
    READY = 2  # a pickled Described
    REFUSED = 3  # the pickled error that ended the start
    RUN = 4  # a batch
    ROWS = 5
    RAISED = 6  # a sentence
    PING = 7  # are you there?
    PONG = 8
    RUN_BULK = 9  # a batch, beside those of RUN
    LOADED = 10  # a pickled Resolution: what runs, and could be loaded by others now


_KINDS = frozenset(FrameKind)


class BrokenFrame(ValueError):
    """What came is no frame, or no answer to the question that is open."""


def pack_frame(kind: int, question: int, payload: bytes) -> bytes:
    """question: the number of the one that it asks or answers; 0 for what the start says."""
    return _FRAME.pack(_MAGIC, kind, question, len(payload)) + payload


def frame_head(head: bytes) -> tuple[FrameKind, int, int]:
    """(kind, question, bytes of the payload). BrokenFrame where these bytes are the head of no frame."""
    magic, kind, question, length = _FRAME.unpack(head)
    if magic != _MAGIC or kind not in _KINDS or length > _MOST_PAYLOAD_BYTES:
        raise BrokenFrame("it sent what is no frame")
    return FrameKind(kind), question, length


def pack_batch(batch: TokenBatch) -> bytes:
    """`batch` as the payload of a frame."""
    parts = [_RUN.pack(len(batch), batch.type_ids is not None, batch.variants is not None), batch.starts.tobytes()]
    parts += [each.tobytes() for each in (batch.variants, batch.ids, batch.type_ids) if each is not None]
    return b"".join(parts)


def unpack_batch(payload: bytes | bytearray) -> TokenBatch:
    """What `pack_batch` packed; its arrays may be written to, as those of a batch that did not travel.

    ValueError where the payload has another length than the batch that it tells of.
    """
    if len(payload) < _RUN.size:
        raise ValueError("the payload is no batch")
    texts, has_types, has_variants = _RUN.unpack_from(payload)
    payload = bytearray(payload)
    ends = itertools.accumulate([_RUN.size, 8 * (texts + 1), 8 * texts * has_variants])
    starts_at, variants_at, ids_at = ends
    starts = np.frombuffer(payload, np.int64, texts + 1, starts_at)
    variants = np.frombuffer(payload, np.int64, texts, variants_at) if has_variants else None
    numbers = np.frombuffer(payload, np.int32, -1, ids_at)
    tokens = int(starts[-1])
    if tokens < 0 or len(numbers) != tokens * (1 + has_types):
        raise ValueError(f"{len(numbers)} numbers for a batch of {tokens} tokens")
    return TokenBatch(numbers[:tokens], starts, numbers[tokens:] if has_types else None, variants)


def unpack_rows(payload: bytes) -> Output:
    """What the child answered to a batch. ValueError where the payload has another length than its head tells."""
    if len(payload) < ROWS_HEAD.size:
        raise ValueError("the payload is no rows")
    count, dimension, started_at, ended_at = ROWS_HEAD.unpack_from(payload)
    rows: NDArray[np.float32] = np.frombuffer(payload, np.float32, offset=ROWS_HEAD.size).reshape(count, dimension)
    return Output(rows, started_at, ended_at)


def send_frame(connection: socket.socket, kind: FrameKind, payload: bytes, question: int = NO_QUESTION) -> None:
    """Over a socket that blocks."""
    connection.sendall(pack_frame(kind, question, payload))


def receive_frame(stream: BinaryIO) -> tuple[FrameKind, int, bytes]:
    """(kind, question, payload). EOFError at the end."""
    head = stream.read(FRAME_BYTES)
    if len(head) < FRAME_BYTES:
        raise EOFError
    kind, question, length = frame_head(head)
    return kind, question, stream.read(length)
