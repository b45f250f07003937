"""mlis embed: texts to vectors on a running server."""

import argparse
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ml_inference_server.cli import remote
from ml_inference_server.cli.texts import given_or_lines
from ml_inference_server.utils.files import replace_file, writable

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
    if arguments.output is None:
        for row in itertools.chain.from_iterable(_vectors(arguments)):
            print(json.dumps(row.tolist()), flush=True)
        return 0
    output = writable(arguments.output, "--output")
    array = io.BytesIO()
    np.save(array, np.concatenate(list(_vectors(arguments))))
    replace_file(output, array.getvalue())
    return 0


def _vectors(arguments: argparse.Namespace) -> Iterator[np.ndarray]:
    """Some rows at a time, in the order of the texts; at least one."""
    texts = given_or_lines(arguments.texts, "text")
    with remote.connected(arguments) as client:
        while chunk := list(itertools.islice(texts, _TEXTS_PER_REQUEST)):
            yield client.embed(chunk, prompt_name=arguments.prompt_name)
