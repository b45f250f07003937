"""The fake backend measures the server's own cost and runs for days in tests of endurance: it must not grow."""

import tracemalloc

import pytest

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.backends.fake import FakeBackend
from ml_inference_server.utils.config import ModelSettings

BATCHES = 500


@pytest.mark.parametrize("keeps_log", [False, True])
def test_it_keeps_its_batches_only_when_asked(keeps_log: bool) -> None:
    backend = FakeBackend(ModelSettings(backend="fake"))
    backend.load_model()
    if keeps_log:
        backend.keep_log()
    batch = TokenBatch.of(backend.tokenizer.encode(["a text of some words"] * 8))
    for _ in range(BATCHES):  # Python keeps some freed tuples for later
        backend.infer(batch)
    tracemalloc.start()
    try:
        for _ in range(BATCHES):
            backend.infer(batch)
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(backend.log) == (2 * BATCHES if keeps_log else 0)
    assert (grown > BATCHES * 100) is keeps_log
