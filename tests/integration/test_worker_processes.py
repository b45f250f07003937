"""Several processes behind one port: real supervisors, real workers, real channels."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ml_inference_server.metrics.table import TABLE
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.utils.cores import claimed
from ml_inference_server.utils.errors import ConfigError
from tests.faults.restarts import service_config
from tests.integration.server_process import ServerProcess, run_to_end, server_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux spreads connections over processes")

# Tests of several sessions on one machine would claim the same CPUs.
TWO = ("--set", "server.workers=2", "--set", "server.pin_workers=false")


class Workers:
    """A server with workers that is ready."""

    def __init__(self, process: ServerProcess) -> None:
        self.process = process
        ports = process.ready()
        self.grpc_port, self.http_port, self.pid = ports["grpc_port"], ports["http_port"], ports["pid"]

    def get(self, path: str) -> Any:
        """Over a connection of its own, so that either of the workers may answer."""
        with self.open(path) as answer:
            body = answer.read()
        return body.decode() if path == "/metrics/prometheus" else json.loads(body)

    def open(self, path: str, body: bytes | None = None) -> Any:
        """The answer to a GET, or a POST of JSON."""
        url = f"http://127.0.0.1:{self.http_port}{path}"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=30)  # noqa: S310

    def series(self) -> dict[Any, float]:
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(self.get("/metrics/prometheus"))
            for sample in family.samples
        }

    def each(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = self.get("/info")["workers"]
        return workers

    @contextlib.contextmanager
    def stubs(self, count: int) -> Iterator[list[Any]]:
        """Each over a connection of its own, that is tried again where its worker ends."""
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.service_config", service_config(retries=True)),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        with contextlib.ExitStack() as stack:
            channels = [
                stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}", options=options))
                for _ in range(count)
            ]
            yield [rpc.InferenceServiceStub(channel) for channel in channels]

    def wait_until(self, condition: Any) -> None:
        """pytest's timeout is the limit."""
        while not condition():
            time.sleep(0.05)


@contextlib.contextmanager
def workers(tmp_path: Path, *extra: str) -> Iterator[Workers]:
    with server_process(tmp_path, *TWO, *extra) as process:
        yield Workers(process)


def answered_by(stub: Any, text: str = "a") -> str:
    """The first part of the id of the worker that answered."""
    _, call = stub.Embed.with_call(pb.EmbedRequest(texts=[text]), timeout=60)
    return str(dict(call.trailing_metadata())["request-id"]).partition("-")[0]


def test_all_serve_and_whoever_is_asked_tells_of_all(tmp_path: Path) -> None:
    with workers(tmp_path) as server, server.stubs(24) as stubs:
        by_worker = Counter(answered_by(stub) for stub in stubs for _ in range(5))
        told = server.each()
        assert {each["instance_id"][:8] for each in told} == set(by_worker), "the kernel spread 24 connections"
        assert [(each["index"], each["ready"], each["restarts"], each["cpus"]) for each in told] == [
            (0, True, 0, []),
            (1, True, 0, []),
        ]
        assert len({each["pid"] for each in told} | {server.pid}) == 3
        asked: set[str] = set()
        for stub in stubs:
            info = stub.GetServerInfo(pb.GetServerInfoRequest())
            asked.add(info.instance_id)
            assert [each.pid for each in info.workers] == [each["pid"] for each in told]
            assert stub.GetMetrics(pb.GetMetricsRequest()).requests_total == 120, "what was answered is counted"
        assert len(asked) == 2
        for _ in range(8):
            figures, series = server.get("/metrics"), server.series()
            assert figures["totals"]["by_method_and_code"]["Embed"] == {"OK": 120}
            assert figures["queue"]["batch_slots"] == sum(info.resolved.concurrency for _ in told)
            assert [each["pid"] for each in figures["workers"]] == [each["pid"] for each in told]
            assert series["mlis_requests_total", (("code", "OK"), ("method", "Embed"))] == 120
            assert series["mlis_request_duration_seconds_count", (("method", "Embed"), ("outcome", "ok"))] == 120
            assert (series["mlis_workers", ()], series["mlis_worker_restarts_total", ()]) == (2, 0)
        assert {server.get("/info")["pid"] for _ in range(16)} == {each["pid"] for each in told}
        assert server.get("/readyz") == {"ready": True, "reason": "ready"}
        assert server.get("/api/v1/live")["figures"]["totals"]["requests"] <= 120
        columns = server.get("/api/v1/history")["columns"]
        server.wait_until(
            lambda: (
                sum(row[columns.index("requests_per_s")] or 0 for row in server.get("/api/v1/history")["fine"]["rows"])
                > 0
            )
        )
        server.process.signal(signal.SIGTERM)
        code, stderr = server.process.end()
    assert code == 0, stderr
    assert not server.process.ready_file.exists()
    assert all(f"worker {index}: stopped" in stderr for index in (0, 1))


def test_a_page_gets_the_figures_of_all_and_its_benchmark_is_known_to_all(tmp_path: Path) -> None:
    with workers(tmp_path) as server, server.stubs(8) as stubs:
        for stub in stubs:
            answered_by(stub)
        progress = {"name": "b", "row": 1, "rows": 2, "label": "l", "done": 0.5, "eta_s": None, "finished": False}
        with server.open("/api/v1/benchmark", json.dumps(progress).encode()) as answer:
            assert answer.status == 204
        assert all(server.get("/metrics")["benchmark"]["name"] == "b" for _ in range(8))
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.open("/api/v1/benchmark", b'{"row": 0}')
        assert refused.value.code == 400
        refused.value.close()
        with server.open("/api/v1/stream") as stream:
            seen = 0
            while seen < 8:  # the tick after the calls
                line = stream.readline().decode()
                if line.startswith("data: "):
                    seen = json.loads(line.removeprefix("data: "))["figures"]["totals"]["requests"]
        assert seen == 8


