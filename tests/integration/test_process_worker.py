"""The engine in processes of its own: real processes round the fake backend, which crash, hang, raise and refuse."""

import asyncio
import gc
import math
import multiprocessing
import os
import signal
import struct
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from ml_inference_server.backends.base import Encoded, TokenBatch
from ml_inference_server.backends.fake import fake_embedding, fake_logit
from ml_inference_server.backends.startup.start import Described, start_backend
from ml_inference_server.metrics.system import SystemSampler
from ml_inference_server.server import process_worker
from ml_inference_server.server.call import Call
from ml_inference_server.server.engine_frames import FrameKind, pack_batch, pack_frame, unpack_batch
from ml_inference_server.server.engine_process import EngineDied, EngineProcess
from ml_inference_server.server.process_worker import ProcessWorker
from ml_inference_server.server.workers import ThreadWorker
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import BackendFailure, ModelError
from tests.conftest import RunningServer, free_ports, running, until


def settings(**model: object) -> Settings:
    sections = {
        "model": {"backend": "fake", "streams": 1, "process_per_stream": True, **model},
        "server": {"enable_test_faults": True, "hang_timeout_ms": 400},
    }
    return Settings.model_validate(free_ports(sections))


@asynccontextmanager
async def started(*, hang_timeout_s: float = 0.4, **model: object) -> AsyncIterator[tuple[Described, ProcessWorker]]:
    asked = settings(**model)
    worker = ProcessWorker(hang_timeout_s=hang_timeout_s, faults=True)
    described = await worker.start(asked.model, lambda text: None)
    try:
        yield described, worker
    finally:
        worker.close()
        await until(lambda: not worker.pids and not worker.engines)


def encode(described: Described, texts: Sequence[str]) -> TokenBatch:
    return TokenBatch.of(described.tokenizer.encode(texts))


def expected(texts: Sequence[str]) -> np.ndarray:
    return np.stack([fake_embedding(text) for text in texts])


@pytest.mark.parametrize("segments", [[None, None], [None, [0, 1]], [[0, 0, 1], [1, 1]]])
@pytest.mark.parametrize("variants", [[0, 0], [0, 2]])
def test_a_batch_travels_unchanged(segments: list[list[int] | None], variants: list[int]) -> None:
    batch = TokenBatch.of(
        [
            Encoded(np.array(ids, np.int32), None if types is None else np.array(types, np.int32), variant=variant)
            for ids, types, variant in zip([[5, 6, 7], [8, 9]], segments, variants, strict=True)
        ]
    )
    got = unpack_batch(pack_batch(batch))
    assert (got.ids.tolist(), got.starts.tolist()) == ([5, 6, 7, 8, 9], [0, 3, 5])
    types = [kind for each, length in zip(segments, (3, 2), strict=True) for kind in each or [0] * length]
    assert (None if got.type_ids is None else got.type_ids.tolist()) == (types if any(segments) else None)
    assert (None if got.variants is None else got.variants.tolist()) == (variants if any(variants) else None)
    arrays = [each for each in (got.ids, got.starts, got.type_ids, got.variants) if each is not None]
    assert all(each.flags.writeable for each in arrays)  # torch warns of others, on the server's standard error


async def test_the_other_processes_load_while_the_first_one_is_still_warmed_up_and_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = EngineProcess.start
    begun: list[EngineProcess] = []
    begun_before_ready: list[int] = []

    async def noted(self: EngineProcess, limit_s: float = math.inf) -> Described | None:
        begun.append(self)
        described = await start(self, limit_s)
        begun_before_ready.append(len(begun))
        return described

    monkeypatch.setattr(EngineProcess, "start", noted)
    async with started(streams=3) as (_, worker):
        assert len(worker.pids) == 3
    assert begun_before_ready[0] == 3


async def test_where_the_first_process_is_not_fit_the_others_that_had_begun_end_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = EngineProcess.start
    begun: list[EngineProcess] = []

    async def unfit(self: EngineProcess, limit_s: float = math.inf) -> Described | None:
        begun.append(self)
        described = await start(self, limit_s)
        if self is begun[0]:
            raise ModelError("too far from FP32")
        return described

    monkeypatch.setattr(EngineProcess, "start", unfit)
    with pytest.raises(ModelError, match="too far from FP32"):
        async with started(streams=3):
            pass
    assert len(begun) == 3
    for engine in begun[1:]:
        assert not engine.alive
    begun[0].kill()
    await until(lambda: not {engine.pid for engine in begun} & {child.pid for child in psutil.Process().children()})


