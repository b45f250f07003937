"""The model's whole pipeline (transformer, pooling, Dense, normalisation) as one ONNX graph, cached by content.

Batch and length are dynamic. ONNX Runtime and OpenVINO both read what is written here, so there is one export to trust.
A model that brings such a graph of its own as onnx/model.onnx is run from that instead.
"""

import contextlib
import gc
import importlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import Company, PaddedBatch, TextTokenizer
from ml_inference_server.backends.files.model_files import ModelFiles, sha256_of
from ml_inference_server.backends.files.model_kind import Task
from ml_inference_server.utils.cache import cached
from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.errors import ModelError
from ml_inference_server.utils.installation import pip_install

if TYPE_CHECKING:
    from ml_inference_server.backends.model.loading import LoadedModel

log = logging.getLogger(__name__)

GRAPH_VERSION = 2
OUTPUT = "rows"
PREBUILT = "onnx/model.onnx"
# A protobuf takes 2 GiB; weights that come to more must lie in a file beside it. Those of an export always do.
MOST_BYTES_IN_ONE_FILE = 1_900_000_000
# What a graph that came with the model may call its rows: optimum's names, and our own.
_OUTPUTS = {"embedding": ("sentence_embedding", OUTPUT), "cross_encoder": ("logits", OUTPUT)}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """Read off an ONNX graph. needs_byte_products: its INT8 sums saturate on a CPU without them (VNNI and the like)."""

    dtype: str
    quantized_layers: int
    needs_byte_products: bool = False


@dataclass(frozen=True, slots=True)
class Exported:
    """`output` is the name of the graph's rows, `weights` what `file` is; `key` identifies its content.

    model: the name of the model that it was made from. precision: of `file`. facts: known of it without reading it.
    """

    file: Path
    output: str
    weights: str
    model: str
    files: ModelFiles
    tokenizer: TextTokenizer
    task: Task
    similarity: str
    company: Company
    dimension: int
    parameters: int
    key: dict[str, object] = field(default_factory=dict)
    precision: Quantization = "none"
    facts: GraphFacts | None = None

    def describe(self, file: Path) -> str:
        """For BackendInfo.weights_file: `file` is this graph, or was quantised from it."""
        return self.weights if file == self.file else f"{self.weights}, quantised to {file.name}"


def export(settings: ModelSettings) -> Exported:
    """The FP32 graph of `settings.name`: its own, or from the cache, or exported now. ModelError if there is none."""
    _need("onnx")
    from ml_inference_server.backends.model.loading import load_model

    exported = export_loaded(load_model(settings), settings)
    gc.collect()  # torch's model is no longer needed; its modules refer to each other, so it would stay for a while
    return exported


