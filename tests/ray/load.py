"""Callers in threads, and what each of their calls ended with."""

import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from tests.ray.cluster import Cluster

LIMIT_S = 90.0


def trailers_of(error: grpc.RpcError) -> dict[str, str]:
    """Those whose values are text."""
    pairs: Any = error.trailing_metadata() or ()
    return {name: value for name, value in pairs if isinstance(value, str)}


class Load:
    """`workers` callers, each with one call at a time, as long as the `with` block lasts; it ends with their last.

    texts: of each call; different: with a number behind the last one, so that no two are equal. Every answer is
    compared with the right one.
    """

    def __init__(
        self, ray: Cluster, *, workers: int, texts: Sequence[str], different: bool = False, retries: bool
    ) -> None:
        self.codes: Counter[str] = Counter()
        self.hints_ms: defaultdict[str, list[int]] = defaultdict(list)
        self.details: defaultdict[str, set[str]] = defaultdict(set)
        self.replicas: set[str] = set()
        self.wrong = 0
        self._ray, self._texts, self._different, self._retries = ray, list(texts), different, retries
        self._numbers = itertools.count()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
        assert not any(thread.is_alive() for thread in self._threads), "a call never ended"
        assert not self.wrong

    def until(self, reached: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + LIMIT_S
        while not reached():
            assert time.monotonic() < give_up_at, (self.codes, self.details)
            self._over.wait(0.05)

    def more(self, calls: int) -> None:
        """So many more that went well."""
        wanted = self.codes["OK"] + calls
        self.until(lambda: self.codes["OK"] >= wanted)

    def _work(self) -> None:
        with self._ray.stub(retries=self._retries) as stub:
            while not self._over.is_set():
                texts = list(self._texts)
                if self._different:
                    texts[-1] += f" {next(self._numbers)}"
                try:
                    reply, call = stub.Embed.with_call(pb.EmbedRequest(texts=texts), timeout=60)
                except grpc.RpcError as error:
                    self._failed(error)
                    continue
                got = np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)
                right = np.array_equal(got, [fake_embedding(text) for text in texts])
                with self._lock:
                    self.codes["OK"] += 1
                    self.wrong += not right
                    self.replicas.add(dict(call.trailing_metadata())["replica"])

    def _failed(self, error: grpc.RpcError) -> None:
        code = error.code().name
        trailers = trailers_of(error)
        with self._lock:
            self.codes[code] += 1
            self.hints_ms[code].append(int(trailers.get("grpc-retry-pushback-ms", "0")))
            self.details[code].add((error.details() or "")[:300])
