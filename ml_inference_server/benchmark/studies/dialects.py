"""Whether all dialects of a server give the same numbers, and what each of them costs beside the server's own wire.

    python -m ml_inference_server.benchmark.studies.dialects --experiment FILE [--pairs FILE --qrels FILE]

First, one server answers a labelled file through each dialect: nDCG@10 of what came back, and its largest difference to
Embed (of scores: to Rerank), which must be 0. Then the server is started again and loaded through each of them in turn,
from one client process, in an order that changes from round to round.
"""

import argparse
import sys
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ml_inference_server.benchmark.load.channel import RequestFailed
from ml_inference_server.benchmark.load.dataset import load_dataset
from ml_inference_server.benchmark.measure.quality import Slice, load_slice
from ml_inference_server.benchmark.studies.calls import DialectMissing, EmbedDialect, RerankDialect
from ml_inference_server.benchmark.studies.calls_grpc import GrpcDialects
from ml_inference_server.benchmark.studies.calls_http import HttpDialects
from ml_inference_server.benchmark.studies.dialect_cost import CostBench, CostLoad, cost_table
from ml_inference_server.benchmark.studies.dialect_equality import Equality, equality_table
from ml_inference_server.benchmark.studies.own_server import OwnServer, add_arguments, own_server
from ml_inference_server.benchmark.target.interrupt import Stop, run_stoppable
from ml_inference_server.benchmark.target.server_process import LOOPBACK
from ml_inference_server.utils.arguments import positive_float, positive_int
from ml_inference_server.utils.errors import EXIT_FAILED_RUN, EXIT_OK, ConfigError
from ml_inference_server.utils.experiment import QualitySettings

_PARTS = ("equality", "cost")
# The last bits of a vector depend on which texts share its batch: each is computed by itself; and once, to save time.
_ALIKE = ("batching.max_batch_size=1", "cache.max_mb=256")
# Queries that meet themselves in flight would cost nothing.
_NONE_SHARED = ("batching.share_equal_texts=false",)


@dataclass(frozen=True)
class Spoken:
    """The dialects that a server speaks, its own first, and by name what it answers to the others."""

    embeds: list[EmbedDialect]
    reranks: list[RerankDialect]
    missing: dict[str, str]


async def spoken(server: OwnServer, stack: AsyncExitStack, wanted: Sequence[str]) -> Spoken:
    """One question in each dialect whose name holds one of `wanted` (none: all); the server's own are always asked.

    A model that scores pairs has no embeddings: there they are not asked for.
    """
    grpc_dialects = await stack.enter_async_context(GrpcDialects(LOOPBACK, server.grpc_port, server.model))
    http_dialects = await stack.enter_async_context(HttpDialects(LOOPBACK, server.http_port, server.model))
    lower = [name.lower() for name in wanted]
    found = Spoken([], [], {})
    embeds = [] if server.scores_pairs else grpc_dialects.embeds() + http_dialects.embeds()
    for number, embed in enumerate(embeds):
        if number and lower and not any(name in embed.name.lower() for name in lower):
            continue
        if answered := await _missing(embed.call(["what is a cell"])):
            found.missing[embed.name] = answered
        else:
            found.embeds.append(embed)
    for number, rerank in enumerate(grpc_dialects.reranks() + http_dialects.reranks()):
        if number and lower and not any(name in rerank.name.lower() for name in lower):
            continue
        if answered := await _missing(rerank.call("what is a cell", ["the unit of life"])):
            found.missing[rerank.name] = answered
        else:
            found.reranks.append(rerank)
    return found


async def _missing(question: Awaitable[Any]) -> str:
    """What the server says where it has no such route or method; empty where it has, whatever it answers."""
    try:
        await question
    except DialectMissing as missing:
        return f"{missing.code}: {missing.message}"
    except RequestFailed:
        return ""
    return ""


