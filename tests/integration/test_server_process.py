"""The server as a process: how it starts, how it refuses to start, how it stops."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import aiohttp
import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from tests.conftest import refusal
from tests.integration.server_process import run_to_end, server_process

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_it_starts_on_free_ports_serves_and_stops_with_0(tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        ports = server.ready()
        assert ports["pid"] == server.process.pid
        with urllib.request.urlopen(f"http://127.0.0.1:{ports['http_port']}/info") as reply:
            assert json.load(reply)["resolved"]["backend"] == "fake"
        with grpc.insecure_channel(f"127.0.0.1:{ports['grpc_port']}") as channel:
            reply = rpc.InferenceServiceStub(channel).Embed(pb.EmbedRequest(texts=["a"]))
            assert reply.count == 1
        server.signal(signal.SIGTERM)
        code, _ = server.end()
        assert code == 0
        assert not server.ready_file.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="scheduling policies of threads are Linux's")
def test_only_the_threads_of_sockets_wait_their_turn(tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        ports = server.ready()
        with grpc.insecure_channel(f"127.0.0.1:{ports['grpc_port']}") as channel:
            rpc.InferenceServiceStub(channel).Embed(pb.EmbedRequest(texts=["a"]))
        waiting: dict[str, set[bool]] = {}
        for task in Path(f"/proc/{ports['pid']}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
                name = (task / "comm").read_text().strip()
                waiting.setdefault(name, set()).add(os.sched_getscheduler(int(task.name)) == os.SCHED_BATCH)
    assert waiting.pop("event_engine") == {True}
    grpcs_own = {"grpc_global_tim", "lifeguard"}
    assert {name for name, found in waiting.items() if True in found} <= grpcs_own


BAD_STARTS: list[tuple[str, list[str], int, str]] = [
    ("unknown key", ["--set", "batching.max_batchsize=4"], 2, "did you mean batching.max_batch_size?"),
    ("wrong type", ["--set", "batching.max_batch_size=many"], 2, "batching.max_batch_size: input should be"),
    ("no value", ["--set", "batching.max_batch_size"], 2, "expected key.path=value"),
    ("missing file", ["--experiment", "no/such/minilm.yaml"], 2, "no such file"),
    ("no variant", ["--variant", "fast"], 2, "no variant 'fast'"),
    ("token budget below one text", ["--set", "batching.max_batch_tokens=100"], 2, "lower model.max_tokens"),
    ("faults on a real model", ["--set", "model.backend=pytorch", "--set", "server.enable_test_faults=true"], 2,
     "fake only"),
    ("bad host", ["--host", "203.0.113.7"], 2, "not an address of this machine"),
    ("unwritable ready file", ["--ready-file", "/proc/nowhere/ready", "--device", "mps"], 2, "--ready-file"),
    ("device as ready file", ["--ready-file", "/dev/null", "--device", "mps"], 2, "this is a device"),
    ("unknown backend", ["--set", "model.backend=onxx"], 3, "there is no backend 'onxx'"),
    ("missing device", ["--device", "mps"], 3, "allow_fallback: true"),
    ("missing precision", ["--set", "model.quantized=true", "--set", "model.quantization=int8"], 3, "int8 is not"),
    ("unknown model", ["--set", "model.backend=pytorch", "--model-name", "nobody/nothing"], 3, "was not found. Tried"),
    ("token limit too high", ["--set", "model.backend=pytorch", "--set", "model.max_tokens=9999"], 3, "at most 256"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "extra", "code", "says"), BAD_STARTS, ids=[row[0] for row in BAD_STARTS])
def test_a_bad_start_ends_with_its_code_and_one_clear_line(name: str, extra: list[str], code: int, says: str) -> None:
    got, line = run_to_end(*extra)
    assert (got, line.startswith("error: ")) == (code, True), line
    assert says in line


@pytest.mark.parametrize("flag", ["--port", "--http-port"])
def test_a_taken_port_is_named_before_the_model_is_loaded(flag: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        code, line = run_to_end(flag, str(port), "--set", "model.backend=no-such-backend")
    assert code == 4
    assert f"port {port}" in line
    assert f"{flag} 0" in line


def test_a_second_server_cannot_take_the_first_ones_port(tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        code, line = run_to_end("--port", str(server.ready()["grpc_port"]))
    assert (code, "in use" in line) == (4, True)


def test_the_environment_sets_what_no_flag_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLIS_BATCHING__MAX_BATCH_SIZE", "3")
    monkeypatch.setenv("MLIS_METRICS__PORT", "50051")  # the flag wins
    with server_process(tmp_path) as server:
        url = f"http://127.0.0.1:{server.ready()['http_port']}/info"
        with urllib.request.urlopen(url, timeout=10) as reply:
            assert json.load(reply)["settings"]["batching"]["max_batch_size"] == 3
        server.signal(signal.SIGTERM)
        _, stderr = server.end()
    assert "from the environment: MLIS_BATCHING__MAX_BATCH_SIZE=3, MLIS_METRICS__PORT=50051" in stderr
    monkeypatch.setenv("MLIS_SERVER__DRAIN_TIMEOUT", "1")
    code, line = run_to_end()
    assert code == 2
    assert line.startswith("error: MLIS_SERVER__DRAIN_TIMEOUT=1: unknown key server.drain_timeout; did you mean")


def test_the_legacy_configuration_loads_and_says_that_it_is_deprecated(tmp_path: Path) -> None:
    legacy = tmp_path / "config.yaml"
    legacy.write_text("model:\n  backend: fake\n")
    with server_process(tmp_path, "--config", str(legacy)) as server:
        server.ready()
        server.signal(signal.SIGTERM)
        code, stderr = server.end()
    assert code == 0
    assert "--config is deprecated" in stderr


def test_ctrl_c_finishes_the_work_and_exits_130(tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        server.ready()
        server.signal(signal.SIGINT)
        code, stderr = server.end()
    assert code == 130
    assert "press Ctrl-C again" in stderr


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    async def check() -> None:
        with server_process(tmp_path, "--set", "server.enable_test_faults=true") as server:
            port = server.ready()["grpc_port"]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = rpc.InferenceServiceStub(channel)
                call = asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=["!slow:20000"])))
                await until_busy(server.ready()["http_port"])
                server.signal(signal.SIGINT)
                await health_is(channel, NOT_SERVING)
                server.signal(signal.SIGINT)
                code, _ = await asyncio.to_thread(server.end)
                assert code == 130
                with pytest.raises(grpc.aio.AioRpcError):
                    await call

    asyncio.run(check())


async def until_busy(http_port: int) -> None:
    def busy() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/metrics") as reply:
            return bool(json.load(reply)["queue"]["batches_in_flight"])

    while not await asyncio.to_thread(busy):  # noqa: ASYNC110 - the state of another process
        await asyncio.sleep(0.01)


async def health_is(channel: grpc.aio.Channel, wanted: int) -> None:
    async for reply in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
        if reply.status == wanted:
            return


@pytest.mark.parametrize("clients", [8])
def test_sigterm_under_load_loses_nothing_that_was_accepted(tmp_path: Path, clients: int) -> None:
    """Each call ends with its answer or with UNAVAILABLE (safe to retry); health turns before the first refusal."""

    async def check() -> None:
        with server_process(tmp_path, "--model-name", "fake:base_ms=5") as server:
            port = server.ready()["grpc_port"]
            events: list[str] = []
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = rpc.InferenceServiceStub(channel)
                watcher = asyncio.create_task(health_is(channel, NOT_SERVING))
                watcher.add_done_callback(lambda _: events.append("NOT_SERVING"))
                answered = 0

                async def client(number: int) -> None:
                    nonlocal answered
                    for i in range(100_000):
                        try:
                            await stub.Embed(pb.EmbedRequest(texts=[f"{number} {i}"]))
                        except grpc.aio.AioRpcError as error:
                            events.append(error.code().name)
                            return
                        answered += 1
                        if answered == 50:
                            server.signal(signal.SIGTERM)

                await asyncio.gather(*(client(n) for n in range(clients)))
                code, stderr = await asyncio.to_thread(server.end)
            assert code == 0, stderr
            assert answered >= 50
            assert events[0] == "NOT_SERVING"
            assert set(events[1:]) == {"UNAVAILABLE"}
            assert "answered with UNAVAILABLE" not in stderr

    asyncio.run(check())


def test_sigterm_under_http_load_cuts_no_call_off(tmp_path: Path) -> None:
    """Every call of a connection that is kept ends with its answer, or with 503; later ones find the port closed."""

    async def check() -> None:
        with server_process(tmp_path, "--model-name", "fake:base_ms=5") as server:
            url = f"http://127.0.0.1:{server.ready()['http_port']}/embed"
            answered = 0
            ends: list[int | str] = []

            async def client(session: aiohttp.ClientSession) -> None:
                nonlocal answered
                for number in range(100_000):
                    try:
                        async with session.post(url, json={"inputs": f"text {number}"}) as answer:
                            await answer.read()
                    except aiohttp.ClientConnectorError:
                        ends.append("refused")
                        return
                    if answer.status != 200:
                        assert answer.headers["Connection"] == "close"
                        ends.append(answer.status)
                        return
                    answered += 1
                    if answered == 50:
                        server.signal(signal.SIGTERM)

            async with aiohttp.ClientSession() as session:
                await asyncio.gather(*(client(session) for _ in range(16)))
            code, stderr = await asyncio.to_thread(server.end)
            assert code == 0, stderr
            assert answered >= 50
            assert set(ends) <= {503, "refused"}

    asyncio.run(check())


def test_a_drain_that_takes_too_long_answers_the_rest_and_exits_5(tmp_path: Path) -> None:
    async def check() -> None:
        slow = ("--set", "server.enable_test_faults=true", "--set", "server.drain_timeout_ms=100")
        with server_process(tmp_path, *slow) as server:
            ports = server.ready()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['grpc_port']}") as channel:
                call = rpc.InferenceServiceStub(channel).Embed(pb.EmbedRequest(texts=["!slow:20000"]))
                pending = asyncio.ensure_future(call)
                await until_busy(ports["http_port"])
                server.signal(signal.SIGTERM)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await pending
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            code, stderr = await asyncio.to_thread(server.end)
            assert code == 5
            assert "1 requests are answered with UNAVAILABLE" in stderr

    asyncio.run(check())


def test_a_hanging_batch_turns_health_and_readiness(tmp_path: Path) -> None:
    async def check() -> None:
        hang = ("--set", "server.enable_test_faults=true", "--set", "server.hang_timeout_ms=100")
        with server_process(tmp_path, *hang) as server:
            port = server.ready()["grpc_port"]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = rpc.InferenceServiceStub(channel).Embed(pb.EmbedRequest(texts=["!slow:2000"]))
                await health_is(channel, NOT_SERVING)
                assert not call.done()
                await call
                await health_is(channel, health_pb2.HealthCheckResponse.SERVING)

    asyncio.run(check())


def test_an_engine_that_hangs_in_a_thread_ends_the_process_after_health_said_so(tmp_path: Path) -> None:
    """New calls are refused at once meanwhile, and who waits is told in the end that he may repeat it."""

    async def check() -> None:
        hang = ("--set", "server.enable_test_faults=true", "--set", "server.hang_timeout_ms=200")
        with server_process(tmp_path, *hang, "--set", "model.streams=1") as server:
            port = server.ready()["grpc_port"]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = rpc.InferenceServiceStub(channel)
                hanging = asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=["!hang"])))
                await health_is(channel, NOT_SERVING)
                refused = await refusal(stub.Embed(pb.EmbedRequest(texts=["a"])))
                assert refused.code() is grpc.StatusCode.UNAVAILABLE
                assert "the engine does not answer" in (refused.details() or "")
                assert (await refusal(hanging)).code() is grpc.StatusCode.UNAVAILABLE
            code, stderr = await asyncio.to_thread(server.end)
        assert code == 6
        assert "a batch hangs in a thread, which cannot be ended: this process ends with exit code 6" in stderr
        assert not server.ready_file.exists()

    asyncio.run(check())


def test_an_engine_that_is_killed_is_replaced_and_the_server_goes_on(tmp_path: Path) -> None:
    with server_process(tmp_path, "--set", "model.process_per_stream=true", "--set", "model.streams=1") as server:
        ports = server.ready()
        children = psutil.Process(ports["pid"]).children()
        (engine,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        with grpc.insecure_channel(f"127.0.0.1:{ports['grpc_port']}") as channel:
            stub = rpc.InferenceServiceStub(channel)
            before = stub.Embed(pb.EmbedRequest(texts=["a"]))
            engine.kill()
            # Sent while there is none: it waits for the new one.
            assert stub.Embed(pb.EmbedRequest(texts=["a"])).embeddings == before.embeddings
        server.signal(signal.SIGTERM)
        assert server.end()[0] == 0


def test_a_model_that_always_fails_turns_health_until_a_probe_succeeds(tmp_path: Path) -> None:
    """A cache that has the probe's text does not stand in for the model."""

    async def check() -> None:
        settings = ("--set", "server.enable_test_faults=true", "--set", "cache.max_mb=1")
        with server_process(tmp_path, *settings) as server:
            port = server.ready()["grpc_port"]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = rpc.InferenceServiceStub(channel)
                await stub.Embed(pb.EmbedRequest(texts=["health probe"]))
                for _ in range(3):
                    with pytest.raises(grpc.aio.AioRpcError):
                        await stub.Embed(pb.EmbedRequest(texts=["!raise"]))
                await health_is(channel, NOT_SERVING)
                await health_is(channel, health_pb2.HealthCheckResponse.SERVING)

    asyncio.run(check())


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_loading_ends_it_at_once(tmp_path: Path, number: signal.Signals, expected: int) -> None:
    """The real model takes seconds to load; the port is open meanwhile and says NOT_SERVING."""
    with server_process(tmp_path, "--set", "model.backend=pytorch") as server:
        wait_for_line(server.process, lambda line: "dashboard and metrics on" in line)
        server.signal(number)
        code, _ = server.end()
    assert code == expected


