"""One logging set-up for every program of the project: lines on stderr, never a request's text."""

import logging
import sys
import warnings

_NOISY = (
    "httpx",
    "httpcore",
    "urllib3",
    "filelock",
    "sentence_transformers",
    "huggingface_hub",
    "transformers",
    "asyncio",
)


def set_up_logging(level: str = "INFO") -> None:
    """`level` is a name of the logging module. Third-party chatter below WARNING is shown at DEBUG only."""
    logging.basicConfig(
        stream=sys.stderr, level=level, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.captureWarnings(True)
    if level != "DEBUG":
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning)
