"""mlis rerank: documents ordered for a query on a running server."""

import argparse
import json
import sys

from ml_inference_server.cli import remote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints the documents, best first, as JSON objects: index, score, document."
    parser.add_argument("query", metavar="QUERY")
    parser.add_argument("documents", nargs="*", metavar="DOCUMENT", help="(default: the lines of standard input)")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="how many of them (default: all)")
    remote.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    documents = arguments.documents or [line.rstrip("\r\n") for line in sys.stdin]
    with remote.connected(arguments) as client:
        ranks = client.rerank(arguments.query, documents, top_k=arguments.top_k)
    for rank in ranks:
        found = {"index": rank.index, "score": rank.score, "document": documents[rank.index]}
        print(json.dumps(found, ensure_ascii=False))
    return 0
