"""mlis bench: the program of run_client.sh."""

import argparse

from ml_inference_server import client

add_arguments = client.add_arguments


def run(arguments: argparse.Namespace) -> int:
    return client.run(arguments, arguments.command_line)