@pytest.mark.parametrize("engines", ["false", "true"])
def test_a_hang_up_finishes_the_work_as_sigterm_does(tmp_path: Path, engines: str) -> None:
    """The whole group gets it when a terminal closes, the engines' processes, too."""

    async def check() -> None:
        faults = ("--set", "server.enable_test_faults=true", "--set", f"model.process_per_stream={engines}")
        with server_process(tmp_path, *faults) as server:
            ports = server.ready()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['grpc_port']}") as channel:
                stub = rpc.InferenceServiceStub(channel)
                call = asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=["!slow:300"])))
                await until_busy(ports["http_port"])
                os.killpg(server.process.pid, signal.SIGHUP)
                assert (await call).count == 1
            code, stderr = await asyncio.to_thread(server.end)
        assert code == 0, stderr

    asyncio.run(check())


def test_what_nohup_started_stays_when_the_terminal_goes(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # children inherit it
    try:
        with server_process(tmp_path) as server:
            ports = server.ready()
            server.signal(signal.SIGHUP)
            with grpc.insecure_channel(f"127.0.0.1:{ports['grpc_port']}") as channel:
                assert rpc.InferenceServiceStub(channel).Embed(pb.EmbedRequest(texts=["a"])).count == 1
            server.signal(signal.SIGTERM)
            assert server.end()[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_closed_standard_streams_change_nothing(tmp_path: Path, closed: tuple[int, ...]) -> None:
    with server_process(tmp_path, closed=closed) as server:
        ports = server.ready()
        streams = {number: str(Path(f"/proc/{ports['pid']}/fd/{number}").readlink()) for number in closed}
        assert set(streams.values()) == {os.devnull}, "else a socket takes the number, and libraries print into it"
        server.signal(signal.SIGTERM)
        assert server.end()[0] == 0


LIMITS = [
    ("files", resource.RLIMIT_NOFILE, 20, "only 20 files may be open at once, and 128 are needed"),
    ("a third of the address space", resource.RLIMIT_AS, 400 << 20, "limited to 400 MiB, and 1024 MiB are needed"),
]


@pytest.mark.parametrize(("name", "kind", "limit", "says"), LIMITS, ids=[row[0] for row in LIMITS])
def test_a_limit_that_is_too_low_is_named_with_its_remedy(name: str, kind: int, limit: int, says: str) -> None:
    code, line = run_to_end(preexec=lambda: resource.setrlimit(kind, (limit, limit)))
    assert (code, line.startswith("error: ")) == (2, True), line
    assert says in line
    assert "ulimit -" in line


def test_an_engine_that_finds_too_little_memory_is_no_bug_of_the_program() -> None:
    """Enough for the server, too little for PyTorch, whose libraries would crash, or wait for ever."""
    limit = 1300 << 20
    code, line = run_to_end(
        "--set", "model.backend=pytorch", preexec=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    )
    assert code == 2, line
    assert "and 3072 MiB are needed" in line


def test_no_end_leaves_the_stand_in_of_the_cache_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    (tmp_path / "a file").touch()
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "a file"))
    monkeypatch.setenv("TMPDIR", str(temporary))

    def left() -> list[Path]:
        return list(temporary.glob("mlis-*"))

    code, _ = run_to_end("--set", "model.backend=no-such-backend")
    assert (code, left()) == (3, [])
    for signals, expected in (([signal.SIGTERM], 0), ([signal.SIGINT], 130)):
        with server_process(tmp_path) as server:
            server.ready()
            assert len(left()) == 1
            for number in signals:
                server.signal(number)
            assert (server.end()[0], left()) == (expected, [])
            server.ready_file.unlink(missing_ok=True)


def wait_for_line(process: subprocess.Popen[str], wanted: Callable[[str], bool]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if wanted(line):
            return
    pytest.fail("the process ended before the line came")


def test_exit_with_parent_leaves_no_orphan(tmp_path: Path) -> None:
    """A middle process starts the server and is killed; the server notices and goes."""
    import sys
    import time

    from tests.integration.server_process import ROOT, arguments

    ready = tmp_path / "ready.json"
    command = arguments("--set", "model.backend=fake", "--exit-with-parent", "--ready-file", str(ready))
    middle = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, time; subprocess.Popen({command!r}); time.sleep(600)"], cwd=ROOT
    )
    while not ready.exists():
        assert middle.poll() is None
        time.sleep(0.01)
    middle.kill()
    middle.wait()
    while ready.exists():  # removed at a clean stop; pytest's timeout is the limit
        time.sleep(0.01)
