"""mlis completion: a script for the shell, made from the commands and their arguments."""

import argparse

import shtab

from ml_inference_server import cli

_WHERE = """\
bash:  mlis completion bash >> ~/.bash_completion
zsh:   mlis completion zsh > "${fpath[1]}/_mlis"
fish:  mlis completion fish > ~/.config/fish/completions/mlis.fish

Then open a new terminal.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints a completion script. Where it goes:"
    parser.epilog = _WHERE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(arguments: argparse.Namespace) -> int:
    print(shtab.complete(cli.build_parser(cli.COMMANDS), arguments.shell))
    return 0
