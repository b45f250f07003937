"""How fast the processor could run a transformer encoder: the rate of its matrix products over what a text needs."""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, TypeVar

from ml_inference_server.backends.compiled.native import compiler, load_operators
from ml_inference_server.backends.files.model_files import architecture_of, find_model
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.cpu import has_int8_vectors
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)

_SECONDS = 0.5

Shape = Mapping[str, int]
Result = TypeVar("Result")


def operations_of(tokens: int, shape: Shape) -> float:
    """Floating-point operations of a text in a transformer encoder: its matrix products, a multiply and an add each.

    For each layer and token 4 h^2 (query, key, value, output) + 2 h i (feed-forward), and 2 h for each token attended.
    """
    hidden, inner, layers = shape["hidden"], shape["intermediate"], shape["layers"]
    return 2.0 * layers * tokens * (4 * hidden**2 + 2 * hidden * inner + 2 * hidden * tokens)


def shape_of(model: ModelSettings) -> Shape | None:
    """hidden, intermediate and layers of the model's config.json; None where it does not name them."""
    files = architecture_of(model.name) if model.random_weights else find_model(model.name)
    config: dict[str, Any] = {}
    for file in (files.folder / "config.json", *files.folder.glob("*/config.json")):
        if file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            if "hidden_size" in config:
                break
    try:
        return {
            "hidden": int(config["hidden_size"]),
            "intermediate": int(config["intermediate_size"]),
            "layers": int(config["num_hidden_layers"]),
        }
    except KeyError:
        return None


def in_threads(count: int, work: Callable[[], Result]) -> list[Result]:
    """What `work` returns in each of `count` threads that start together."""
    barrier = threading.Barrier(count)

    def run(_: int) -> Result:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def matrix_rate(shape: Shape, dtype: str, tokens: int, streams: int, threads: int) -> float | None:
    """10^12 operations/s of matrix products on all streams; None where nothing here can measure those of `dtype`.

    float32, bfloat16: of PyTorch, with the model's own products (h x h, h x i, i x h) on `tokens` rows. int8: what the
    processor can do at most, with rows and weights that stay in the L1 cache.
    """
    if find_spec("torch") is None:
        return None
    if dtype in ("float32", "bfloat16"):
        return _linear_rate(shape, dtype, tokens, streams, threads)
    if dtype == "int8" and compiler() is not None and has_int8_vectors():
        try:
            load_operators()
        except ModelError as error:
            log.warning("no roofline of INT8: %s", error)
            return None
        return _int8_rate(streams * threads)
    return None


def _int8_rate(threads: int) -> float:
    import torch

    def work() -> float:
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < _SECONDS:
            done += torch.ops.mlis.int8_multiply_in_cache(10_000)
        return done / (time.perf_counter() - started) / 1e12

    return sum(in_threads(threads, work))


def _linear_rate(shape: Shape, dtype: str, tokens: int, streams: int, threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    sizes = [(shape["hidden"], shape["hidden"])] * 4
    sizes += [(shape["hidden"], shape["intermediate"]), (shape["intermediate"], shape["hidden"])]

    def work() -> float:
        with torch.inference_mode():
            layers = [torch.nn.Linear(a, b, dtype=kind) for a, b in sizes]
            inputs = [torch.ones((tokens, a), dtype=kind) for a, _ in sizes]
            started, done = time.perf_counter(), 0
            while time.perf_counter() - started < _SECONDS:
                for layer, given in zip(layers, inputs, strict=True):
                    layer(given)
                done += 1
            elapsed = time.perf_counter() - started
        return done * sum(2.0 * tokens * a * b for a, b in sizes) / elapsed / 1e12

    return sum(in_threads(streams, work))
