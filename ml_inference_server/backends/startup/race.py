"""Which candidate is the fastest: each in a process of its own, who can win compared with FP32 and timed in turn."""

import statistics
import time
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ml_inference_server.backends import create_backend
from ml_inference_server.backends.base import Backend, TokenBatch
from ml_inference_server.backends.startup import parity
from ml_inference_server.backends.startup.batches import BATCH_SIZE, grouped_batches
from ml_inference_server.backends.startup.own_process import OwnProcess
from ml_inference_server.backends.startup.reference import reference_for
from ml_inference_server.backends.startup.resolve import resolve
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError
from ml_inference_server.utils.sample import sample_pairs

PROBE_TEXTS = 96
# Batches of queries are small: they come one by one, and the streams share those that wait.
QUERY_BATCH = 16
# Passes over all texts that decide among those that can still win, one of each in turn.
ROUNDS = 5
# Who is not this near to the best of the others when he is first timed cannot win any more; nor in the rounds, where
# all have been timed alike.
_FIRST_HOPE, _HOPE = 0.75, 0.9


Rates = tuple[float, ...]
"""Texts per second for each workload: of queries and of passages; for a cross-encoder of pairs."""


@dataclass(frozen=True, slots=True)
class Closeness:
    """`parity` is None where no reference could be had; `limit` is what it must reach.

    unfit: what else the gate at load would refuse it for, such as a single text that is wrong.
    """

    parity: float | None
    limit: float
    fp32: bool
    unfit: str = ""

    @property
    def verdict(self) -> str:
        """Why it is out; empty if it passes. What runs FP32 needs no proof where none can be had."""
        if self.parity is None:
            return "" if self.fp32 else "could not be compared with FP32"
        if not self.parity >= self.limit:
            return f"failed the quality gate (parity {self.parity:.4f}, limit {self.limit})"
        return f"failed the quality gate ({self.unfit})" if self.unfit else ""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a candidate tells: that it is loaded, one pass over all texts, or how close to FP32 it is."""

    rates: Rates = ()
    closeness: Closeness | None = None


def probe(model: ModelSettings) -> Generator[Measured, None, None]:
    """Loads a candidate, times it, warms it up and compares it with FP32, and times it each time that it is asked.

    All of it on the sample, batched as the server would. ModelError if it is not fit.
    """
    resolution = resolve(model)
    backend = create_backend(resolution.model)
    backend.load_model()
    resolution.check(backend.info)
    workloads = _workloads(backend)
    yield Measured()
    with ThreadPoolExecutor(backend.info.concurrency) as pool:

        def timed() -> Measured:
            rates = []
            for batches in workloads:
                started = time.perf_counter()
                list(pool.map(backend.infer, batches))
                rates.append(sum(map(len, batches)) / (time.perf_counter() - started))
            return Measured(tuple(rates))

        timed()  # kernels are made at the first batch of their size
        yield timed()
        backend.warmup(lambda done, total: None)
        closeness = parity.measure(backend, reference_for(resolution.model))
        yield Measured(
            closeness=Closeness(
                parity=closeness.mean if closeness else None,
                limit=parity.required(resolution.model, backend.info.task),
                fp32=resolution.quantization == "none",
                unfit=_unfit(closeness, resolution.model, backend.info.task),
            )
        )
        while True:
            yield timed()


def _workloads(backend: Backend) -> list[list[TokenBatch]]:
    """The batches of each workload, the dearest first, so that the streams finish together."""
    pairs = sample_pairs()
    pairs = pairs[:: max(1, len(pairs) // PROBE_TEXTS)][:PROBE_TEXTS]
    tokenizer = backend.tokenizer
    if backend.info.task == "cross_encoder":
        workloads = [(tokenizer.encode_pairs(pairs), BATCH_SIZE)]
    else:
        queries, passages = zip(*pairs, strict=True)
        workloads = [(tokenizer.encode(queries), QUERY_BATCH), (tokenizer.encode(passages), BATCH_SIZE)]
    return [
        [TokenBatch.of([rows[i] for i in batch]) for batch in reversed(grouped_batches(rows, batch_size))]
        for rows, batch_size in workloads
    ]


def _unfit(closeness: parity.Parity | None, model: ModelSettings, task: str) -> str:
    try:
        parity.check(closeness, model, task)
    except ModelError as error:
        return str(error)
    return ""


class Race:
    """The candidates, timed against each other; those that can still win stay loaded."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}  # how each one that is out did
        self.base = ""  # the yardstick
        self._rates: dict[str, list[Rates]] = {}
        self._running: dict[str, OwnProcess[Measured]] = {}
        self._fit: set[str] = set()
        self._failed: set[str] = set()

    def enter(self, entrants: Mapping[str, ModelSettings]) -> None:
        """Load them, side by side, and time one after the other; compare with FP32 who is faster than those before."""
        for name, settings in entrants.items():
            self._running[name] = OwnProcess(probe, settings)
            self._running[name].begin()
        for name in entrants:
            self._ask(name)
        for name in self._among(entrants):
            best = self._best()
            if self._time(name):
                self.base = self.base or name
                if len(self._rates) > 1 and self.ratio(name) > best:
                    self._compare(name)
                self._drop_hopeless(_FIRST_HOPE)

    def decide(self, told: Callable[[int], None]) -> str | None:
        """Compare and time those that are left in turn; the winner, or None. told: before each round."""
        while unknown := [name for name in self._running if name not in self._fit]:
            self._compare(max(unknown, key=self.ratio))
            self._drop_hopeless(_FIRST_HOPE)
        for round_ in range(ROUNDS):
            if len(self._running) < 2:
                break
            told(round_ + 1)
            for name in list(self._running):
                self._time(name)
            self._drop_hopeless(_HOPE)
        return max(self._running, key=self.ratio, default=None)

    def fit(self, names: Collection[str]) -> str:
        """One of them that was tried and is not unfit; empty if none is."""
        return next((name for name in names if name in self._rates and name not in self._failed), "")

    def ratio(self, name: str) -> float:
        """How fast it was, of the yardstick: the mean over the workloads."""
        rates, base = (map(statistics.median, zip(*self._rates[one], strict=True)) for one in (name, self.base))
        return statistics.fmean(rate / unit for rate, unit in zip(rates, base, strict=True))

    def close(self) -> None:
        for process in self._running.values():
            process.close()

    def _ask(self, name: str) -> Measured | None:
        """None where it failed and is out."""
        try:
            return self._running[name].ask()
        except ModelError as error:
            self._fail(name, f"failed ({error})")
            return None

    def _time(self, name: str) -> bool:
        if (measured := self._ask(name)) is not None:
            self._rates.setdefault(name, []).append(measured.rates)
        return measured is not None

    def _compare(self, name: str) -> None:
        """With FP32: once it has been timed for the first time."""
        measured = self._ask(name)
        if measured is None or measured.closeness is None:
            return
        if measured.closeness.verdict:
            self._fail(name, measured.closeness.verdict)
        else:
            self._fit.add(name)

    def _among(self, names: Collection[str]) -> list[str]:
        return [name for name in names if name in self._running]

    def _best(self) -> float:
        """The highest ratio of those that are known to be fit."""
        return max(map(self.ratio, self._among(self._fit)), default=0.0)

    def _drop_hopeless(self, hope: float) -> None:
        best = self._best()
        for name in self._among(list(self._rates)):
            if self.ratio(name) < hope * best:
                self._end(name, f"{self.ratio(name):.1f}x")

    def _fail(self, name: str, told: str) -> None:
        self._failed.add(name)
        self._end(name, told)

    def _end(self, name: str, told: str) -> None:
        self.told[name] = told
        self._running.pop(name).close()
