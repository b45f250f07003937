"""Finished rows of texts that were computed before, bounded in bytes; the least recently used go first."""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import Encoded

TextKey = bytes | tuple[bytes, bytes | None, int]
"""All that an engine's answer depends on: the ids, the segments and the variant of a text. Other parts of an Encoded
(whether it was cut) say nothing of the answer. Exact, no digest: unequal texts never have the same one."""

BYTES_PER_MB = 1_000_000
# What Python keeps for an entry beside the numbers of its row and the ids of its key; measured in the tests.
ENTRY_OVERHEAD_BYTES = 400


def key_of(text: Encoded) -> TextKey:
    """The short form is for the plain text, which is nearly all of them."""
    if text.type_ids is None and not text.variant:
        return text.ids.tobytes()
    return text.ids.tobytes(), None if text.type_ids is None else text.type_ids.tobytes(), text.variant


class AnswerCache:
    """At most `max_bytes` of rows, keys and ENTRY_OVERHEAD_BYTES for each; `held_bytes` is what it has of that."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[TextKey, NDArray[np.float32]] = OrderedDict()
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: TextKey) -> NDArray[np.float32] | None:
        """The row, which cannot be written to: copy it."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def put(self, key: TextKey, row: NDArray[np.float32]) -> None:
        """Keep a copy of a sound row. One that is larger than the whole cache is not kept."""
        size = _entry_bytes(key, row)
        if size > self._max_bytes:
            return
        before = self._rows.pop(key, None)
        if before is not None:
            self.held_bytes -= _entry_bytes(key, before)
        kept = row.copy()
        kept.setflags(write=False)
        self._rows[key] = kept
        self.held_bytes += size
        while self.held_bytes > self._max_bytes:
            oldest, gone = self._rows.popitem(last=False)
            self.held_bytes -= _entry_bytes(oldest, gone)


def _entry_bytes(key: TextKey, row: NDArray[np.float32]) -> int:
    if isinstance(key, bytes):
        key_bytes = len(key)
    else:
        ids, types, _ = key
        key_bytes = len(ids) + len(types or b"")
    return row.nbytes + key_bytes + ENTRY_OVERHEAD_BYTES
