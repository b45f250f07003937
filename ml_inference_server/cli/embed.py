"""mlis embed: texts to vectors on a running server."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ml_inference_server.cli import remote
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.utils.files import replaceable

_TEXTS_PER_REQUEST = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints the vector of each text as a JSON array on a line of its own."
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="(default: the lines of standard input)")
    parser.add_argument("--prompt-name", metavar="NAME", help="one of the model's own prompts, such as query")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.npy", help="write one NumPy array there instead of printing"
    )
    remote.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    output = None if arguments.output is None else replaceable(arguments.output, "--output")
    vectors = _vectors(arguments)
    if output is not None:
        with output.open("wb") as file:
            np.save(file, np.concatenate(list(vectors)))
        return 0
    for row in itertools.chain.from_iterable(vectors):
        print(json.dumps(row.tolist()), flush=True)
    return 0


def _vectors(arguments: argparse.Namespace) -> Iterator[np.ndarray]:
    """Some rows at a time, in the order of the texts."""
    texts = iter(arguments.texts or (line.rstrip("\r\n") for line in sys.stdin))
    with remote.connected(arguments.target) as stub:
        while chunk := list(itertools.islice(texts, _TEXTS_PER_REQUEST)):
            request = pb.EmbedRequest(texts=chunk, prompt_name=arguments.prompt_name)
            reply = stub.Embed(request, timeout=arguments.timeout_s)
            yield np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)
