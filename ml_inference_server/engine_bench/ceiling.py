"""How fast a backend runs without a server round it, and how fast the processor could: the limits of a server's speed.

    python -m ml_inference_server.engine_bench.ceiling --experiment FILE [--workload queries] [--texts FILE]

The ceiling: the backend's own `infer`, `concurrency` batches at a time, on texts that are already tokenised and batched
within the experiment's budgets, in an order that tells nothing of their length, all of them equally often. The
roofline: the rate of the processor's matrix products in the same precision (FP32 and BF16: PyTorch's, on the shapes of
this model; INT8: at most, in the L1 cache), measured between the passes, over the operations that the real tokens need
(padding not counted).
"""

import argparse
import itertools
import json
import logging
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ml_inference_server.backends.base import (
    DOCUMENT_PROMPTS,
    Backend,
    Encoded,
    TextTokenizer,
    TokenBatch,
    packed_size,
)
from ml_inference_server.backends.startup.batches import grouped_batches
from ml_inference_server.backends.startup.resolve import title
from ml_inference_server.backends.startup.start import start_backend
from ml_inference_server.engine_bench.roofline import in_threads, matrix_rate, operations_of, shape_of
from ml_inference_server.utils.cache import writable_root
from ml_inference_server.utils.child import has_huge_pages, huge_pages_for_children
from ml_inference_server.utils.config import Settings, load_settings
from ml_inference_server.utils.errors import ConfigError, StartError
from ml_inference_server.utils.files import replace_file, replaceable
from ml_inference_server.utils.logging import set_up_logging
from ml_inference_server.utils.process import begin_process, end_process
from ml_inference_server.utils.sample import sample_pairs
from ml_inference_server.utils.share import of_limit

_MODULE = "ml_inference_server.engine_bench.ceiling"

log = logging.getLogger(__name__)

REPEATS = 3
# So many of the texts are run; more hardly changes their mix of lengths.
_MAX_TEXTS = 1024

# A text, or a pair of query and passage.
Item = str | tuple[str, str]


class Work(NamedTuple):
    """What requests make a backend compute.

    texts: how many they hold, a pair as two; those that equal another one of their request count, too, although they
    are in `rows` once, as a server computes them.
    """

    rows: list[Encoded]
    texts: int


class Pass(NamedTuple):
    """Per second, over all streams. tokens: real ones; computed_tokens: with those of padding."""

    rows: float
    tokens: float
    computed_tokens: float


@dataclass(frozen=True, slots=True)
class Ceiling:
    """texts_per_s, lowest, highest: median and spread of the repeats. tokens_per_s: real tokens, median.

    padding_share: of the computed tokens. roofline_texts_per_s: what the matrix products alone would allow; None where
    their rate could not be measured, or the model's shape is not known.
    """

    title: str
    texts_per_s: float
    lowest: float
    highest: float
    tokens_per_s: float
    padding_share: float
    tokens_per_text: float
    texts_per_batch: float
    matrix_t_operations_per_s: float | None
    operations_per_text: float | None
    roofline_texts_per_s: float | None
    repeats: int


def measure(settings: Settings, requests: Sequence[Sequence[Item]], seconds: float) -> Ceiling:
    """Load the backend of `settings` and time it on `requests`. ModelError where it is not fit to run."""
    model = settings.model.model_copy(update={"process_per_stream": False})
    started = start_backend(model, lambda phase: log.info("%s", phase))
    backend, info = started.backend, started.info
    rows, texts = work_of(requests, backend.tokenizer, is_cross_encoder=info.task == "cross_encoder")
    batches = batches_of(rows, settings, info.padding_free)
    shape = shape_of(started.resolution.model)
    passes: list[Pass] = []
    matrix: list[float] = []
    run_pass(backend, batches, rows, seconds, whole=False)  # not counted: caches and pools are warm afterwards
    for _ in range(REPEATS):
        passes.append(run_pass(backend, batches, rows, seconds))
        if shape and info.device == "cpu":
            tokens = int(statistics.mean(sum(rows[i].length for i in batch) for batch in batches))
            rate = matrix_rate(shape, info.dtype, max(1, tokens), info.concurrency, info.threads)
            matrix += [] if rate is None else [rate]
    operations = sum(operations_of(row.length, shape) for row in rows) / texts if shape else None
    rate = statistics.median(matrix) if matrix else None
    rates = [each.rows * texts / len(rows) for each in passes]
    return Ceiling(
        title=title(started.resolution, info),
        texts_per_s=statistics.median(rates),
        lowest=min(rates),
        highest=max(rates),
        tokens_per_s=statistics.median(each.tokens for each in passes),
        padding_share=1 - statistics.median(each.tokens / each.computed_tokens for each in passes),
        tokens_per_text=sum(row.length for row in rows) / texts,
        texts_per_batch=len(rows) / len(batches),
        matrix_t_operations_per_s=rate,
        operations_per_text=operations,
        roofline_texts_per_s=rate * 1e12 / operations if rate and operations else None,
        repeats=REPEATS,
    )


