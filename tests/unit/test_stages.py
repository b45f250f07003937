"""One table of stages: wire, metrics, page, report and documents say the same of the same request."""

import asyncio
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import ml_inference_server
from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.backends.fake import FakeBackend
from ml_inference_server.backends.startup.resolve import resolve
from ml_inference_server.backends.startup.start import Described
from ml_inference_server.metrics.live import Live
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.server.call import Call
from ml_inference_server.server.calls import Calls
from ml_inference_server.server.ready_model import assemble
from ml_inference_server.server.rpc.method_handlers import MethodHandlers
from ml_inference_server.server.rpc.native import NativeServicer
from ml_inference_server.server.state import ServerState
from ml_inference_server.server.workers import Output
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.stages import STAGES, WIRE_TOTAL
from tests.conftest import virtual_time

PACKAGE = Path(ml_inference_server.__file__).parent


def text_of(*parts: str) -> str:
    return PACKAGE.joinpath(*parts).read_text(encoding="utf-8")


class SlowWorker:
    """The fake backend; each batch takes a second of the virtual clock, and waits another before it starts."""

    pids: Sequence[int] = ()
    restarts = 0
    trouble = stuck = lost = ""
    slots = 1
    express_slots = 0

    def __init__(self, backend: FakeBackend) -> None:
        self.backend = backend

    async def run(self, batch: TokenBatch, limit_s: float = math.inf, *, is_bulk: bool = False) -> Output:
        await asyncio.sleep(1)
        started_at = asyncio.get_running_loop().time()
        rows = self.backend.infer(batch)
        await asyncio.sleep(1)
        return Output(rows, started_at, asyncio.get_running_loop().time())

    def renew(self) -> None:
        pass

    def close(self) -> None:
        pass


@virtual_time
async def test_of_a_request_in_two_batches_wire_and_metrics_say_the_same() -> None:
    """Its first batch starts after one second; its second one ends three seconds later."""
    settings = Settings.model_validate({"model": {"backend": "fake"}, "batching": {"max_batch_size": 1}})
    resolution = resolve(settings.model)
    backend = FakeBackend(resolution.model)
    backend.load_model()
    loop = asyncio.get_running_loop()
    state, metrics = ServerState(settings), Metrics(window_s=30, clock=loop.time)
    described = Described(resolution=resolution, info=backend.info, tokenizer=backend.tokenizer)
    state.model = assemble(settings, described, SlowWorker(backend), metrics)
    handlers = MethodHandlers(Calls(metrics, default_timeout_s=60, prefix="test"))
    servicer = NativeServicer(state, Live(metrics, state.as_dict, state.readiness), handlers)
    call = Call("test", received_at=loop.time(), deadline=loop.time() + 60)
    with handlers.observe("Embed", call) as request:
        request.reply = reply = await servicer.embed(pb.EmbedRequest(texts=["one", "two"]), request.call)
    state.model.close()
    timing = reply.message.timing
    assert (timing.tokenize_us, timing.queue_us, timing.compute_us, timing.total_us) == (0, 1e6, 3e6, 4e6)
    shown = metrics.snapshot()["stages_ms"]
    other = {"receive": 0, "tokenize": 0, "scatter": 0, "reply": 0, "other": 0}
    assert shown == pytest.approx({**other, "queue": 1e3, "engine": 3e3, "total": 4e3}, abs=1e-3)
    np.testing.assert_array_equal(np.frombuffer(reply.message.embeddings, "<f4").shape, (2 * backend.info.dimension,))


def test_the_page_shows_the_table() -> None:
    shown = re.findall(r'^  \["(\w+)", "\w+", "(.+)"\],$', text_of("metrics", "dashboard", "bars.js"), re.M)
    assert shown == [*((stage.name, stage.meaning) for stage in STAGES), ("other", "no stage accounts for it")]


def test_the_wire_has_the_fields_of_the_table_with_its_meanings() -> None:
    message = text_of("proto", "inference.proto").split("message Timing {")[1].split("}")[0]
    fields = re.findall(r"^  uint64 (\w+) = \d; +// (?:stage )?(\w+): (.+)$", message, re.M)
    wire = [stage for stage in (*STAGES, WIRE_TOTAL) if stage.wire]
    assert fields == [(stage.wire, stage.name, stage.meaning) for stage in wire]
    counts = {"shared_texts", "cached_texts"}
    assert {name for name, _, _ in fields} | counts == set(pb.Timing.DESCRIPTOR.fields_by_name)


def test_the_documents_describe_the_table() -> None:
    document = text_of("docs", "metrics.md")
    rows = re.findall(r"^\| `stages_ms\.(\w+)` \| ms \| (.+) \|$", document, re.M)
    assert rows[: len(STAGES)] == [(stage.name, stage.meaning) for stage in STAGES]
    for stage in STAGES:
        if stage.wire:
            assert f"`{stage.name}` as `{stage.wire}`" in document
