"""One logging set-up for every program of the project: lines on stderr, never a request's text."""

import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Literal

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")

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

_chosen: list[tuple[str, LogFormat]] = [("INFO", "text")]


def logging_choice() -> tuple[str, LogFormat]:
    """What `set_up_logging` was last called with: for processes that this one starts."""
    return _chosen[0]


def set_up_logging(level: str = "INFO", log_format: LogFormat = "text", worker: int | None = None) -> None:
    """`level` is a name of the logging module. Third-party chatter below WARNING is shown at DEBUG only.

    log_format: text for people, json for one object a line: time (UTC), level, logger, message, the fields of
    `log_event`, and the traceback as `exception`. worker: which of several writes here, said in each line.
    """
    _chosen[0] = level, log_format
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(worker) if log_format == "json" else _TextFormatter(worker))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    if level != "DEBUG":
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning)


def log_event(log: logging.Logger, level: int, event: str, fields: Mapping[str, object]) -> None:
    """One line with named values: `event name=value ...` as text, members of the object as JSON."""
    log.log(level, event, extra={"fields": fields})


class _TextFormatter(logging.Formatter):
    def __init__(self, worker: int | None) -> None:
        who = "" if worker is None else f"worker {worker}: "
        super().__init__(f"%(asctime)s %(levelname)-7s {who}%(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = getattr(record, "fields", {})
        told = "".join(f" {name}={value}" for name, value in fields.items() if value != "")
        return super().formatMessage(record) + told


class _JsonFormatter(logging.Formatter):
    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._who: dict[str, object] = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        time_utc = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{time_utc}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            **self._who,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
