"""torch.compile on the CPU for a packed model: one graph for every mix of lengths, its machine code cached on disk."""

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._inductor import config as inductor_config

from ml_inference_server.backends.base import Encoded, TokenBatch, packed_sizes
from ml_inference_server.backends.compiled.native import compiler, no_compiler
from ml_inference_server.backends.compiled.packed import Inputs, PackedModule, check_fit
from ml_inference_server.backends.model.loading import LoadedModel
from ml_inference_server.utils.cache import working_folder
from ml_inference_server.utils.cpu import cpu_flags
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)

# Least cosine between the compiled and the uncompiled model on random tokens: far below the noise of BF16, and of INT8,
# far above chance.
_SAME, _SAME_INT8 = 0.995, 0.95
# Sizes up to here are warmed up: the most tokens in a batch, unless the settings allow more.
_WARM_TOKENS = 2048
_CHECK_LENGTHS = (40, 9, 2, 23)

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 512 * 2**20
# What the machine code of a small model takes, its weights included.
_ROOM_BYTES = 128 * 2**20


class CompiledModel:
    """A loaded model, packed and compiled. Callable from several threads at a time."""

    def __init__(self, loaded: LoadedModel, threads: int, *, int8: bool = False) -> None:
        """Compile, or read the cache; then compare with the uncompiled model. ModelError if either fails.

        int8: the matrices of the layers become INT8. Takes `loaded` over: its own module cannot be run afterwards.
        """
        if compiler() is None:
            raise ModelError(no_compiler())
        check_fit(loaded)
        probe = _probe(loaded)
        padded = probe.padded(loaded.tokenizer.pad_id)
        with torch.inference_mode():
            expected = loaded.module(torch.from_numpy(padded.input_ids), torch.from_numpy(padded.attention_mask))
        self._module = PackedModule(loaded, int8=int8).eval()
        self.attention = self._module.attention
        self.quantized_layers = self._module.quantized_layers
        _use_cache(loaded.files.model_sha256, threads)
        options = _options(loaded.base.dtype)
        torch._dynamo.config.cache_size_limit = 64  # noqa: SLF001
        self._graph = torch.compile(self._module, dynamic=True)
        log.info("compiling the model for this processor (about a minute at the first start, some seconds later)")
        started = time.monotonic()
        try:
            # A patch and not torch.compile's `options`: the tracing reads `freezing` too, and would not see those.
            with inductor_config.patch(options):
                got = torch.from_numpy(self(probe))
        except Exception as error:
            log.debug("compiling failed", exc_info=error)
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ModelError(
                f"torch.compile cannot compile this model ({lines[0][:200] if lines else type(error).__name__}): "
                f"set model.compile: false"
            ) from error
        log.info("compiled in %.0f s", time.monotonic() - started)
        _check_same(got, expected, _SAME_INT8 if int8 else _SAME)

    def __call__(self, batch: TokenBatch) -> NDArray[np.float32]:
        """(batch, dimension) float32."""
        out: NDArray[np.float32] = self.run(self.pack(batch))[: len(batch)].float().numpy()
        return out

    def warmup_shapes(self, max_tokens: int) -> list[tuple[int, int]]:
        """(texts, tokens) that between them meet every size of batch up to _WARM_TOKENS."""
        sizes = packed_sizes(_WARM_TOKENS)
        return [(texts, size // texts) for size in sizes for texts in [max(2, -(-size // max_tokens))]]

    def pack(self, batch: TokenBatch) -> Inputs:
        """The inputs of `run`."""
        return self._module.inputs(batch)

    def run(self, inputs: Inputs) -> torch.Tensor:
        """The bare graph: (texts, dimension), with one text more where the batch had only one."""
        with torch.no_grad():
            rows: torch.Tensor = self._graph(*inputs)
        return rows


def keep_freed_memory() -> None:
    """Tell glibc to keep the megabytes that each batch takes and frees, instead of faulting them in again.

    Worth about a tenth of the time of a batch. Other C libraries have no such switch, and are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


def _options(dtype: torch.dtype) -> dict[str, Any]:
    """Of inductor, for a model whose weights are of that type.

    freezing: weights become constants. cpp_wrapper: the whole graph runs as one C++ call that leaves Python's lock to
    the event loop and to the other streams. cpp.weight_prepack: weights are laid out for oneDNN's products, which the
    GELU after them becomes a part of. For FP32 without AVX-512 that GELU takes a third of the time of such a product;
    MKL's products and a GELU by itself are faster.
    """
    flags = cpu_flags()
    is_mkl_faster = (
        dtype == torch.float32 and "avx2" in flags and "avx512f" not in flags and torch.backends.mkl.is_available()
    )
    return {"freezing": True, "cpp_wrapper": True, "cpp.weight_prepack": not is_mkl_faster}


def _probe(loaded: LoadedModel) -> TokenBatch:
    """Random tokens in texts of several lengths."""
    random = np.random.default_rng(0)
    vocabulary = int(loaded.base.get_input_embeddings().num_embeddings)
    lengths = np.minimum(_CHECK_LENGTHS, loaded.tokenizer.max_tokens)
    texts = (random.integers(vocabulary // 2, vocabulary, int(length), np.int32) for length in lengths)
    return TokenBatch.of([Encoded(ids) for ids in texts])


def _check_same(got: torch.Tensor, expected: torch.Tensor, least: float) -> None:
    """ModelError if the compiled rows are others than the uncompiled ones: an architecture that packing breaks."""
    got, expected = got.double(), expected.double()
    if expected.shape[1] == 1:  # logits
        spread = (expected - expected.mean()).abs().max()
        close = bool((got - expected).abs().max() <= 0.05 * spread + 0.05)
    else:
        close = bool((torch.nn.functional.cosine_similarity(got, expected) >= least).all())
    if got.shape != expected.shape or not close:
        raise ModelError("the compiled model answers otherwise than the uncompiled one: set model.compile: false")


def _use_cache(model_sha256: str, threads: int) -> None:
    """Let torch keep its machine code in our cache folder, one folder for each of what it depends on."""
    key = {"torch": torch.__version__, "model": model_sha256, "flags": sorted(cpu_flags()), "threads": threads}
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    folder = working_folder("compiled", name, room_bytes=_ROOM_BYTES)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
