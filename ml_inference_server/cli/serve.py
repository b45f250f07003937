"""mlis serve: the program of run_server.sh, which takes the model by itself as well."""

import argparse

from ml_inference_server import main
from ml_inference_server.utils.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    main.add_arguments(parser)
    parser.add_argument("model", nargs="?", help="Hugging Face name or local folder, as --model-name")


def run(arguments: argparse.Namespace) -> int:
    if arguments.model is not None:
        if arguments.model_name is not None:
            raise ConfigError(f"the model is named twice: {arguments.model} and --model-name {arguments.model_name}")
        arguments.model_name = arguments.model
    return main.run(arguments)
