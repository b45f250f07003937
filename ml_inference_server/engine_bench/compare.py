"""All backends and precisions of this machine side by side: speed, fidelity to FP32, ranking, memory, load time.

    python -m ml_inference_server.engine_bench.compare --pairs top100.tsv --qrels qrels.txt

Each combination lives in a process of its own. The processes run one at a time, in turn over the repeats, so that a
noisy minute of the machine hits all alike. `direct` is the bare engine on the same batches: what the backend adds is
visible.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import psutil
from numpy.typing import NDArray
from tqdm import tqdm

from ml_inference_server.backends import BACKENDS, create_backend
from ml_inference_server.backends.base import Encoded, TokenBatch
from ml_inference_server.backends.files.model_errors import start_errors
from ml_inference_server.backends.startup.batches import BATCH_SIZE, grouped_batches
from ml_inference_server.backends.startup.resolve import DTYPES, PRECISION_NAMES, resolve
from ml_inference_server.utils.arguments import positive_int
from ml_inference_server.utils.child import begin_child
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ConfigError, ModelError, StartError
from ml_inference_server.utils.ranking import mean_ndcg_at, read_qrels
from ml_inference_server.utils.share import MARK, NOTE, cell

MODES = ("random", "grouped", "direct")


@runtime_checkable
class BareEngine(Protocol):
    """What a backend has besides, if its engine can be called as it is."""

    def bare_call(self, batch: TokenBatch) -> object: ...


@dataclass
class EngineRow:
    """One combination. `rates`: passages per second, one value for each repeat."""

    name: str
    error: str = ""
    load_s: float = 0.0
    rss_mib: float = 0.0
    rates: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    ndcg: float | None = None
    cosine_mean: float = 0.0
    cosine_min: float = 0.0


def random_batches(rows: Sequence[Encoded], seed: int = 0) -> list[list[int]]:
    """Batches of 32 as they come, the way most servers run them."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, not a secret
    return [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]


def _child(connection: Connection, settings: ModelSettings, texts: list[str], timed: int) -> None:
    """In its own process: load, then do what it is told until it is ended."""
    begin_child()
    try:
        started = time.perf_counter()
        with start_errors(settings):
            backend = create_backend(settings)
            if not isinstance(backend, BareEngine):
                raise ModelError(f"backend {settings.backend} has no bare_call, against which it is measured")
            backend.load_model()
            backend.warmup(lambda done, total: None)
        connection.send({"load_s": time.perf_counter() - started})
    except StartError as error:
        connection.send({"error": str(error)})
        return
    rows = backend.tokenizer.encode(texts)
    pool = ThreadPoolExecutor(backend.info.concurrency)

    def seconds(batches: Sequence[Sequence[int]], call: Callable[[TokenBatch], object]) -> float:
        padded = [TokenBatch.of([rows[i] for i in batch]) for batch in batches]
        started = time.perf_counter()
        list(pool.map(call, padded))
        return time.perf_counter() - started

    while (command := connection.recv()) != "end":
        if command == "embed":
            out = np.empty((len(rows), backend.info.dimension), np.float32)
            batches = grouped_batches(rows)
            calls = (TokenBatch.of([rows[i] for i in batch]) for batch in batches)
            for batch, answer in zip(batches, pool.map(backend.infer, list(calls)), strict=True):
                out[batch] = answer
            connection.send((out, psutil.Process().memory_info().rss / 2**20))
        else:
            part = rows[-timed:]
            offset = len(rows) - len(part)
            batches = random_batches(part) if command == "random" else grouped_batches(part)
            moved = [[i + offset for i in batch] for batch in batches]
            connection.send(seconds(moved, backend.bare_call if command == "direct" else backend.infer))


def combinations(model: ModelSettings, only: Sequence[str] = ()) -> list[tuple[EngineRow, ModelSettings]]:
    """Every backend and precision that this machine can run on the cpu or its best device, or those named in `only`.

    ConfigError where one of these cannot run here.
    """
    out = []
    kinds = [(backend, compiled) for backend in BACKENDS for compiled in (False, True) if backend != "fake"]
    for (backend, compiled), quantization in itertools.product(kinds, ("none", "fp16", "bf16", "int8")):
        precision = {"quantized": quantization != "none", "quantization": quantization}
        try:
            resolution = resolve(model.model_copy(update={"backend": backend, "compile": compiled} | precision))
        except StartError:
            continue
        if not resolution.warnings:  # a precision that this machine only emulates would take hours
            name = f"{backend} {PRECISION_NAMES[DTYPES[resolution.quantization]]}" + " compiled" * compiled
            out.append((EngineRow(name), resolution.model))
    names = [row.name for row, _ in out]
    if unknown := [name for name in only if name not in names]:
        raise ConfigError(f"--only {', '.join(unknown)}: what runs here is {', '.join(names)}")
    return [each for each in out if not only or each[0].name in only]


def ask(connection: Connection, command: str) -> Any:
    connection.send(command)
    return connection.recv()


def ranking(
    pairs: Sequence[tuple[str, str]], vectors: NDArray[np.float32], place: dict[str, int]
) -> dict[str, list[str]]:
    """query id -> its candidates by cosine, best first."""
    scored: dict[str, list[tuple[float, str]]] = {}
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for query, passage in pairs:
        score = float(unit[place["q" + query]] @ unit[place["p" + passage]])
        scored.setdefault(query, []).append((-score, passage))
    return {query: [passage for _, passage in sorted(each)] for query, each in scored.items()}


