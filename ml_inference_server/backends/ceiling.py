"""How fast a backend runs without a server round it, and how fast the processor could: the limits of a server's speed.

    python -m ml_inference_server.backends.ceiling --experiment FILE [--workload queries] [--texts FILE]

The ceiling: the backend's own `infer`, `concurrency` batches at a time, on texts that are already tokenised and batched
within the experiment's budgets. The roofline: the rate of the processor's matrix products in the same precision, on the
shapes of this model, measured between the passes, over the operations that the real tokens need (padding not counted).
"""

import argparse
import json
import logging
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ml_inference_server.backends.base import Backend, Encoded, collate
from ml_inference_server.backends.compare import grouped_batches
from ml_inference_server.backends.model_files import architecture_of, find_model
from ml_inference_server.backends.reference import sample_pairs
from ml_inference_server.backends.resolve import title
from ml_inference_server.backends.start import start_backend
from ml_inference_server.utils.cache import writable_root
from ml_inference_server.utils.child import has_huge_pages, huge_pages_for_children
from ml_inference_server.utils.config import Settings, load_settings
from ml_inference_server.utils.errors import ConfigError, StartError
from ml_inference_server.utils.files import replace_file, replaceable
from ml_inference_server.utils.logging import set_up_logging
from ml_inference_server.utils.process import begin_process, end_process

_MODULE = "ml_inference_server.backends.ceiling"

log = logging.getLogger(__name__)

REPEATS = 3
# So much of the texts is run; more does not change the mix of lengths.
_MAX_TEXTS = 4096
_MATRIX_S = 0.5


@dataclass(frozen=True, slots=True)
class Ceiling:
    """texts_per_s, lowest, highest: median and spread of the repeats. tokens_per_s: real tokens, median.

    roofline_texts_per_s: what the matrix products alone would allow; None where their rate could not be measured.
    """

    title: str
    texts_per_s: float
    lowest: float
    highest: float
    tokens_per_s: float
    mean_tokens: float
    texts_per_batch: float
    matrix_tflops: float | None
    operations_per_text: float
    roofline_texts_per_s: float | None
    repeats: int


def measure(settings: Settings, texts: Sequence[str], seconds: float) -> Ceiling:
    """Load the backend of `settings` and time it on `texts`. ModelError where it is not fit to run."""
    model = settings.model.model_copy(update={"process_per_stream": False})
    started = start_backend(model, lambda phase: log.info("%s", phase))
    backend, info = started.backend, started.info
    if info.task == "cross_encoder":
        rows = backend.tokenizer.encode_pairs([(texts[0], text) for text in texts])
    else:
        rows = backend.tokenizer.encode(texts)
    batches = batches_of(rows, settings, info.padding_free)
    shape = _shape(settings, started.resolution.model.random_weights)
    rates: list[float] = []
    matrix: list[float] = []
    _pass(backend, batches, rows, min(1.0, seconds))  # not counted: caches and pools are warm afterwards
    for _ in range(REPEATS):
        rates.append(_pass(backend, batches, rows, seconds))
        if info.device == "cpu" and info.dtype in ("float32", "bfloat16"):
            tokens = int(statistics.mean(sum(rows[i].length for i in batch) for batch in batches))
            matrix.append(_matrix_rate(shape, info.dtype, max(1, tokens), info.concurrency, info.threads))
    mean_tokens = statistics.mean(row.length for row in rows)
    operations = statistics.mean(operations_of(row.length, shape) for row in rows)
    tflops = statistics.median(matrix) if matrix else None
    median = statistics.median(rates)
    return Ceiling(
        title=title(started.resolution, info),
        texts_per_s=median,
        lowest=min(rates),
        highest=max(rates),
        tokens_per_s=median * mean_tokens,
        mean_tokens=mean_tokens,
        texts_per_batch=len(rows) / len(batches),
        matrix_tflops=tflops,
        operations_per_text=operations,
        roofline_texts_per_s=tflops * 1e12 / operations if tflops else None,
        repeats=REPEATS,
    )


def batches_of(rows: Sequence[Encoded], settings: Settings, padding_free: bool) -> list[list[int]]:
    """Full batches, as the server would form them from an endless queue: in turn, or grouped by length."""
    size, budget = settings.batching.max_batch_size, settings.batching.max_batch_tokens or 2048
    if not padding_free:
        return grouped_batches(rows, size, budget)
    batches: list[list[int]] = [[]]
    tokens = 0
    for index, row in enumerate(rows):
        if batches[-1] and (len(batches[-1]) == size or tokens + row.length > budget):
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += row.length
    return batches


def operations_of(tokens: int, shape: dict[str, int]) -> float:
    """Floating-point operations of a text in a transformer encoder: its matrix products, a multiply and an add each.

    For each layer and token 4 h^2 (query, key, value, output) + 2 h i (feed-forward), and 2 h for each token attended.
    """
    hidden, inner, layers = shape["hidden"], shape["intermediate"], shape["layers"]
    return 2.0 * layers * tokens * (4 * hidden**2 + 2 * hidden * inner + 2 * hidden * tokens)