def work_of(requests: Sequence[Sequence[Item]], tokenizer: TextTokenizer, *, is_cross_encoder: bool) -> Work:
    """What a server would compute for them: equal texts of one request once; of a cross-encoder, equal pairs."""
    if is_cross_encoder:
        # Texts by themselves stand for passages of one query.
        query = next((item for request in requests for item in request if isinstance(item, str)), "")
        asked = [[(query, item) if isinstance(item, str) else item for item in request] for request in requests]
        pairs = [pair for request in asked for pair in dict.fromkeys(request)]
        return Work(tokenizer.encode_pairs(pairs), _texts_of(requests))
    query_prompt = "query" if "query" in tokenizer.prompts else None
    document_prompt = next((name for name in DOCUMENT_PROMPTS if name in tokenizer.prompts), None)
    keys: list[tuple[str | None, str]] = []
    for request in requests:
        asked_keys: dict[tuple[str | None, str], None] = {}
        for item in request:
            if isinstance(item, str):
                asked_keys[None, item] = None
            else:
                asked_keys |= {(query_prompt, item[0]): None, (document_prompt, item[1]): None}
        keys += asked_keys
    rows = {
        prompt: iter(tokenizer.encode([text for name, text in keys if name == prompt], prompt))
        for prompt in {name for name, _ in keys}
    }
    return Work([next(rows[prompt]) for prompt, _ in keys], _texts_of(requests))


def _texts_of(requests: Sequence[Sequence[Item]]) -> int:
    return sum(1 if isinstance(item, str) else 2 for request in requests for item in request)


def batches_of(rows: Sequence[Encoded], settings: Settings, padding_free: bool) -> list[list[int]]:
    """Full batches, as the server would form them from an endless queue: in turn, or grouped by length.

    Grouped ones are shuffled (always alike): a pass that began with the short ones would flatter the backend.
    """
    size, budget = settings.batching.max_batch_size, settings.batching.max_batch_tokens or 2048
    if not padding_free:
        grouped = grouped_batches(rows, size, budget)
        random.Random(0).shuffle(grouped)  # noqa: S311 - an order, not a secret
        return grouped
    batches: list[list[int]] = [[]]
    tokens = 0
    for index, row in enumerate(rows):
        if batches[-1] and (len(batches[-1]) == size or tokens + row.length > budget):
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += row.length
    return batches


def run_pass(
    backend: Backend, batches: Sequence[Sequence[int]], rows: Sequence[Encoded], seconds: float, *, whole: bool = True
) -> Pass:
    """Run the batches in turn for `seconds`, and then on until all of them have run equally often (`whole`)."""
    padded = [TokenBatch.of([rows[i] for i in batch]) for batch in batches]
    sizes = [_sizes(batch, backend.info.padding_free) for batch in padded]
    turns = _turns(len(padded), seconds, whole=whole)
    lock = threading.Lock()

    def work() -> Pass:
        done = [0, 0, 0]
        started = time.perf_counter()
        elapsed = 0.0
        while True:
            with lock:
                turn = next(turns, None)
            if turn is None:
                break
            backend.infer(padded[turn])
            elapsed = time.perf_counter() - started
            done = [a + b for a, b in zip(done, sizes[turn], strict=True)]
        # By its own clock: the streams do not end together, and one that waits for the others has nothing to do.
        return Pass(*(amount / elapsed if elapsed else 0.0 for amount in done))

    return Pass(*map(sum, zip(*in_threads(backend.info.concurrency, work), strict=True)))


def _sizes(batch: TokenBatch, padding_free: bool) -> tuple[int, int, int]:
    """Its rows, real tokens, and the tokens that are computed for it."""
    tokens = batch.tokens
    return len(batch), tokens, packed_size(tokens) if padding_free else batch.padded_tokens


