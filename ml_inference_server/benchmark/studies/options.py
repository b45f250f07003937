"""What smaller answers, and ways to treat long texts, do to a ranking: nDCG@10 of each beside the answer as it is.

    python -m ml_inference_server.benchmark.studies.options --experiment FILE [--pairs FILE --qrels FILE]

The first table is of fewer dimensions and smaller numbers (`dimensions`, `encoding`), the second of texts beyond the
limit of tokens (`overflow`), of a server whose limit is so low that most passages are beyond it. Changes are query by
query against full float32 vectors, of texts within the model's own limit, with a 95 % interval.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ml_inference_server.benchmark.measure.quality import (
    Answers,
    Floats,
    QualityUnknown,
    Slice,
    in_batches,
    judge,
    load_slice,
)
from ml_inference_server.benchmark.result.document import QualityFigures
from ml_inference_server.benchmark.studies.own_server import OwnServer, add_arguments, own_server
from ml_inference_server.benchmark.target.interrupt import Stop, run_stoppable
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.utils.arguments import positive_int
from ml_inference_server.utils.errors import EXIT_OK, ConfigError, StartError
from ml_inference_server.utils.experiment import QualitySettings

_TIMEOUT_S = 60.0
# Equal texts cost nothing the second time: what is varied comes after the model.
_CACHE = "cache.max_mb=256"
# Fractions of the model's own number of dimensions, in twelfths: 384, 256, 128, 64 of 384.
_TWELFTHS = (12, 8, 4, 2)
_OVERFLOWS = {"cut": pb.OVERFLOW_CUT, "cut_left": pb.OVERFLOW_CUT_LEFT, "chunk": pb.OVERFLOW_CHUNK}


@dataclass(frozen=True)
class OptionRow:
    """cells: what was asked, and what that costs or loses."""

    cells: tuple[str, ...]
    figures: QualityFigures


@dataclass(frozen=True)
class Embedded:
    """rows: of each text, as numbers, or as signs (1 and -1). bytes_per_vector: on the wire. cut: texts that were."""

    rows: Floats
    bytes_per_vector: int
    cut: int


class OptionsBench:
    """A running server and the labelled texts. on_done: told after each way to ask."""

    def __init__(self, server: OwnServer, labelled: Slice, on_done: Callable[[], object]) -> None:
        self._target = server.target
        self._labelled = labelled
        self._on_done = on_done

    async def ask(self, **options: Any) -> Embedded:
        """All texts, embedded with these fields of EmbedRequest."""
        sizes: list[int] = []
        cut: list[int] = []

        async def send(texts: Sequence[str]) -> Floats:
            answer = await self._target.embed(texts, _TIMEOUT_S, **options)
            sizes.append((len(answer.embeddings) + 4 * len(answer.scales)) // answer.count)
            cut.append(answer.truncated)
            return numbers_of(answer)

        try:
            rows = await in_batches(self._labelled.texts, send, lambda _: None)
        except QualityUnknown as unknown:
            raise StartError(f"{_named(options)}: {unknown}") from None
        self._on_done()
        return Embedded(rows, sizes[0], sum(cut))


def numbers_of(answer: Any) -> Floats:
    """The numbers that an EmbedResponse means; of binary ones the signs, as 1 and -1."""
    count, dimension = answer.count, answer.dimension
    match answer.encoding:
        case pb.ENCODING_FLOAT16:
            return np.frombuffer(answer.embeddings, "<f2").reshape(count, dimension).astype(np.float32)
        case pb.ENCODING_INT8:
            whole = np.frombuffer(answer.embeddings, np.int8).reshape(count, dimension)
            return whole * np.array(answer.scales, np.float32)[:, None]
        case pb.ENCODING_BINARY | pb.ENCODING_UBINARY:
            packed = np.frombuffer(answer.embeddings, np.uint8).reshape(count, -1)
            if answer.encoding == pb.ENCODING_BINARY:
                packed = packed ^ np.uint8(128)  # int8, minus 128
            bits = np.unpackbits(packed, axis=1, count=dimension)
            return np.where(bits, np.float32(1), np.float32(-1))
        case _:
            return np.frombuffer(answer.embeddings, "<f4").reshape(count, dimension)


def of_vectors(labelled: Slice, queries: Floats, documents: Floats) -> Answers:
    """Scores by dot product: exact for signs, so that equal ones stay equal. Both hold a row for each text."""
    place = {text: number for number, text in enumerate(labelled.texts)}
    asked = queries[[place[row.query] for row in labelled.rows]]
    found = documents[[place[row.passage] for row in labelled.rows]]
    return Answers((asked * found).sum(axis=1), None)


def of_length_1(rows: Floats) -> Floats:
    unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
    return unit


async def smaller_answers(bench: OptionsBench, labelled: Slice, dimensions: Sequence[int]) -> list[OptionRow]:
    """Every encoding at each number of dimensions; the first row is what all others are held to."""
    rows: list[OptionRow] = []
    base: Answers | None = None

    def add(name: str, size: int, documents: Embedded, answers: Answers) -> None:
        cells = (name, str(size), f"{documents.bytes_per_vector:,}")
        rows.append(OptionRow(cells, judge(labelled, answers, base)))

    for size in dimensions:
        plain = await bench.ask(dimensions=size)
        floats = of_length_1(plain.rows)
        answers = of_vectors(labelled, floats, floats)
        add("float32", size, plain, answers)
        base = base or answers
        for name, encoding in (("float16", pb.ENCODING_FLOAT16), ("int8", pb.ENCODING_INT8)):
            small = await bench.ask(dimensions=size, encoding=encoding)
            unit = of_length_1(small.rows)
            add(name, size, small, of_vectors(labelled, unit, unit))
        signs = await bench.ask(dimensions=size, encoding=pb.ENCODING_BINARY)
        add("binary documents, float32 queries", size, signs, of_vectors(labelled, floats, signs.rows))
        add("binary, Hamming distance", size, signs, of_vectors(labelled, signs.rows, signs.rows))
    return rows


async def long_texts(bench: OptionsBench, labelled: Slice, limit: int, whole: Answers) -> list[OptionRow]:
    """Every way to treat a text beyond the server's limit, held to `whole`."""
    rows = []
    for name, overflow in _OVERFLOWS.items():
        found = await bench.ask(overflow=overflow)
        if name == "cut" and not found.cut:
            raise ConfigError(f"no text of {labelled.name} has more than {limit} tokens: lower --max-tokens")
        floats = of_length_1(found.rows)
        answers = of_vectors(labelled, floats, floats)
        rows.append(OptionRow((name, str(limit), f"{found.cut:,}"), judge(labelled, answers, whole)))
    return rows