def _shape(settings: Settings, random_weights: bool) -> dict[str, int]:
    files = architecture_of(settings.model.name) if random_weights else find_model(settings.model.name)
    config: dict[str, Any] = {}
    for file in (files.folder / "config.json", *files.folder.glob("*/config.json")):
        if file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            if "hidden_size" in config:
                break
    try:
        return {
            "hidden": int(config["hidden_size"]),
            "intermediate": int(config["intermediate_size"]),
            "layers": int(config["num_hidden_layers"]),
        }
    except KeyError as error:
        raise ConfigError(f"{files.folder}: its config.json has no {error}: the roofline cannot be computed") from error


def _in_threads(count: int, work: Callable[[], float]) -> float:
    """The sum of what `work` returns in each of `count` threads that start together."""
    barrier = threading.Barrier(count)

    def run(_: int) -> float:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(run, range(count)))


def _pass(backend: Backend, batches: Sequence[Sequence[int]], rows: Sequence[Encoded], seconds: float) -> float:
    """Texts per second, over all streams."""
    padded = [collate([rows[i] for i in batch], backend.tokenizer.pad_id) for batch in batches]
    turns = iter(range(10**9))
    lock = threading.Lock()

    def work() -> float:
        started, texts = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            with lock:
                batch = padded[next(turns) % len(padded)]
            backend.infer(batch)
            texts += len(batch)
        return texts / (time.perf_counter() - started)

    return _in_threads(backend.info.concurrency, work)


def _matrix_rate(shape: dict[str, int], dtype: str, tokens: int, streams: int, threads: int) -> float:
    """TFLOP/s of the model's own products (h x h, h x i, i x h) on `tokens` rows, over all streams."""
    import torch

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    sizes = [(shape["hidden"], shape["hidden"])] * 4
    sizes += [(shape["hidden"], shape["intermediate"]), (shape["intermediate"], shape["hidden"])]

    def work() -> float:
        with torch.inference_mode():
            layers = [torch.nn.Linear(a, b, dtype=kind) for a, b in sizes]
            inputs = [torch.ones((tokens, a), dtype=kind) for a, _ in sizes]
            started, done = time.perf_counter(), 0
            while time.perf_counter() - started < _MATRIX_S:
                for layer, given in zip(layers, inputs, strict=True):
                    layer(given)
                done += 1
            elapsed = time.perf_counter() - started
        return done * sum(2.0 * tokens * a * b for a, b in sizes) / elapsed / 1e12

    return _in_threads(streams, work)


def read_texts(file: Path | None, workload: str) -> list[str]:
    """Distinct texts: one a line, or the query or passage column of MS MARCO's TSV; without a file, the sample's."""
    if file is None:
        pairs = sample_pairs()
        return list(dict.fromkeys(pair[0] if workload == "queries" else pair[1] for pair in pairs))
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"--texts {file}: cannot be read: {error.strerror}") from error
    column = {4: 2 if workload == "queries" else 3, 2: 1, 1: 0}
    texts = [parts[column.get(len(parts), -1)] for line in lines if (parts := line.split("\t")) != [""]]
    if not texts:
        raise ConfigError(f"--texts {file}: no text in it")
    return list(dict.fromkeys(text for text in texts if text.strip()))


def report(found: Ceiling) -> str:
    """For people; the server's figures are compared with the first line."""
    lines = [
        found.title,
        f"ceiling   {found.texts_per_s:8.1f} texts/s ({found.lowest:.1f}-{found.highest:.1f} over {found.repeats} "
        f"repeats), {found.tokens_per_s:.0f} tokens/s, {found.texts_per_batch:.1f} texts a batch, "
        f"{found.mean_tokens:.1f} tokens a text",
    ]
    if found.roofline_texts_per_s is not None:
        lines.append(
            f"roofline  {found.roofline_texts_per_s:8.1f} texts/s: {found.matrix_tflops:.2f} TFLOP/s of matrix "
            f"products, {found.operations_per_text / 1e9:.2f} GFLOP a text; the ceiling is "
            f"{100 * found.texts_per_s / found.roofline_texts_per_s:.0f} % of it"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__.split("\n")[0])
    parser.add_argument("--experiment", type=Path, metavar="FILE", help="experiment file (YAML)")
    parser.add_argument("--variant", default="", metavar="NAME", help="one of the experiment's variants")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--workload", choices=("queries", "passages"), default="passages")
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="one text a line, or MS MARCO's TSV (default: sample)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each of the repeats (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    set_up_logging("WARNING")
    try:
        begin_process()
        writable_root(quiet=True)
        if not args.seconds > 0:
            raise ConfigError(f"--seconds {args.seconds}: expected more than 0")
        if args.json is not None:
            args.json = replaceable(args.json, "--json")
        settings = load_settings(args.experiment, overrides=args.overrides, variant=args.variant)
        if settings.model.process_per_stream and not has_huge_pages():
            # As the server's processes have them: what is compared must differ in nothing else.
            with huge_pages_for_children():
                os.execv(sys.executable, [sys.executable, "-m", _MODULE, *(sys.argv[1:] if argv is None else argv)])  # noqa: S606
        found = measure(settings, read_texts(args.texts, args.workload)[:_MAX_TEXTS], args.seconds)
        if args.json is not None:
            replace_file(args.json, json.dumps(asdict(found), indent=1) + "\n")
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: --json {args.json} cannot be written: {error.strerror}", file=sys.stderr)
        return ConfigError.exit_code
    print(report(found))
    return 0


if __name__ == "__main__":
    end_process(main())
