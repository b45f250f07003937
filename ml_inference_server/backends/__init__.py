"""The table of backends. A new one is one file and one row here."""

import difflib
import importlib
from typing import cast

from ml_inference_server.backends.base import Backend
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError
from ml_inference_server.utils.installation import remedy

BACKENDS = {
    "pytorch": "ml_inference_server.backends.pytorch:PyTorchBackend",
    "onnx": "ml_inference_server.backends.onnx:OnnxBackend",
    "openvino": "ml_inference_server.backends.openvino:OpenVinoBackend",
    "fake": "ml_inference_server.backends.fake:FakeBackend",
}


def backend_class(name: str) -> type[Backend]:
    """The class behind a name; its library is imported now and not before.

    ModelError if there is no such backend, or if its library is missing.
    """
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ModelError(f"model.backend: there is no backend {name!r}; this version has {', '.join(BACKENDS)}{hint}")
    module_name, _, class_name = BACKENDS[name].partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ModelError(f"model.backend {name} needs the package {error.name}: {remedy(error.name or '')}") from error
    return cast(type[Backend], getattr(module, class_name))


def create_backend(model: ModelSettings) -> Backend:
    """An unloaded backend for settings that `resolve` has made concrete."""
    return backend_class(model.backend)(model)
