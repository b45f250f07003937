#!/usr/bin/env python3
"""Runs all experiments one after the other; --help tells the flags. Works from any folder."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - this is what an older Python would start
        print(f"Error: Python 3.11 or newer is needed, and this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    try:
        from ml_inference_server.benchmark import all_experiments
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ml_inference_server"):
            raise
        print(
            f"Error: {error.name} is not installed here: run"
            f" '{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}', or ./run_experiment.sh, which does it",
            file=sys.stderr,
        )
        return 2
    return all_experiments.main()


if __name__ == "__main__":
    sys.exit(main())
