"""No configuration may ask for more memory than its model's files can fill: refused before it is taken."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ml_inference_server.backends.files.model_files import ModelFiles
from ml_inference_server.utils.errors import ModelError

# Buffers that no file holds: tables of positions, masks.
_BUFFER_BYTES = 1 << 30
_BUFFERS = 100_000
# A tensor in memory has FP32, one in a file may have 4 bits; and each is made some times while it loads.
_TIMES_THE_FILES = 8


class LoadGuard(TorchDispatchMode):
    """While it is entered: ModelError for a tensor far larger than all weights of `files`, or ever more tensors."""

    def __init__(self, files: ModelFiles) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._folder = files.folder
        weights_bytes = sum(file.stat().st_size for file in files.folder.rglob("*.safetensors"))
        self._most_bytes = _BUFFER_BYTES + _TIMES_THE_FILES * weights_bytes
        self._made = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if any(argument.name == "device" for argument in func._schema.arguments):  # noqa: SLF001
            self._made += 1
            if self._made > _BUFFERS:
                raise self._refusal(f"more than {_BUFFERS} tensors")
            if torch.device(options.get("device") or "cpu").type != "meta":
                size = func(*args, **options | {"device": torch.device("meta"), "pin_memory": False})
                if size.numel() * size.element_size() > self._most_bytes:
                    raise self._refusal(f"a tensor of {tuple(size.shape)}")
        return func(*args, **options)

    def _refusal(self, what: str) -> ModelError:
        return ModelError(
            f"a configuration in {self._folder} asks for {what}, which the model's files cannot fill: it belongs to "
            f"another model, or is damaged; download it again"
        )
