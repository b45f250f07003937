"""Writing and serving exported folders, for the tests of both."""

from pathlib import Path

import pytest

from ml_inference_server.backends.startup.start import Started, start_backend
from ml_inference_server.backends.startup.write_folder import write_folder
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import EXIT_CONFIG, EXIT_MODEL, ConfigError, ModelError, StartError
from tests.parity.tiny_model import settings


def write(model: Path, folder: Path, backend: str = "onnx", *, force: bool = False, **keys: object) -> list[str]:
    """Export a model; the steps that were told."""
    steps: list[str] = []
    write_folder(settings(model, backend, **keys), folder, force=force, step=steps.append)
    return steps


def serve(folder: Path, **keys: object) -> Started:
    """As `mlis serve FOLDER` does: nothing is said of the backend."""
    model = ModelSettings.model_validate({"name": str(folder), "threads": 1, "streams": 1, **keys})
    return start_backend(model, lambda phase: None)


def refused(folder: Path, error: type[StartError] = ModelError, **keys: object) -> str:
    """The one line that the server would end with."""
    with pytest.raises(error) as caught:
        serve(folder, **keys)
    assert caught.value.exit_code == (EXIT_CONFIG if error is ConfigError else EXIT_MODEL)
    assert "\n" not in str(caught.value)
    return str(caught.value)
