"""ONNX Runtime: FP32 on cpu, cuda and mps (CoreML), FP16 on cuda, INT8 on the cpu; one graph from token ids to rows."""

import importlib.metadata
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ml_inference_server.backends.base import (
    BackendInfo,
    Progress,
    TextTokenizer,
    TokenBatch,
    run_in_company,
)
from ml_inference_server.backends.exported.folder import exported_graph
from ml_inference_server.backends.files.model_files import sha256_of
from ml_inference_server.backends.model.export import (
    MOST_BYTES_IN_ONE_FILE,
    Exported,
    GraphFacts,
    engine_errors,
    export,
    graph_inputs,
)
from ml_inference_server.backends.model.warmup import run_warmup
from ml_inference_server.utils.cache import cached
from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.cpu import cpu_flags, cpu_name, instruction_set
from ml_inference_server.utils.errors import ConfigError

log = logging.getLogger(__name__)

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "mps": "CoreMLExecutionProvider", "cpu": "CPUExecutionProvider"}
_INTEGER_OPS = ("MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")


class OnnxBackend:
    """The exported graph in one session; several threads may run it at a time."""

    def __init__(self, model: ModelSettings) -> None:
        self._settings = model
        self._quantization = model.precision

    @staticmethod
    def supported() -> Mapping[str, Sequence[Quantization]]:
        """What the installed build of ONNX Runtime has providers for."""
        available = ort.get_available_providers()
        precisions: dict[str, Sequence[Quantization]] = {"cuda": ("none",), "mps": ("none",), "cpu": ("none", "int8")}
        return {device: precisions[device] for device, provider in _PROVIDERS.items() if provider in available}

    def load_model(self) -> None:
        """The graph of an exported folder, or the model's, from the cache or made now, in a session.

        ModelError if any of it fails.
        """
        self._exported = exported_graph(self._settings) or export(self._settings)
        file = _file(self._exported, self._quantization)
        options = _options(self._settings.threads)
        provider = _PROVIDERS[self._settings.device]
        is_shared = self._settings.process_per_stream and self._settings.device == "cpu"
        with engine_errors(f"ONNX Runtime cannot run {self._exported.describe(file)}"):
            runs = prepacked(file) if is_shared else file
            self.session = ort.InferenceSession(str(runs), options, providers=[provider])
        self.input_names = [each.name for each in self.session.get_inputs()]
        self._info = self._describe(file)

    def _describe(self, file: Path) -> BackendInfo:
        is_stored = self._exported.facts is not None
        facts = self._exported.facts or graph_facts(file)
        if facts.needs_byte_products and not _has_byte_products():
            log.warning(
                "the INT8 weights have 8 bits, whose sums can saturate on this CPU (it has no VNNI): export the model "
                "on such a CPU for weights of 7 bits"
            )
        # The session may put a provider other than the one asked for in front: what it says is what runs.
        provider = self.session.get_providers()[0]
        device = next(name for name, each in _PROVIDERS.items() if each == provider)
        return BackendInfo(
            backend="onnx",
            model=self._exported.model,
            task=self._exported.task,
            similarity=self._exported.similarity,
            device=device,
            device_name=cpu_name() if device == "cpu" else provider.removesuffix("ExecutionProvider"),
            dtype=facts.dtype,
            quantized_layers=facts.quantized_layers,
            execution_provider=f"ONNX Runtime {ort.__version__} {provider}",
            instruction_set=instruction_set() if device == "cpu" else "",
            threads=self.session.get_session_options().intra_op_num_threads,
            concurrency=self._settings.streams,
            max_tokens=self._exported.tokenizer.max_tokens,
            dimension=self._exported.dimension,
            weights_sha256=self._exported.files.weights_sha256,
            weights_file=self._exported.describe(file),
            model_sha256=self._exported.files.model_sha256,
            source=self._exported.files.source,
            parameters=self._exported.parameters,
            random_weights=self._settings.random_weights,
            versions={"onnxruntime": ort.__version__}
            | ({} if is_stored else {"onnx": importlib.metadata.version("onnx")}),
        )

    def warmup(self, progress: Progress) -> None:
        run_warmup(self, progress)

    def infer(self, batch: TokenBatch) -> NDArray[np.float32]:
        return run_in_company(batch, self._exported.company, self._run)

    def bare_call(self, batch: TokenBatch) -> object:
        """The engine's own call and nothing of ours but the padding: what `infer` is measured against."""
        return self.session.run(None, graph_inputs(self.input_names, batch.padded(self.tokenizer.pad_id)))

    def _run(self, batch: TokenBatch) -> NDArray[np.float32]:
        inputs = graph_inputs(self.input_names, batch.padded(self.tokenizer.pad_id))
        rows: NDArray[np.float32] = self.session.run([self._exported.output], inputs)[0]
        return rows

    @property
    def info(self) -> BackendInfo:
        return self._info

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._exported.tokenizer