async def test_each_stream_is_a_process_and_all_answer_right() -> None:
    async with started(streams=2) as (described, worker):
        assert (worker.slots, described.info.concurrency) == (2, 2)
        assert len(set(worker.pids)) == 2
        assert os.getpid() not in worker.pids
        batches = [[f"text {i} {j}" for j in range(i + 1)] for i in range(8)]
        outputs = await asyncio.gather(*(worker.run(encode(described, texts)) for texts in batches))
        for texts, output in zip(batches, outputs, strict=True):
            np.testing.assert_array_equal(output.rows, expected(texts))
            assert output.started_at <= output.ended_at <= asyncio.get_running_loop().time()


async def test_an_interactive_batch_runs_beside_a_bulk_one_in_the_same_process() -> None:
    async with started(hang_timeout_s=100) as (described, worker):
        assert worker.express_slots == 1
        bulk = asyncio.create_task(worker.run(encode(described, ["!slow:60000 long"]), is_bulk=True))
        await asyncio.sleep(0)
        output = await worker.run(encode(described, ["short"]))
        assert not bulk.done()
        np.testing.assert_array_equal(output.rows, expected(["short"]))
        bulk.cancel()
        await asyncio.wait([bulk])


async def test_batches_of_both_kinds_are_not_mixed_up() -> None:
    """One of each at a time, whatever is asked: the next one waits."""
    async with started(hang_timeout_s=100) as (described, worker):
        texts = [f"text {i}" for i in range(6)]
        outputs = await asyncio.gather(
            *(worker.run(encode(described, [text]), is_bulk=bool(i % 2)) for i, text in enumerate(texts))
        )
        np.testing.assert_array_equal(np.concatenate([each.rows for each in outputs]), expected(texts))
        assert worker.restarts == 0


async def test_both_batches_of_a_process_that_dies_are_told() -> None:
    async with started(hang_timeout_s=100) as (described, worker):
        bulk = asyncio.create_task(worker.run(encode(described, ["!slow:60000 long"]), is_bulk=True))
        await asyncio.sleep(0)
        with pytest.raises(EngineDied, match="SIGKILL"):
            await worker.run(encode(described, ["!crash"]))
        with pytest.raises(EngineDied, match="SIGKILL"):
            await bulk
        assert (await worker.run(encode(described, ["fine"]), is_bulk=True)).rows.shape == (1, 8)


