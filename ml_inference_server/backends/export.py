"""The model's whole pipeline (transformer, pooling, Dense, normalisation) as one ONNX graph, cached by content.

Batch and length are dynamic. ONNX Runtime and OpenVINO both read what is written here, so there is one export to trust.
"""

import hashlib
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

from ml_inference_server.backends.model_files import ModelFiles
from ml_inference_server.backends.tokenizer import FastTokenizer
from ml_inference_server.utils.cache import cached
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)

GRAPH_VERSION = 1
OUTPUT = "rows"


@dataclass(frozen=True, slots=True)
class Exported:
    """`folder` holds `file`; `inputs` are the graph's input names in order."""

    file: Path
    files: ModelFiles
    tokenizer: FastTokenizer
    dimension: int
    parameters: int
    key: dict[str, object]


def export(settings: ModelSettings) -> Exported:
    """The FP32 graph of `settings.name`, exported now or read from the cache. ModelError if it cannot be exported."""
    import torch
    import transformers

    from ml_inference_server.backends.loading import load_model

    loaded = load_model(settings)
    key: dict[str, object] = {
        "graph_version": GRAPH_VERSION,
        "weights": loaded.files.weights_sha256,
        "folder": _configuration_hash(loaded.files.folder),
        "task": settings.task,
        "random_weights": settings.random_weights,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

    def make(folder: Path) -> None:
        log.info("exporting %s to ONNX (once; later starts read the cache)", settings.name)
        ids = torch.ones((2, 8), dtype=torch.int64)
        arguments = [ids, torch.ones_like(ids)] + ([torch.zeros_like(ids)] if loaded.takes_token_type_ids else [])
        names = ["input_ids", "attention_mask", "token_type_ids"][: len(arguments)]
        axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    loaded.module,
                    tuple(arguments),
                    str(folder / "model.onnx"),
                    input_names=names,
                    output_names=[OUTPUT],
                    dynamic_shapes=[axes] * len(arguments),
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )
        except ModuleNotFoundError as error:
            raise ModelError(f"exporting to ONNX needs the package {error.name}: pip install {error.name}") from error
        except Exception as error:
            log.debug("export failed", exc_info=error)
            lines = str(error).strip().splitlines()
            raise ModelError(
                f"{settings.name} cannot be exported to ONNX ({lines[0] if lines else type(error).__name__}): "
                f"use model.backend pytorch"
            ) from error

    folder = cached("onnx", key, make)
    parameters = sum(p.numel() for p in loaded.module.parameters())
    return Exported(folder / "model.onnx", loaded.files, loaded.tokenizer, loaded.dimension, parameters, key)


def _configuration_hash(folder: Path) -> str:
    """Of every JSON file of the model: pooling, prompts and limits are part of what is exported."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.json")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
