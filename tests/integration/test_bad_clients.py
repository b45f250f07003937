"""Clients that leave, cut off or send noise cost the operator no line of log, and their neighbours nothing."""

import asyncio
import re
import signal
import socket
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.server.rpc.native import SERVICE
from tests.conftest import raw, refusal
from tests.integration.server_process import ROOT, ServerProcess, server_process

CLIENTS = 5
# Prints a line once its stream is under way, and goes on for ever.
STREAMING_CLIENT = """
import itertools, sys
import grpc
from ml_inference_server.proto import inference_pb2 as pb, inference_pb2_grpc as rpc
texts = (pb.EmbedStreamRequest(id=i, request=pb.EmbedRequest(texts=[f"text {i}"])) for i in itertools.count())
with grpc.insecure_channel(sys.argv[1]) as channel:
    for reply in rpc.InferenceServiceStub(channel).EmbedStream(texts):
        if reply.id == 50:
            print("under way", flush=True)
"""
NOISE = (b"\xff" * 20, b"\x0a\x02\xff\xfe", b"\x0a\x05ab")
LIBRARY_METHODS = (
    "grpc.health.v1.Health/Check",
    "grpc.health.v1.Health/Watch",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
POST = b"POST /api/v1/benchmark HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CUT_OFF = {
    "body": POST + b'Content-Length: 500\r\n\r\n{"a":',
    "chunk": POST + b'Transfer-Encoding: chunked\r\n\r\n50\r\n{"a',
    "chunk of noise": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "body that is not compressed": POST + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nabcde",
    "body that is not wanted": b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nabc",
    "headers": b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n",
    "reading": b"GET /api/v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}


def assert_quiet(server: ServerProcess) -> None:
    """End the server; its log holds nothing that anybody has to look at."""
    server.signal(signal.SIGTERM)
    code, stderr = server.end()
    assert code == 0
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    assert [line for line in lines if not re.match(r"\d\d:\d\d:\d\d INFO ", line)] == []
    assert len(lines) < 12, "a line for each of them would fill the disk"


async def counts(address: str) -> dict[str, int]:
    async with grpc.aio.insecure_channel(address) as channel:
        figures = await rpc.InferenceServiceStub(channel).GetMetrics(pb.GetMetricsRequest())
        return dict(figures.requests_by_code)


async def counts_with_cancelled(address: str) -> dict[str, int]:
    """The counts, once the server has noticed that somebody left."""
    while "CANCELLED" not in (found := await counts(address)):  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.01)
    return found


def test_stream_clients_that_are_killed_are_counted_as_cancelled(tmp_path: Path) -> None:
    # So slow that most messages of each client wait for the model when it is killed.
    with server_process(tmp_path, "--set", "model.name=fake:base_ms=50") as server:
        address = f"127.0.0.1:{server.ready()['grpc_port']}"
        command = [sys.executable, "-c", STREAMING_CLIENT, address]
        clients = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(CLIENTS)]
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == b"under way\n"
        for client in clients:
            client.kill()
        for client in clients:
            client.communicate()
        found = asyncio.run(counts_with_cancelled(address))
        assert set(found) == {"OK", "CANCELLED"}
        assert_quiet(server)


def test_cancelled_calls_are_counted_as_cancelled(tmp_path: Path) -> None:
    async def leave(address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = rpc.InferenceServiceStub(channel)
            for text in ("!slow:100 a", "!slow:100 b"):
                calls = [stub.Embed(pb.EmbedRequest(texts=[f"{text} {i}"])) for i in range(20)]
                streams = [stub.EmbedStream() for _ in range(CLIENTS)]
                for number, stream in enumerate(streams):
                    own = pb.EmbedRequest(texts=[f"{text} of stream {number}"])
                    await stream.write(pb.EmbedStreamRequest(id=1, request=own))
                await calls[0]
                for call in [*calls, *streams]:
                    call.cancel()
            watch = raw(channel).unary_stream("/grpc.health.v1.Health/Watch")(b"")
            await watch.read()
            watch.cancel()
            await stub.Embed(pb.EmbedRequest(texts=["well"]))

    # One by one, so that most of them wait for the model when the first is answered and they are cancelled.
    slowly = ["--set", "server.enable_test_faults=true", "--set", "batching.max_batch_size=1"]
    with server_process(tmp_path, *slowly) as server:
        address = f"127.0.0.1:{server.ready()['grpc_port']}"
        asyncio.run(leave(address))
        found = asyncio.run(counts_with_cancelled(address))
        assert set(found) == {"OK", "CANCELLED"}
        assert_quiet(server)


def test_noise_is_an_invalid_argument_for_health_and_reflection_too(tmp_path: Path) -> None:
    async def send(address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            for noise in NOISE:
                for method in LIBRARY_METHODS:
                    call = raw(channel).stream_stream(f"/{method}")(iter([noise]))
                    assert (await refusal(call.read())).code() is grpc.StatusCode.INVALID_ARGUMENT, method
            stream = raw(channel).stream_stream(f"/{SERVICE}/EmbedStream")(iter(NOISE[:1]))
            assert (await refusal(stream.read())).code() is grpc.StatusCode.INVALID_ARGUMENT

    with server_process(tmp_path) as server:
        ports = server.ready()
        asyncio.run(send(f"127.0.0.1:{ports['grpc_port']}"))
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100):
            with socket.create_connection(("127.0.0.1", ports["grpc_port"])) as raw_socket:
                raw_socket.sendall(noise)
        assert_quiet(server)


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_an_http_client_that_is_cut_off_is_no_error_of_the_server(tmp_path: Path, how: str) -> None:
    with server_process(tmp_path) as server:
        port = server.ready()["http_port"]
        for sent in CUT_OFF.values():
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(sent)
                # Another client is served meanwhile: by then the server has seen what was sent.
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as reply:
                    assert reply.status == 200
                if how == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as reply:
            assert reply.status == 200
        assert_quiet(server)