@pytest.mark.skipif(sys.platform != "linux", reason="a priority for each thread is Linux's")
async def test_a_bulk_batch_gives_way() -> None:
    """One thread of the engine, and as many of a server with its engine in threads as it has streams."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    async with started() as (described, worker):
        await worker.run(encode(described, ["fine"]), is_bulk=True)
        assert sum(nice > ours for nice in _nice_of_threads(worker.pids[0])) == 1
    before = sum(nice > ours for nice in _nice_of_threads(os.getpid()))
    threads = ThreadWorker(
        start_backend(settings(streams=2, process_per_stream=False).model, lambda text: None).backend
    )
    await until(lambda: sum(nice > ours for nice in _nice_of_threads(os.getpid())) == before + 2)
    threads.close()


def _nice_of_threads(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int((task / "stat").read_text().rpartition(")")[2].split()[16]) for task in tasks]


async def test_pairs_of_a_cross_encoder_keep_their_segments() -> None:
    async with started(task="cross_encoder") as (described, worker):
        output = await worker.run(TokenBatch.of(described.tokenizer.encode_pairs([("a b", "c"), ("d", "e f g")])))
        assert output.rows[:, 0].tolist() == [fake_logit("a b", "c"), fake_logit("d", "e f g")]


async def test_a_batch_that_raises_costs_no_process() -> None:
    async with started() as (described, worker):
        before = list(worker.pids)
        with pytest.raises(RuntimeError, match="RuntimeError: fault word !raise"):
            await worker.run(encode(described, ["!raise"]))
        np.testing.assert_array_equal((await worker.run(encode(described, ["fine"]))).rows, expected(["fine"]))
        assert worker.pids == before
        assert worker.restarts == 0


@pytest.mark.parametrize(
    ("text", "message"), [("!crash", "signal SIGKILL"), ("!slow:60000", r"a batch ran for 0.4 s .*hang_timeout_ms")]
)
async def test_a_crash_or_a_hang_costs_its_process_and_a_new_one_answers(text: str, message: str) -> None:
    async with started() as (described, worker):
        before = list(worker.pids)
        with pytest.raises(EngineDied, match=message):
            await worker.run(encode(described, [text]))
        # Waits until the new process is there.
        np.testing.assert_array_equal((await worker.run(encode(described, ["fine"]))).rows, expected(["fine"]))
        assert set(worker.pids).isdisjoint(before)
        assert (worker.restarts, worker.trouble) == (1, "")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_an_idle_process_that_is_killed_is_noticed_and_one_that_is_stopped_is_ended_as_a_hang(
    how: signal.Signals,
) -> None:
    async with started() as (described, worker):
        os.kill(worker.pids[0], how)
        if how is signal.SIGKILL:
            await until(lambda: worker.restarts == 1)  # with no batch to find out
            assert "started again" in worker.trouble
        else:
            with pytest.raises(EngineDied, match="a batch ran for"):
                await worker.run(encode(described, ["fine"]))
        await worker.run(encode(described, ["fine"]))
        assert (worker.restarts, worker.trouble) == (1, "")


async def test_processes_that_have_ended_hold_no_descriptor_until_a_collection_of_garbage() -> None:
    ours = psutil.Process()
    async with started() as (described, worker):
        os.kill(worker.pids[0], signal.SIGKILL)
        await until(lambda: worker.restarts == 1)  # the thread that joins it is there now
        await worker.run(encode(described, ["fine"]))
        before = ours.num_fds()
        gc.disable()
        try:
            for number in range(2, 5):
                with pytest.raises(EngineDied):
                    await worker.run(encode(described, ["!crash"]))
                await worker.run(encode(described, ["fine"]))
                assert worker.restarts == number
            assert ours.num_fds() == before
        finally:
            gc.enable()


async def test_idle_processes_that_hang_are_found_and_replaced_before_anybody_asks_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_worker, "PING_EVERY_S", 0.05)
    async with started(streams=2) as (described, worker):
        before = list(worker.pids)
        os.kill(before[0], signal.SIGSTOP)
        os.kill(before[1], signal.SIGSTOP)
        await until(lambda: worker.restarts == 2)
        await until(lambda: len(worker.pids) == 2)
        assert set(worker.pids).isdisjoint(before)
        np.testing.assert_array_equal((await worker.run(encode(described, ["fine"]))).rows, expected(["fine"]))


async def test_processes_that_fail_on_everything_are_replaced() -> None:
    async with started(streams=2) as (described, worker):
        before = list(worker.pids)
        worker.renew()
        await until(lambda: worker.restarts == 2 and len(worker.pids) == 2)
        assert set(worker.pids).isdisjoint(before)
        np.testing.assert_array_equal((await worker.run(encode(described, ["fine"]))).rows, expected(["fine"]))


async def test_a_replacement_that_hangs_while_it_starts_is_ended_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_worker, "LEAST_START_LIMIT_S", 0.01)
    async with started() as (described, worker):
        first = multiprocessing.active_children()
        os.kill(worker.pids[0], signal.SIGKILL)
        await until(lambda: worker.restarts == 1)
        assert worker.stuck == ""  # calls wait for it
        await until(lambda: bool(set(multiprocessing.active_children()) - set(first)))
        (second,) = set(multiprocessing.active_children()) - set(first)
        second_pid = second.pid
        assert second_pid is not None
        os.kill(second_pid, signal.SIGSTOP)
        await until(lambda: worker.stuck != "")
        assert worker.stuck == "the engine cannot be started"
        np.testing.assert_array_equal((await worker.run(encode(described, ["fine"]))).rows, expected(["fine"]))
        assert (worker.stuck, worker.trouble) == ("", "")
        assert worker.pids[0] != second_pid


async def test_an_engine_is_not_ended_for_the_time_in_which_the_server_stood_still() -> None:
    """A whole server that is stopped for longer than a batch may run, and goes on."""
    asked = settings()
    worker = ProcessWorker(hang_timeout_s=0.4, faults=True)
    described = await worker.start(asked.model, lambda text: None)
    try:
        running = asyncio.create_task(worker.run(encode(described, ["!slow:100 a"])))
        await asyncio.sleep(0)
        time.sleep(1)  # noqa: ASYNC251 - nothing of this process goes on meanwhile
        assert (await running).rows.shape == (1, 8)
        assert worker.restarts == 0
    finally:
        worker.close()
        await until(lambda: not worker.pids and not worker.engines)


async def test_signals_for_the_whole_group_leave_the_processes_to_the_server() -> None:
    async with started() as (described, worker):
        for each in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pids[0], each)
        await worker.run(encode(described, ["fine"]))
        assert worker.restarts == 0


async def test_a_caller_that_leaves_does_not_get_the_next_ones_answer_mixed_up() -> None:
    async with started() as (described, worker):
        left = asyncio.create_task(worker.run(encode(described, ["!slow:300 gone"])))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
        np.testing.assert_array_equal((await worker.run(encode(described, ["fine"]))).rows, expected(["fine"]))


async def test_a_model_that_cannot_be_loaded_is_refused_with_its_own_words_and_leaves_nothing() -> None:
    worker = ProcessWorker(hang_timeout_s=1, faults=False)
    with pytest.raises(ModelError, match="expected fake:base_ms=NUMBER") as caught:
        await worker.start(settings(name="fake:nonsense").model, lambda text: None)
    assert caught.value.exit_code == 3
    await until(lambda: not multiprocessing.active_children())


ROWS_OF_ONE_TEXT = struct.pack("<IIdd8f", 1, 8, 0.0, 0.0, *[0.5] * 8)
BROKEN = {
    "noise": (b"\xff" * 64, "it sent what is no frame"),
    "a kind that is none": (pack_frame(200, 2, b""), "it sent what is no frame"),
    "an old answer": (pack_frame(FrameKind.ROWS, 1, ROWS_OF_ONE_TEXT), "it sent ROWS, for which nobody had asked"),
    "news of a start that is over": (
        pack_frame(FrameKind.LOADED, 0, b""),
        "it sent LOADED, for which nobody had asked",
    ),
    "an answer of no rows": (pack_frame(FrameKind.PONG, 2, b""), "its answer to a batch holds no rows"),
    "half an answer": (pack_frame(FrameKind.ROWS, 2, ROWS_OF_ONE_TEXT[:40]), "its answer to a batch holds no rows"),
}


@pytest.mark.parametrize("is_busy", [True, False])
@pytest.mark.parametrize(("sent", "says"), BROKEN.values(), ids=BROKEN)
async def test_a_process_that_sends_what_it_was_not_asked_is_ended_and_replaced(
    sent: bytes, says: str, is_busy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its answer would be another's. That it was ended is not taken for the kernel's way of saving memory."""
    async with started() as (described, worker):
        await worker.run(encode(described, ["the first question"]))
        (engine,) = worker.engines
        batch = asyncio.create_task(worker.run(encode(described, ["!slow:300 a"]))) if is_busy else None
        await asyncio.sleep(0)
        engine.reader.feed_data(sent)
        if batch is not None:
            with pytest.raises(EngineDied, match=says) as caught:
                await batch
            assert not caught.value.is_killed
        await until(lambda: worker.restarts == 1)
        np.testing.assert_array_equal((await worker.run(encode(described, ["fine"]))).rows, expected(["fine"]))
    if is_busy:
        assert says in caplog.text
    assert "SIGKILL" not in caplog.text