async def call_until(stubs: Sequence[Any], is_over: asyncio.Event, ends: Counter[str]) -> None:
    """Calls without pause over all of them, in threads."""

    def calls(stub: Any) -> None:
        while not is_over.is_set():
            try:
                answered_by(stub)
            except grpc.RpcError as error:
                ends[error.code().name] += 1
            else:
                ends["OK"] += 1

    await asyncio.gather(*(asyncio.to_thread(calls, stub) for stub in stubs))


@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "signal SIGKILL"), (signal.SIGTERM, "exit code 0")])
async def test_one_that_ends_comes_back_and_costs_no_call_that_is_repeated(
    tmp_path: Path, number: signal.Signals, said: str
) -> None:
    """While it is away the others answer, and no counter falls."""
    counters = {row.name for row in TABLE if row.kind == "counter"}
    server_of = workers(tmp_path)
    with server_of as server, server.stubs(4) as stubs:
        before = server.each()
        ends: Counter[str] = Counter()
        is_over = asyncio.Event()
        calling = asyncio.create_task(call_until(stubs, is_over, ends))

        def watch() -> None:
            last: dict[Any, float] = {}
            seen_away = False
            os.kill(before[0]["pid"], number)
            while True:
                try:
                    now = server.series()
                except OSError:  # the one that is killed was about to answer
                    continue
                fallen = {key: (value, now[key]) for key, value in last.items() if now[key] < value}
                assert {key: each for key, each in fallen.items() if key[0] in counters} == {}
                last = now
                seen_away |= now["mlis_workers", ()] == 1
                if now["mlis_worker_restarts_total", ()] == 1 and now["mlis_workers", ()] == 2:
                    assert seen_away
                    return

        try:
            await asyncio.to_thread(server.wait_until, lambda: ends["OK"] > 50)
            await asyncio.to_thread(watch)
        finally:
            is_over.set()
            await calling
        after = server.each()
        assert (after[1]["pid"], after[0]["pid"] != before[0]["pid"]) == (before[1]["pid"], True)
        assert (after[0]["restarts"], after[1]["restarts"]) == (1, 0)
        assert set(ends) == {"OK"}
        server.process.signal(signal.SIGTERM)
        code, stderr = server.process.end()
    assert code == 0, stderr
    assert f"worker 0 ended ({said}): starting it again in 1 s" in stderr


def test_a_stop_finishes_what_every_worker_has_taken_in(tmp_path: Path) -> None:
    slow = ("--model-name", "fake:base_ms=1500")
    with workers(tmp_path, *slow) as server, server.stubs(12) as stubs:
        running = [stub.Embed.future(pb.EmbedRequest(texts=["a"]), timeout=60) for stub in stubs]
        server.wait_until(lambda: server.get("/metrics")["in_flight"]["Embed"] == 12)
        server.process.signal(signal.SIGTERM)
        assert [call.result().count for call in running] == [1] * 12
        code, stderr = server.process.end()
    assert code == 0, stderr


def test_workers_whose_supervisor_is_killed_end_by_themselves(tmp_path: Path) -> None:
    with workers(tmp_path) as server:
        processes = [psutil.Process(each["pid"]) for each in server.each()]
        server.process.signal(signal.SIGKILL)
        assert psutil.wait_procs(processes, timeout=60)[1] == []


def test_each_has_cpus_of_its_own_and_another_server_is_refused(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("this process may use one CPU only")
    with server_process(tmp_path, "--set", "server.workers=2") as process:
        server = Workers(process)
        told = server.each()
        own = [set(each["cpus"]) for each in told]
        assert (own[0] & own[1], own[0] | own[1]) == (set(), allowed)
        assert [set(psutil.Process(each["pid"]).cpu_affinity()) for each in told] == own
        threads = [thread.id for each in told for thread in psutil.Process(each["pid"]).threads()]
        assert {len(os.sched_getaffinity(thread)) for thread in threads} <= {len(each) for each in own}
        code, line = run_to_end("--set", "server.workers=2")
        assert (code, "another server with server.workers has CPUs" in line) == (2, True), line
        # One process shares them, as it always did, and so do workers that ask for none of their own.
        with workers(_folder(tmp_path, "other")):
            pass


def _folder(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def test_what_cannot_start_is_refused_in_a_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        for flag in ("--port", "--http-port"):
            code, line = run_to_end(*TWO, flag, str(port))
            assert (code, line.startswith(f"error: port {port} on 127.0.0.1 is in use")) == (4, True), line
    code, line = run_to_end(*TWO, "--model-name", "fake:nonsense")
    assert code == 3
    many = len(os.sched_getaffinity(0)) + 1
    code, line = run_to_end("--set", f"server.workers={many}")
    assert (code, line.startswith(f"error: server.workers is {many}, but this process may use")) == (2, True), line


def test_a_second_server_gets_no_part_of_the_port(tmp_path: Path) -> None:
    """Not even where it, too, has workers, and the first one is still loading."""
    with server_process(tmp_path, *TWO) as process:
        server = Workers(process)
        for asked in (TWO, ()):
            code, line = run_to_end(*asked, "--port", str(server.grpc_port))
            assert (code, "is in use" in line) == (4, True), line


def test_none_of_the_cpus_are_claimed_by_a_server_of_one_process(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    with server_process(tmp_path) as process:
        process.ready()
        try:
            with claimed(allowed):
                pass
        except ConfigError as error:
            pytest.fail(f"another session's server, or this one: {error}")
