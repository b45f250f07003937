"""OpenVINO on the cpu: FP32, BF16, FP16 by precision hint, INT8 through NNCF; reads the graph of `export`."""

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ml_inference_server.backends.base import (
    BackendInfo,
    Encoded,
    Progress,
    TextTokenizer,
    TokenBatch,
    run_in_company,
)
from ml_inference_server.backends.exported.folder import exported_graph
from ml_inference_server.backends.model.export import Exported, engine_errors, export, graph_inputs
from ml_inference_server.backends.model.warmup import run_warmup
from ml_inference_server.utils.cache import cached
from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.cores import threads_stay_free
from ml_inference_server.utils.cpu import cpu_flags, has_native_bf16, instruction_set
from ml_inference_server.utils.errors import ModelError
from ml_inference_server.utils.installation import pip_install
from ml_inference_server.utils.sample import sample_pairs

log = logging.getLogger(__name__)

_HINTS: Mapping[Quantization, str] = {"none": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
# Kernels kept for shapes that were met. By default memory grows with every new one, by gigabytes in a few minutes of
# mixed lengths; with this many it stays flat, and the same batches take the same time.
_CACHED_KERNELS = "64"
_INTEGERS = ("i8", "u8")
# Of the sample that ships with the project, never of what is scored later.
_CALIBRATION_ROWS = 300


class OpenVinoBackend:
    """The exported graph, compiled once; each thread has a request of its own."""

    def __init__(self, model: ModelSettings) -> None:
        self._settings = model
        self._quantization = model.precision
        self._local = threading.local()

    @staticmethod
    def supported() -> Mapping[str, Sequence[Quantization]]:
        """BF16 and FP16 only where the processor has them: OpenVINO would run FP32 instead, without a word."""
        capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        halves: list[Quantization] = []
        if "BF16" in capabilities and has_native_bf16():
            halves.append("bf16")
        if "FP16" in capabilities and {"avx512_fp16", "amx_fp16"} & cpu_flags():
            halves.append("fp16")
        return {"cpu": ("none", *halves, "int8")}

    def load_model(self) -> None:
        """The graph of an exported folder, or the model's, from the cache or made now, compiled.

        ModelError if any of it fails.
        """
        self._exported = exported_graph(self._settings) or export(self._settings)
        core = ov.Core()
        file = _file(self._exported, self._quantization)
        configuration = {
            "INFERENCE_PRECISION_HINT": _HINTS[self._quantization],
            "NUM_STREAMS": str(self._settings.streams),
            "INFERENCE_NUM_THREADS": str(self._settings.threads * self._settings.streams),
            "CPU_RUNTIME_CACHE_CAPACITY": _CACHED_KERNELS,
            # It would put its threads on the first cores, and those of every process and server on the same ones.
            "ENABLE_CPU_PINNING": "NO",
        }
        with engine_errors(f"OpenVINO cannot run {self._exported.describe(file)}"):
            self.compiled = core.compile_model(core.read_model(str(file)), "CPU", configuration)
        self.input_names = [each.get_any_name() for each in self.compiled.inputs]
        self._info = self._describe(file)

    def _describe(self, file: Path) -> BackendInfo:
        executed = self.compiled.get_runtime_model().get_ops()
        precisions = Counter(_runtime_precision(op) for op in executed if _is_matrix_product(op))
        integer = sum(precisions[name] for name in _INTEGERS)
        (precision, _), *_ = precisions.most_common(1)
        streams = int(self.compiled.get_property("NUM_STREAMS"))
        return BackendInfo(
            backend="openvino",
            model=self._exported.model,
            task=self._exported.task,
            similarity=self._exported.similarity,
            device="cpu",
            device_name=str(ov.Core().get_property("CPU", "FULL_DEVICE_NAME")).strip(),
            dtype="int8" if integer else _DTYPES.get(precision, precision),
            quantized_layers=integer,
            execution_provider=f"OpenVINO {ov.__version__.split('-')[0]}",
            instruction_set=instruction_set(),
            threads=max(1, int(self.compiled.get_property("INFERENCE_NUM_THREADS")) // streams),
            concurrency=streams,
            max_tokens=self._exported.tokenizer.max_tokens,
            dimension=self._exported.dimension,
            weights_sha256=self._exported.files.weights_sha256,
            weights_file=self._exported.describe(file),
            model_sha256=self._exported.files.model_sha256,
            source=self._exported.files.source,
            parameters=self._exported.parameters,
            random_weights=self._settings.random_weights,
            versions={"openvino": ov.__version__},
        )

    def warmup(self, progress: Progress) -> None:
        run_warmup(self, progress)

    def infer(self, batch: TokenBatch) -> NDArray[np.float32]:
        return run_in_company(batch, self._exported.company, self._run)

    def bare_call(self, batch: TokenBatch) -> object:
        """The engine's own call and nothing of ours but the padding: what `infer` is measured against."""
        return self._request(batch)

    def _request(self, batch: TokenBatch) -> Any:
        """This thread's request, run."""
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self.compiled.create_infer_request()
        request.infer(graph_inputs(self.input_names, batch.padded(self.tokenizer.pad_id)), share_inputs=True)
        return request

    def _run(self, batch: TokenBatch) -> NDArray[np.float32]:
        request = self._request(batch)
        return np.array(request.get_tensor(self._exported.output).data, np.float32)

    @property
    def info(self) -> BackendInfo:
        return self._info

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._exported.tokenizer


def _is_matrix_product(op: Any) -> bool:
    return str(op.get_rt_info()["layerType"].astype(str)) in ("FullyConnected", "MatMul")


def _runtime_precision(op: Any) -> str:
    """The precision in which the compiled graph really runs an operation."""
    return str(op.get_rt_info()["runtimePrecision"].astype(str))


def _file(exported: Exported, quantization: Quantization) -> Path:
    needs_quantising = quantization == "int8" and exported.precision != "int8"
    return quantize_int8(exported) if needs_quantising else exported.file


def write_graph(exported: Exported, quantization: Quantization, folder: Path) -> tuple[Path, None]:
    """Put the graph into an exported folder, as model.xml: from which file, and nothing more is to be known.

    BF16 and FP16 have the FP32 graph: the engine takes the precision when it compiles.
    """
    file = _file(exported, quantization)
    with engine_errors(f"OpenVINO cannot run {exported.describe(file)}"):
        model = ov.Core().read_model(str(file))
        ov.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
    return file, None


def quantize_int8(exported: Exported) -> Path:
    """The graph in INT8, calibrated by NNCF on the sample's texts; made now or read from the cache."""
    try:
        import nncf
    except ModuleNotFoundError as error:
        raise ModelError(f"INT8 with OpenVINO needs the package nncf: {pip_install('export')}") from error

    key = exported.key | {"nncf": nncf.__version__, "openvino": ov.__version__, "rows": _CALIBRATION_ROWS}

    def make(folder: Path) -> None:
        log.info(
            "quantising to INT8 with NNCF on %d rows of the sample (once; later starts read the cache)",
            _CALIBRATION_ROWS,
        )
        with engine_errors(f"OpenVINO cannot run {exported.weights}"):
            model = ov.Core().read_model(str(exported.file))
        names = [each.get_any_name() for each in model.inputs]

        def arrays(row: Encoded) -> dict[str, NDArray[np.int64]]:
            return graph_inputs(names, TokenBatch.of([row]).padded(exported.tokenizer.pad_id))

        nncf.set_log_level(logging.ERROR)
        # NNCF calibrates with an engine that binds threads to cores, and they outlive it.
        with threads_stay_free(), engine_errors(f"NNCF cannot quantise {exported.weights}"):
            quantized = nncf.quantize(
                model,
                nncf.Dataset(_calibration_rows(exported), arrays),
                subset_size=_CALIBRATION_ROWS,
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
            )
        ov.save_model(quantized, str(folder / "model_int8.xml"), compress_to_fp16=False)

    return cached("openvino-int8", key, make) / "model_int8.xml"


def _calibration_rows(exported: Exported) -> list[Encoded]:
    """What the model will see: pairs for a cross-encoder, queries and passages for an embedding model."""
    pairs = sample_pairs()
    if exported.task == "cross_encoder":
        return exported.tokenizer.encode_pairs(pairs[:_CALIBRATION_ROWS])
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    return exported.tokenizer.encode(texts[:_CALIBRATION_ROWS])