def options_table(heads: Sequence[str], rows: Sequence[OptionRow]) -> str:
    """heads: of the rows' cells. Changes are those that the rows' figures have."""
    lines = ["| " + " | ".join([*heads, "nDCG@10", "change", "95 % interval"]) + " |"]
    lines.append("| --- |" + " --- |" * (len(heads) + 2))
    for row in rows:
        change = row.figures.ndcg10_difference
        told = ("-", "-") if change is None else (f"{change.value:+.4f}", f"{change.low:+.4f} to {change.high:+.4f}")
        lines.append("| " + " | ".join([*row.cells, f"{row.figures.ndcg10:.4f}", *told]) + " |")
    return "\n".join(lines)


async def _run(arguments: argparse.Namespace, stop: Stop) -> int:
    labelled = load_slice(QualitySettings(pairs=arguments.pairs, qrels=arguments.qrels))
    overrides = [_CACHE, *arguments.overrides]
    steps = tqdm(total=4 * len(_TWELFTHS) + 1 + len(_OVERFLOWS), desc="options", disable=None)
    async with own_server(arguments.experiment, overrides, stop) as server:
        title, resolved = server.info["title"], server.info["resolved"]
        if server.scores_pairs:
            raise ConfigError("this model is a cross-encoder: it has no vectors to make smaller")
        if resolved["max_tokens"] <= arguments.max_tokens:
            raise ConfigError(f"--max-tokens has to be below the model's own limit of {resolved['max_tokens']}")
        bench = OptionsBench(server, labelled, steps.update)
        dimensions = list(dict.fromkeys(max(1, resolved["dimension"] * part // 12) for part in _TWELFTHS))
        smaller = await stop.race(smaller_answers(bench, labelled, dimensions))
        plain = of_length_1((await stop.race(bench.ask())).rows)
        whole = of_vectors(labelled, plain, plain)
    overrides.append(f"model.max_tokens={arguments.max_tokens}")
    async with own_server(arguments.experiment, overrides, stop) as server:
        bench = OptionsBench(server, labelled, steps.update)
        long = await stop.race(long_texts(bench, labelled, arguments.max_tokens, whole))
    steps.close()
    facts = labelled.facts()
    print(f"{title}\n{facts.name}: {facts.queries} queries, {facts.pairs} pairs, {len(labelled.texts)} texts\n")
    print(options_table(("encoding", "dimensions", "bytes"), smaller))
    uncut = OptionRow(("none", str(resolved["max_tokens"]), ""), judge(labelled, whole, None))
    print("\n" + options_table(("overflow", "limit in tokens", "texts cut"), [uncut, *long]))
    return EXIT_OK


def _named(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "as it is"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ml_inference_server.benchmark.studies.options", description=__doc__.split("\n")[0]
    )
    add_arguments(parser)
    parser.add_argument(
        "--max-tokens", type=positive_int, default=64, help="the low limit, beyond which texts are cut (default 64)"
    )
    return run_stoppable(lambda stop: _run(parser.parse_args(argv), stop))


if __name__ == "__main__":
    sys.exit(main())
