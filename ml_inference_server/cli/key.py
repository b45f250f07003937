"""mlis key: the file of keys that a server lets in."""

import argparse
import sys
from pathlib import Path

from ml_inference_server.door.keys import create_key, list_keys, revoke_key
from ml_inference_server.door.rights import Right
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.files import replace_file, writable

_FILE = Path("keys.yaml")
_RIGHTS_HELP = "infer (embed, score, rerank, tokenize), metrics (figures and settings), admin (what changes the server)"


def _rights(text: str) -> list[Right]:
    try:
        return [Right(each.strip()) for each in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected some of {', '.join(Right)}, with commas") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes, lists and takes back the keys of server.auth.keys_file. The file holds a hash of each key; a running "
        "server reads it anew."
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    create = actions.add_parser("create", help="make a key; it is printed this once", allow_abbrev=False)
    create.add_argument("name", help="who it is for: letters, digits, and . _ -")
    create.add_argument(
        "--rights", type=_rights, default=[Right.INFER], metavar="RIGHT,...", help=f"{_RIGHTS_HELP} (default: infer)"
    )
    revoke = actions.add_parser("revoke", help="take a key back", allow_abbrev=False)
    revoke.add_argument("name")
    for action in (create, actions.add_parser("list", help="names and rights", allow_abbrev=False), revoke):
        action.add_argument("--file", type=Path, default=_FILE, metavar="FILE", help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    path: Path = arguments.file
    if arguments.action == "list":
        for key in list_keys(path):
            limits = " ".join(f"{name}={value:g}" for name, value in key.limits.model_dump(exclude_none=True).items())
            print("\t".join(filter(None, [key.name, ",".join(sorted(key.rights)), limits])))
    elif arguments.action == "revoke":
        _replace(path, revoke_key(path, arguments.name))
    else:
        token, content = create_key(path, arguments.name, arguments.rights)
        _replace(path, content)
        print(token)
        print(f"the key of {arguments.name}, which is shown this once; its hash is in {path}", file=sys.stderr)
    return 0


def _replace(path: Path, content: str) -> None:
    real = writable(path, "--file")
    try:
        replace_file(real, content)
    except OSError as error:
        raise ConfigError(f"--file {path}: cannot be written: {error.strerror}") from error