def _file(exported: Exported, quantization: Quantization) -> Path:
    needs_quantising = quantization == "int8" and exported.precision != "int8"
    return quantize_int8(exported) if needs_quantising else exported.file


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def prepacked(file: Path) -> Path:
    """The same graph with its weights laid out as this processor's kernels read them, in a file that is mapped.

    Several processes then hold them once. Otherwise each one would lay them out for itself, in memory of its own; so it
    is, with a warning, where the cache cannot take that file.
    """
    parts = sorted(file.parent.glob(f"{file.name}*"))
    key = {
        "graph": {part.name: sha256_of(part) for part in parts},
        "onnxruntime": ort.__version__,
        "cpu_flags": sorted(cpu_flags()),
    }

    def make(folder: Path) -> None:
        options = _options(threads=0)
        options.optimized_model_filepath = str(folder / "model.onnx")
        for name, value in (
            ("save_external_prepacked_constant_initializers", "1"),
            ("optimized_model_external_initializers_file_name", "model.onnx.data"),
            ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ):
            options.add_session_config_entry(f"session.{name}", value)
        ort.InferenceSession(str(file), options, providers=[_PROVIDERS["cpu"]])

    try:
        return cached("onnx-prepacked", key, make) / "model.onnx"
    except ConfigError as error:
        log.warning("each process holds the weights for itself: %s", error)
        return file


def write_graph(exported: Exported, quantization: Quantization, folder: Path) -> tuple[Path, GraphFacts]:
    """Put the graph in this precision into an exported folder: from which file, and what is to be known of it."""
    import onnx

    file = _file(exported, quantization)
    for part in file.parent.glob(f"{file.name}?*"):  # what is too large for the graph's own file lies beside it
        shutil.copyfile(part, folder / part.name)
    model = onnx.load(str(file), load_external_data=False)
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        del node.metadata_props[:]  # the exporter notes which line of which file on this machine each comes from
        node.doc_string = ""
    onnx.save(model, str(folder / file.name))
    return file, graph_facts(file)


def graph_facts(file: Path) -> GraphFacts:
    """What a session does not tell of its graph."""
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    quantized = sum(node.op_type in _INTEGER_OPS for node in graph.node)
    weights = [tensor for tensor in graph.initializer if len(tensor.dims) == 2]
    largest = max(weights, key=lambda tensor: int(np.prod(tensor.dims)))
    dtype = "int8" if quantized else onnx.helper.tensor_dtype_to_np_dtype(largest.data_type).name
    return GraphFacts(dtype, quantized, bool(quantized) and _has_byte_products())


def _has_byte_products() -> bool:
    return bool({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "feat_dotprod"} & cpu_flags())


def quantize_int8(exported: Exported) -> Path:
    """The graph with INT8 matrix products and per-channel weights, made now or read from the cache."""
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    # Without VNNI, products of unsigned and signed bytes saturate at 16 bits: 7-bit weights avoid that.
    reduce_range = not _has_byte_products()
    key = exported.key | {"int8": 1, "reduce_range": reduce_range, "onnxruntime": ort.__version__}

    def make(folder: Path) -> None:
        log.info("quantising to INT8 (once; later starts read the cache)")
        prepared = folder / "prepared.onnx"
        with engine_errors(f"ONNX Runtime cannot quantise {exported.weights}"):
            is_large = 4 * exported.parameters > MOST_BYTES_IN_ONE_FILE
            # Its optimiser holds the whole model in one protobuf.
            graph = exported.file
            if not is_large:  # it would write a graph whose weights it then looks for in another folder
                graph = folder / "whole.onnx"
                onnx.save(onnx.load(str(exported.file)), str(graph))
            quant_pre_process(
                str(graph),
                str(prepared),
                skip_symbolic_shape=True,
                skip_optimization=is_large,
                save_as_external_data=is_large,
                all_tensors_to_one_file=True,
            )
            model = onnx.load(str(prepared), load_external_data=not is_large)
            # It transposes the weights of Gemm; what the exporter noted of their shapes would then contradict them.
            del model.graph.value_info[:]
            if is_large:
                onnx.save(model, str(prepared))
            quantize_dynamic(
                str(prepared) if is_large else model,
                str(folder / "model_int8.onnx"),
                use_external_data_format=is_large,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
            )
        for file in folder.iterdir():
            if not file.name.startswith("model_int8"):
                file.unlink()

    return cached("onnx-int8", key, make) / "model_int8.onnx"
