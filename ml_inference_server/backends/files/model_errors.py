"""What a library raises over a model, as one line that a user can act on."""

import contextlib
import logging
from collections.abc import Iterator

from ml_inference_server.backends.files.model_files import ModelFiles
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError, StartError

log = logging.getLogger(__name__)

# Of what a library says, and of a name.
_MOST_CHARACTERS = 240


def one_line(error: BaseException) -> str:
    """What happened, in one line; an error that is not ours is named, and cut where it goes on for long."""
    if isinstance(error, StartError):
        return str(error)
    words = " ".join(str(error).split())
    short = words if len(words) <= _MOST_CHARACTERS else words[:_MOST_CHARACTERS] + "..."
    return f"{type(error).__name__}: {short}" if short else type(error).__name__


@contextlib.contextmanager
def start_errors(model: ModelSettings) -> Iterator[None]:
    """ModelError, in one line, for whatever a library raises over a model's files or too large a number."""
    try:
        yield
    except StartError:
        raise
    except Exception as error:
        log.debug("starting failed", exc_info=error)
        raise ModelError(
            f"model {shown(model.name)} cannot be started with backend {model.backend} ({one_line(error)}): check its "
            f"files and the model settings; --log-level DEBUG shows where it failed"
        ) from error


def shown(name: str) -> str:
    """A model's name or path as it can stand in a sentence."""
    return name if len(name) <= _MOST_CHARACTERS else name[:_MOST_CHARACTERS] + "..."


@contextlib.contextmanager
def errors_of_the_model(files: ModelFiles) -> Iterator[None]:
    """ModelError for whatever sentence-transformers raises when it runs a text: then no backend can."""
    try:
        yield
    except StartError:
        raise
    except Exception as error:
        log.debug("the model cannot be run", exc_info=error)
        raise ModelError(
            f"sentence-transformers cannot run a text through model {files.folder} ({one_line(error)}): its modules, "
            f"weights and tokenizer do not fit together; download it again"
        ) from error
