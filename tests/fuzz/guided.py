"""One target under atheris, which looks for bytes that reach new code.

python -m tests.fuzz.guided TARGET [OPTIONS] FOLDERS

OPTIONS and FOLDERS are libFuzzer's: new inputs go to the first folder, seeds stand in all of them.
"""

import importlib
import sys


def main() -> None:
    """Does not return: libFuzzer ends the process."""
    name, *options = sys.argv[1:]
    atheris = importlib.import_module("atheris")
    packages = ["ml_inference_server.server", "ml_inference_server.utils", "json", "yaml"]
    with atheris.instrument_imports(include=packages, enable_loader_override=False):
        module = importlib.import_module("tests.fuzz.guided_targets")
    with module.targets() as targets:
        atheris.Setup([sys.argv[0], *options], targets[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