def export_loaded(loaded: "LoadedModel", settings: ModelSettings) -> Exported:
    """As `export`, of a model that is loaded already."""
    _need("onnx")
    import torch
    import transformers

    key: dict[str, object] = {
        "graph_version": GRAPH_VERSION,
        "model": loaded.files.model_sha256,
        "task": loaded.task,
        "random_weights": settings.random_weights,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    parameters = sum(p.numel() for p in loaded.module.parameters())

    def made(file: Path, output: str, weights: str) -> Exported:
        return Exported(
            file,
            output,
            weights,
            settings.name,
            loaded.files,
            loaded.tokenizer,
            loaded.task,
            loaded.similarity,
            loaded.company,
            loaded.dimension,
            parameters,
            key,
        )

    if loaded.variants > 1:
        raise ModelError(
            f"{settings.name} treats texts in {loaded.variants} different ways (a Router, or prompts that its pooling "
            f"leaves out), which is more than one graph: use model.backend pytorch"
        )
    prebuilt = loaded.files.folder / PREBUILT
    if prebuilt.is_file() and not settings.random_weights:
        output, unfit = _inspect(prebuilt, loaded)
        if not unfit:
            # model.onnx_data and the like hold what is too large for the graph's own file.
            digests = [sha256_of(file) for file in sorted(prebuilt.parent.glob("model.onnx*"))]
            weights = f"{PREBUILT} (sha256 {digests[0][:16]}) beside {loaded.files.weights_file}"
            log.info("using the model's own graph %s", weights)
            key |= {"prebuilt": digests}
            return made(prebuilt, output, weights)
        log.warning("%s of the model is not used: %s; exporting the model instead", PREBUILT, unfit)

    def make(folder: Path) -> None:
        _need("onnxscript")
        log.info("exporting %s to ONNX (once; later starts read the cache)", settings.name)
        ids = torch.ones((2, 8), dtype=torch.int64)
        arguments = [ids, torch.ones_like(ids)] + ([torch.zeros_like(ids)] if loaded.takes_token_type_ids else [])
        axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        cannot = f"{settings.name} cannot be exported to ONNX"
        with engine_errors(cannot), _quiet(), torch.no_grad():
            torch.onnx.export(
                loaded.module,
                tuple(arguments),
                str(folder / "model.onnx"),
                input_names=_INPUTS[: len(arguments)],
                output_names=[OUTPUT],
                dynamic_shapes=[axes] * len(arguments),
                dynamo=True,
                external_data=True,  # engines map such a file, and processes share it; a protobuf they copy
                verbose=False,
            )

    folder = cached("onnx", key, make)
    weights = f"{loaded.files.weights_file} exported to model.onnx"
    return made(folder / "model.onnx", OUTPUT, weights)


def graph_inputs(names: Sequence[str], batch: PaddedBatch) -> dict[str, NDArray[np.int64]]:
    """What a graph with inputs `names` takes for a batch; without segments their ids are all 0."""
    types = batch.token_type_ids if batch.token_type_ids is not None else np.zeros_like(batch.input_ids)
    arrays = dict(zip(_INPUTS, (batch.input_ids, batch.attention_mask, types), strict=True))
    return {name: arrays[name] for name in names}


@contextlib.contextmanager
def engine_errors(cannot: str) -> Iterator[None]:
    """ModelError, `cannot` with the reason and the remedy, for whatever an engine raises: they share no error type."""
    root = logging.getLogger()
    level, disabled = root.level, root.manager.disable
    handlers = [(handler, handler.level) for handler in root.handlers]
    try:
        yield
    except Exception as error:
        log.debug("%s", cannot, exc_info=error)
        raise ModelError(f"{cannot} ({_reason(error)}): use model.backend pytorch") from error
    finally:
        # Some of these libraries change the logging of the whole process; our warnings would be lost.
        root.setLevel(level)
        logging.disable(disabled)
        for handler, handler_level in handlers:
            handler.setLevel(handler_level)


def _reason(error: BaseException) -> str:
    """One line: of the error at the root, whose first line says it; the engines' own end with what matters."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    if not lines:
        return type(root).__name__
    return f"{type(root).__name__}: {lines[0][:300]}" if root is not error else lines[-1][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter prints, hundreds of lines where it fails, goes to the log at DEBUG."""
    printed = io.StringIO()
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "torch.export")]
    levels = [each.level for each in noisy]
    for each in noisy:
        each.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(noisy, levels, strict=True):
            each.setLevel(level)
        if printed.getvalue():
            log.debug("the exporter printed: %s", printed.getvalue())


def _need(package: str) -> None:
    """ModelError if a package that only the export uses is not installed."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"exporting to ONNX needs the package {error.name}: {pip_install('export')}, or use model.backend pytorch"
        ) from error


def _inspect(file: Path, loaded: "LoadedModel") -> tuple[str, str]:
    """(name of the output with the rows, "") of a graph that came with the model, or ("", why it cannot be used)."""
    import onnx

    kinds = onnx.TensorProto
    halves_and_bytes = (kinds.FLOAT16, kinds.BFLOAT16, kinds.INT8, kinds.UINT8)
    try:
        graph = onnx.load(str(file), load_external_data=False).graph
    except Exception as error:
        return "", f"it cannot be read ({type(error).__name__})"
    inputs = {each.name: each.type.tensor_type for each in graph.input}
    needed = _INPUTS if loaded.task == "cross_encoder" and loaded.takes_token_type_ids else _INPUTS[:2]
    if not set(needed) <= set(inputs) <= set(_INPUTS):
        return "", f"its inputs are {', '.join(inputs) or 'none'}, not {', '.join(needed)}"
    if any(each.elem_type != kinds.INT64 for each in inputs.values()):
        return "", "its inputs are not int64"
    if any(dim.HasField("dim_value") for each in inputs.values() for dim in each.shape.dim):
        return "", "its batch or length is fixed"
    if any(len(each.dims) == 2 and each.data_type in halves_and_bytes for each in graph.initializer):
        return "", "its weights are not FP32"
    for each in graph.output:
        shape = each.type.tensor_type.shape.dim
        if each.name in _OUTPUTS[loaded.task] and len(shape) == 2 and each.type.tensor_type.elem_type == kinds.FLOAT:
            if shape[1].HasField("dim_value") and shape[1].dim_value != loaded.dimension:
                return "", f"its rows have {shape[1].dim_value} numbers, the model's {loaded.dimension}"
            return each.name, ""
    return (
        "",
        f"no output is {' or '.join(_OUTPUTS[loaded.task])} in FP32, it has {', '.join(map(_shown, graph.output))}",
    )


def _shown(output: Any) -> str:
    return f"{output.name} ({len(output.type.tensor_type.shape.dim)}-D)"
