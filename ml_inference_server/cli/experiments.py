"""mlis experiments: the program of run_all_experiments.py."""

import argparse

from ml_inference_server.benchmark import all_experiments

add_arguments = all_experiments.add_arguments


def run(arguments: argparse.Namespace) -> int:
    return all_experiments.run(arguments, arguments.command_line)
