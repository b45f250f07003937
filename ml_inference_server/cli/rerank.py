"""mlis rerank: documents ordered for a query on a running server."""

import argparse
import json

from ml_inference_server.cli import remote
from ml_inference_server.cli.texts import given_or_lines


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"{text} is not a number of documents")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints the documents, best first, as JSON objects: index, score, document."
    parser.add_argument("query", metavar="QUERY")
    parser.add_argument("documents", nargs="*", metavar="DOCUMENT", help="(default: the lines of standard input)")
    parser.add_argument("--top-k", type=_count, default=0, metavar="N", help="how many of them (default: all)")
    remote.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    (query,) = given_or_lines([arguments.query], "query")
    documents = list(given_or_lines(arguments.documents, "document"))
    with remote.connected(arguments) as client:
        ranks = client.rerank(query, documents, top_k=arguments.top_k)
    for rank in ranks:
        found = {"index": rank.index, "score": rank.score, "document": documents[rank.index]}
        print(json.dumps(found, ensure_ascii=False))
    return 0