def compare(
    model: ModelSettings,
    pairs_file: Path,
    qrels_file: Path,
    *,
    repeats: int,
    timed: int,
    speed_only: bool = False,
    only: Sequence[str] = (),
) -> list[EngineRow]:
    """Measure every combination, or those named in `only`; the first one is what the others are compared with.

    A combination that cannot start has its error in its row.
    """
    texts: dict[str, str] = {}
    pairs = []
    for number, line in enumerate(pairs_file.read_text(encoding="utf-8").splitlines(), 1):
        parts = line.split("\t")
        if len(parts) != 4:
            raise ConfigError(f"{pairs_file}:{number}: expected query id, passage id, query and passage between tabs")
        pairs.append((parts[0], parts[1]))
        texts["q" + parts[0]], texts["p" + parts[1]] = parts[2], parts[3]
    # Passages last, so that the timed part holds only them.
    names = sorted(texts, key=lambda name: (name[0] != "q", name))
    place = {name: i for i, name in enumerate(names)}
    qrels = read_qrels(qrels_file)
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    running: list[tuple[EngineRow, Connection]] = []
    rows: list[EngineRow] = []
    try:
        for row, settings in tqdm(combinations(model, only), desc="loading", disable=None):
            here, there = context.Pipe()
            process = context.Process(
                target=_child, args=(there, settings, [texts[n] for n in names], timed), daemon=True
            )
            process.start()
            processes.append(process)
            there.close()
            rows.append(row)
            try:
                told = here.recv()
            except EOFError:
                told = {"error": "the process died while loading"}
            if "error" in told:
                row.error = told["error"]
                continue
            row.load_s = told["load_s"]
            running.append((row, here))
        turns = [(mode, each) for _ in range(repeats) for mode in MODES for each in running]
        for mode, (row, connection) in tqdm(turns, desc="timing", disable=None):
            row.rates[mode].append(timed / ask(connection, mode))
        reference: NDArray[np.float32] | None = None
        for row, connection in tqdm([] if speed_only else running, desc="quality", disable=None):
            vectors, row.rss_mib = ask(connection, "embed")
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            reference = vectors if reference is None else reference
            cosine = (vectors * reference).sum(axis=1)
            row.cosine_mean, row.cosine_min = float(cosine.mean()), float(cosine.min())
            row.ndcg = mean_ndcg_at(10, ranking(pairs, vectors, place), qrels)
    finally:
        for each in processes:  # one that still loads among them: they leave Ctrl-C to us
            each.kill()
            each.join()
    return rows


def markdown(rows: Sequence[EngineRow]) -> str:
    """The table; speeds as median with the spread of the repeats."""
    lines = [
        "| backend | random, passages/s | grouped, passages/s | to FP32 PyTorch, grouped | backend / bare engine |"
        " cosine to FP32, mean / min | nDCG@10 | RSS, MiB | load, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = next((statistics.median(row.rates["grouped"]) for row in rows if not row.error), 1.0)
    for row in rows:
        if row.error:
            lines.append(f"| {row.name} | not run: {row.error} | | | | | | | |")
            continue
        middle = {mode: statistics.median(values) for mode, values in row.rates.items()}
        spread = {
            mode: f"{v:.0f} ({min(row.rates[mode]):.0f}-{max(row.rates[mode]):.0f})" for mode, v in middle.items()
        }
        ratios = [own / bare for own, bare in zip(row.rates["grouped"], row.rates["direct"], strict=True)]
        quality = "- | - | -"
        if row.ndcg is not None:
            quality = f"{row.cosine_mean:.5f} / {row.cosine_min:.5f} | {row.ndcg:.4f} | {row.rss_mib:.0f}"
        lines.append(
            f"| {row.name} | {spread['random']} | {spread['grouped']} | {middle['grouped'] / base:.2f}x |"
            f" {cell(statistics.median(ratios))} | {quality} | {row.load_s:.1f} |"
        )
    if any(MARK in line for line in lines):
        lines.append(f"\n{MARK} {NOTE}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ml_inference_server.engine_bench.compare", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--pairs", type=Path, required=True, help="query id, passage id, query, passage between tabs")
    parser.add_argument("--qrels", type=Path, required=True, help="graded judgements in TREC layout")
    parser.add_argument("--model-name", default=ModelSettings().name)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=positive_int, default=3)
    parser.add_argument("--timed", type=positive_int, default=512, help="passages in each timed pass (default 512)")
    parser.add_argument(
        "--speed-only", action="store_true", help="leave out the pass over all texts that rates quality"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="ROW",
        help="such as 'pytorch int8 compiled'; may be given several times (default: all that runs here)",
    )
    args = parser.parse_args()
    try:
        model = ModelSettings(name=args.model_name, device=args.device)
        sizes = {"repeats": args.repeats, "timed": args.timed}
        rows = compare(model, args.pairs, args.qrels, **sizes, speed_only=args.speed_only, only=args.only)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"{os.cpu_count()} cores, {args.repeats} repeats in turn, {args.timed} passages each, median (lowest-highest)\n"
    )
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