async def test_neighbours_of_a_text_that_crashes_the_engine_are_answered() -> None:
    async with running(RunningServer, settings(streams=2)) as server:
        service, worker = server.model.service, server.model.worker
        now = asyncio.get_running_loop().time()
        call = Call("test", received_at=now, deadline=now + 60)
        texts = ["one", "two", "!crash", "three"]
        outcomes = await asyncio.gather(*(service.embed([text], call) for text in texts), return_exceptions=True)
        for text, outcome in zip(texts, outcomes, strict=True):
            if text == "!crash":
                assert isinstance(outcome, BackendFailure)
            else:
                assert not isinstance(outcome, BaseException)
                np.testing.assert_array_equal(outcome.values, expected([text]))
        await until(lambda: server.state.readiness()[0])
        assert worker.restarts >= 2  # in the batch, or alone; and once more alone
        assert f"mlis_engine_restarts_total {worker.restarts}\n" in server.metrics.prometheus("")[0].decode()


async def test_memory_and_cpu_time_count_the_processes_and_the_cpu_time_never_falls() -> None:
    async with started() as (described, worker):
        sampler = SystemSampler(now_s=0)
        before_s = sampler.sample(now_s=0).cpu_seconds
        sampler.pids = lambda: worker.pids
        await worker.run(encode(described, ["fine"]))
        (pid,) = worker.pids
        engine = psutil.Process(pid)
        with_engine = sampler.sample(now_s=10)
        assert with_engine.rss_bytes > engine.memory_info().rss + psutil.Process().memory_info().rss / 2
        used_s = sum(engine.cpu_times()[:2])
        assert used_s > 0.1  # it has loaded; nothing of that belongs to the seconds since the last sample
        own_s = with_engine.cpu_seconds - used_s - before_s
        assert with_engine.cpu_percent == pytest.approx(100 * own_s / 10, abs=0.5)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: pid not in worker.pids)
        assert sampler.sample(now_s=20).cpu_seconds >= with_engine.cpu_seconds >= used_s


async def test_health_says_so_while_no_process_runs() -> None:
    async with running(RunningServer, settings()) as server:
        state = server.state
        assert state.readiness() == (True, "ready")
        os.kill(server.model.worker.pids[0], signal.SIGKILL)
        await until(lambda: not state.readiness()[0])
        assert state.readiness()[1] == "no process of the engine runs; it is being started again"
        await until(lambda: state.readiness()[0])
