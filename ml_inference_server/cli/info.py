"""mlis info: what a running server serves."""

import argparse
import json

from google.protobuf.json_format import MessageToDict

from ml_inference_server.cli import remote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints what was asked for and what runs, as one JSON object."
    remote.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    with remote.connected(arguments) as client:
        info = client.info()
    answer = MessageToDict(info.message, preserving_proto_field_name=True)
    answer["settings"] = json.loads(answer.pop("settings_json", "{}"))
    print(json.dumps(answer, indent=2, ensure_ascii=False))
    return 0