class Study:
    def __init__(self, arguments: argparse.Namespace, stop: Stop) -> None:
        self._arguments = arguments
        self._stop = stop

    async def equality(self, labelled: Slice) -> int:
        arguments = self._arguments
        async with AsyncExitStack() as stack:
            overrides = [*_ALIKE, *arguments.overrides]
            server = await stack.enter_async_context(own_server(arguments.experiment, overrides, self._stop))
            found = await self._stop.race(spoken(server, stack, arguments.dialects))
            steps = tqdm(total=len(found.embeds) + len(found.reranks), desc="equality", disable=None)
            equality = Equality(labelled, server.info, steps.update)
            rows = await self._stop.race(equality.rows(found.embeds, found.reranks))
            steps.close()
        facts = labelled.facts()
        print(f"{server.info['title']}\n{facts.name}: {facts.queries} queries, {facts.pairs} pairs\n")
        print(equality_table(rows, found.missing), flush=True)
        return EXIT_OK if all(row.is_right for row in rows) else EXIT_FAILED_RUN

    async def cost(self, loads: Sequence[CostLoad]) -> int:
        arguments = self._arguments
        async with AsyncExitStack() as stack:
            overrides = [*_NONE_SHARED, *arguments.overrides]
            server = await stack.enter_async_context(own_server(arguments.experiment, overrides, self._stop))
            if server.scores_pairs:
                raise ConfigError(
                    "this model is a cross-encoder, and the cost is that of embeddings: use --part equality"
                )
            found = await self._stop.race(spoken(server, stack, arguments.dialects))
            turns = len(loads) * arguments.rounds * len(found.embeds)
            steps = tqdm(total=turns, desc="cost", disable=None)
            bench = CostBench(server, arguments.seconds, self._stop, steps.update)
            measured = [(load, await bench.measure(load, found.embeds, arguments.rounds)) for load in loads]
            steps.close()
        print(f"\n{server.info['title']}; {arguments.seconds:g} s each, one client process")
        for load, rounds in measured:
            print(f"\n{cost_table(load, rounds)}")
        for name, answered in found.missing.items():
            print(f"\nNot spoken by this server: {name} ({answered})")
        failed = sum(each.failed.total() for _, rounds in measured for each in rounds.values())
        return EXIT_FAILED_RUN if failed else EXIT_OK


async def _run(arguments: argparse.Namespace, stop: Stop) -> int:
    parts = arguments.parts or list(_PARTS)
    study = Study(arguments, stop)
    # Files are read before a server is started: a wrong path costs nobody a minute.
    labelled = load_slice(QualitySettings(pairs=arguments.pairs, qrels=arguments.qrels))
    texts = await load_dataset(arguments.pairs or "sample")
    queries = await load_dataset(arguments.queries) if arguments.queries else texts
    loads = [CostLoad(queries.workload("queries", 0), 1, 32), CostLoad(texts.workload("passages", 0), 32, 8)]
    code = await study.equality(labelled) if "equality" in parts else EXIT_OK
    if "cost" in parts:
        code = await study.cost(loads) or code
    return code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ml_inference_server.benchmark.studies.dialects", description=__doc__.split("\n")[0]
    )
    add_arguments(parser)
    parser.add_argument(
        "--queries", default="", metavar="FILE", help="single queries to load with; unset: those of --pairs"
    )
    parser.add_argument("--part", dest="parts", action="append", choices=_PARTS, help="do this part only; unset: both")
    parser.add_argument(
        "--dialect",
        dest="dialects",
        action="append",
        default=[],
        metavar="WORDS",
        help="only dialects whose name holds these words, beside Embed and Rerank; may be given several times",
    )
    parser.add_argument("--seconds", type=positive_float, default=4.0, help="length of each measured load (default 4)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="turns of all dialects (default 3)")
    return run_stoppable(lambda stop: _run(parser.parse_args(argv), stop))


if __name__ == "__main__":
    sys.exit(main())