def _turns(count: int, seconds: float, *, whole: bool) -> Iterator[int]:
    """0, 1, ... count - 1, again and again, at least once, until the time is over and (`whole`) a round is complete."""
    ends_at = time.perf_counter() + seconds
    for turn in itertools.count():
        if turn and time.perf_counter() >= ends_at and (turn % count == 0 or not whole):
            return
        yield turn % count


def read_texts(file: Path | None, workload: str) -> list[str]:
    """Distinct texts: one a line, or the query or passage column of MS MARCO's TSV; without a file, the sample's.

    At most _MAX_TEXTS of them, chosen by chance but always the same.
    """
    if file is None:
        pairs = sample_pairs()
        found = dict.fromkeys(pair[0] if workload == "queries" else pair[1] for pair in pairs)
    else:
        column = {4: 2 if workload == "queries" else 3, 2: 1, 1: 0}
        lines = (line.split("\t") for line in _lines(file, "--texts") if line)
        found = dict.fromkeys(text for parts in lines if (text := parts[column.get(len(parts), -1)]).strip())
    texts = list(found)
    if not texts:
        raise ConfigError(f"--texts {file}: no text in it")
    random.Random(0).shuffle(texts)  # noqa: S311 - an order, not a secret
    return texts[:_MAX_TEXTS]


def read_requests(file: Path) -> list[list[Item]]:
    """One request a line, as a JSON list of texts or of [query, passage] pairs; as many as hold _MAX_TEXTS texts."""
    requests: list[list[Item]] = []
    texts = 0
    for number, line in enumerate(_lines(file, "--requests"), 1):
        try:
            request = [item if isinstance(item, str) else _pair(item) for item in _a_list(json.loads(line))]
        except (ValueError, TypeError):
            raise ConfigError(
                f"--requests {file}:{number}: expected a JSON list of texts, or of [query, passage] pairs"
            ) from None
        requests.append(request)
        texts += _texts_of([request])
        if texts >= _MAX_TEXTS:
            break
    if not texts:
        raise ConfigError(f"--requests {file}: no request in it")
    return requests


def _pair(item: object) -> tuple[str, str]:
    query, passage = _a_list(item)
    if not isinstance(query, str) or not isinstance(passage, str):
        raise TypeError
    return query, passage


def _a_list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _lines(file: Path, flag: str) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{flag} {file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} {file}: not UTF-8 text ({error.reason})") from error


def report(found: Ceiling) -> str:
    """For people; the server's figures are compared with the first line."""
    lines = [
        found.title,
        f"ceiling   {found.texts_per_s:8.1f} texts/s ({found.lowest:.1f}-{found.highest:.1f} over {found.repeats} "
        f"repeats), {found.tokens_per_s:.0f} tokens/s, {found.texts_per_batch:.1f} texts a batch, "
        f"{found.tokens_per_text:.1f} tokens a text, {found.padding_share:.0%} of the computed tokens are padding",
    ]
    if found.roofline_texts_per_s is not None and found.operations_per_text is not None:
        share = found.texts_per_s / found.roofline_texts_per_s
        lines.append(
            f"roofline  {found.roofline_texts_per_s:8.1f} texts/s: {found.matrix_t_operations_per_s:.2f} T operations/s"
            f" of matrix products, {found.operations_per_text / 1e9:.2f} G operations a text; "
            f"the ceiling is {of_limit(share)} of it"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__.split("\n")[0])
    parser.add_argument("--experiment", type=Path, metavar="FILE", help="experiment file (YAML)")
    parser.add_argument("--variant", default="", metavar="NAME", help="one of the experiment's variants")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--workload", choices=("queries", "passages"), default="passages", help="which texts of a TSV")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--texts", type=Path, metavar="FILE", help="one text a line, or MS MARCO's TSV (default: sample)"
    )
    source.add_argument(
        "--requests", type=Path, metavar="FILE", help="one request a line: a JSON list of texts, or of pairs"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="least length of each of the repeats, which run all texts (default 5)",
    )
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
        requests: list[list[Item]]
        if args.requests is not None:
            requests = read_requests(args.requests)
        else:
            requests = [[text] for text in read_texts(args.texts, args.workload)]
        found = measure(settings, requests, args.seconds)
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
