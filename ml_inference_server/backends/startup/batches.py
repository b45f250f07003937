"""Batches as the server would form them on a CPU, for trying and measuring an engine without a server."""

from collections.abc import Sequence

from ml_inference_server.backends.base import Encoded

BATCH_SIZE, BATCH_TOKENS = 32, 2048


def grouped_batches(
    rows: Sequence[Encoded], batch_size: int = BATCH_SIZE, batch_tokens: int = BATCH_TOKENS
) -> list[list[int]]:
    """Sorted by length, within the server's budgets on a CPU."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(rows)), key=lambda i: rows[i].length):
        full = len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * rows[index].length > batch_tokens
        if batches[-1] and full:
            batches.append([])
        batches[-1].append(index)
    return batches
