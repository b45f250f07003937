"""model.compile with int8: layers whose matrices are INT8, without padding, on processors with AVX2 or more, or ARM."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel

from ml_inference_server.backends import create_backend
from ml_inference_server.backends.compiled import native, packed
from ml_inference_server.backends.model.loading import load_model
from ml_inference_server.backends.startup import resolve as resolving
from ml_inference_server.backends.startup.resolve import resolve, title
from ml_inference_server.utils.cpu import cpu_flags, has_int8_vectors
from ml_inference_server.utils.errors import ModelError
from tests.parity.test_compiled import MIXES, batch_of, both, needs_compiler, rows_of, save_cross_encoder
from tests.parity.tiny_model import SHAPE, save, settings, start

_SIZES = {**SHAPE, "hidden_size": 128, "intermediate_size": 256}
needs_vectors = pytest.mark.skipif(not has_int8_vectors(), reason="neither AVX2 nor ARM's dot products")

# In the environment of a run of this file: the compiler's flags, instead of those for this machine.
_TARGET = "MLIS_TEST_TARGET"
# Of a lesser processor, what the operators then run on, and what this one must have for that.
_LESSER = {
    "-march=x86-64-v3": ("AVX2", {"avx2", "fma"}),
    "-march=x86-64-v3 -mavxvnni": ("AVX-VNNI", {"avx2", "fma", "avx_vnni"}),
    "-march=x86-64-v4": ("AVX-512", {"avx512f", "avx512bw", "avx512vl"}),
    "-march=x86-64-v4 -mavx512vnni": ("AVX-512 VNNI", {"avx512_vnni", "avx512bw", "avx512vl", "amx_int8"}),
}

# What the operators run on as they are built for this machine: the first that it has.
_BEST = (
    ("AMX", {"amx_tile", "amx_int8", "avx512_vnni"}),
    ("AVX-512 VNNI", {"avx512_vnni", "avx512bw"}),
    *((name, needs) for name, needs in reversed(_LESSER.values())),
    ("NEON i8mm", {"i8mm"}),
    ("NEON i8mm", {"feat_i8mm"}),
    ("NEON dotprod", {"asimddp"}),
    ("NEON dotprod", {"feat_dotprod"}),
)


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    if _TARGET in os.environ:
        monkeypatch.setattr(native, "TARGET", tuple(os.environ[_TARGET].split()))
    yield
    torch.set_num_threads(threads)


def bert_layer(width: int, heads: int, inner: int) -> torch.nn.Module:
    config = BertConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=inner, num_hidden_layers=1)
    layer = BertModel(config).encoder.layer[0].eval()
    for parameter in layer.parameters():
        parameter.data = parameter + 0.05 * torch.randn_like(parameter)
    return layer.double()


def steps_of_a_row() -> int:
    """Where two products are added up in 16 bits, more would not fit."""
    return 129 if torch.ops.mlis.int8_instructions() in ("AVX2", "AVX-512") else 255


def rounded(linear: torch.nn.Linear) -> None:
    """Weights in steps of a 127th of the largest of each output, and inputs in steps of each row's range."""
    steps = steps_of_a_row()
    weight = linear.weight.data
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    linear.weight.data = (weight / scale).round() * scale

    def round_inputs(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = inputs
        low, high = x.amin(dim=-1, keepdim=True).clamp_max(0), x.amax(dim=-1, keepdim=True).clamp_min(0)
        scale = (high - low) / steps
        zero = (-low / scale).round()
        return ((x / scale).round().clamp(-zero, steps - zero)) * scale

    linear.register_forward_pre_hook(round_inputs)


@needs_compiler
@needs_vectors
@pytest.mark.parametrize(("width", "heads", "inner"), [(64, 2, 128), (128, 2, 512), (384, 12, 1536), (192, 3, 320)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_gives_what_float64_gives_with_the_same_roundings(
    width: int, heads: int, inner: int, threads: int
) -> None:
    """For texts around the kernels' steps, and more rows than pass through together."""
    native.load_operators()
    has_whole_bytes = steps_of_a_row() == 255
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer = bert_layer(width, heads, inner)
    own = packed.Int8Layer(layer)
    exact = BertModel(BertConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=inner)).encoder.layer[
        0
    ]
    exact = exact.double().eval()
    exact.load_state_dict(layer.state_dict())
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            rounded(module)
    for lengths in [[1], [2, 1, 3], [15, 16, 17], [31, 32, 33, 7], [5] * 50, [193, 4, 250]]:
        starts = torch.tensor([0, *np.cumsum(lengths)])
        x = torch.randn(1, sum(lengths) + 7, width)
        with torch.inference_mode():
            got = own(x, packed_starts=starts)[0]
            assert got.isfinite().all()
            for first, end in itertools.pairwise(starts):
                text = x[:, first:end].double()
                expected, unrounded = (each(text).reshape(-1, width) for each in (layer, exact))
                # A sum that lies between two steps may be rounded to the other one.
                difference = (got[first:end].double() - expected).abs()
                assert difference.mean() < 0.5 * (expected - unrounded).abs().mean()
                assert difference.max() < (0.1 if has_whole_bytes else 0.2)
                alike = torch.nn.functional.cosine_similarity(got[first:end].double(), unrounded)
                assert alike.min() > (0.998 if has_whole_bytes else 0.996)


@needs_compiler
@needs_vectors
def test_sums_of_the_largest_bytes_are_exact() -> None:
    """All inputs the largest of their row, all weights the largest of their output: 16 bits hold such sums just so."""
    native.load_operators()
    torch.manual_seed(0)
    layer = bert_layer(64, 2, 128)
    linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    for linear in linears:
        linear.weight.data = (
            0.05 * (-1.0) ** torch.arange(linear.out_features)[:, None] * torch.ones_like(linear.weight)
        )
    own = packed.Int8Layer(layer)
    for linear in linears:
        rounded(linear)
    with torch.inference_mode():
        for x in (torch.full((1, 7, 64), 3.0), torch.full((1, 7, 64), -3.0)):
            got = own(x, packed_starts=torch.tensor([0, 7]))
            torch.testing.assert_close(got, layer(x.double()).float().view_as(got), atol=0.02, rtol=0)


@needs_compiler
@needs_vectors
def test_a_text_that_is_not_finite_stays_so_and_leaves_its_neighbours_alone() -> None:
    native.load_operators()
    torch.manual_seed(0)
    own = packed.Int8Layer(bert_layer(64, 2, 128))
    x = torch.randn(1, 30, 64)
    starts = torch.tensor([0, 10, 20, 30])
    with torch.inference_mode():
        expected = own(x, packed_starts=starts)[0]
        for wrong in (float("nan"), float("inf"), float("-inf")):
            broken = x.clone()
            broken[0, 13, 5] = wrong
            got = own(broken, packed_starts=starts)[0]
            assert got[10:20].isnan().any(dim=1).all()  # every token of it sees the broken one
            assert torch.equal(got[:10], expected[:10])
            assert torch.equal(got[20:], expected[20:])


@needs_compiler
@needs_vectors
def test_a_text_gets_the_same_answer_to_the_last_bit_whatever_it_travels_with() -> None:
    native.load_operators()
    torch.manual_seed(0)
    own = packed.Int8Layer(bert_layer(128, 4, 256))
    texts = [torch.randn(n, 128) for n in (7, 33, 1, 120, 64)]
    with torch.inference_mode():
        together = own(torch.cat(texts)[None], packed_starts=torch.tensor([0, *np.cumsum([len(t) for t in texts])]))[0]
        for first, text in zip(np.cumsum([0, *(len(t) for t in texts)]), texts, strict=False):
            alone = own(text[None], packed_starts=torch.tensor([0, len(text)]))[0]
            assert torch.equal(alone, together[first : first + len(text)])


@needs_compiler
@needs_vectors
def test_the_packed_model_is_close_to_fp32(tmp_path: Path) -> None:
    """Without a graph, which takes most of a start."""
    asked = settings(save(BertModel(BertConfig(num_hidden_layers=2, **_SIZES)), tmp_path), "pytorch")
    plain = create_backend(resolve(asked).model)
    plain.load_model()
    module = packed.PackedModule(load_model(asked), int8=True).eval()
    assert module.attention == f"INT8 layers ({torch.ops.mlis.int8_instructions()})"
    for lengths in MIXES:
        batch = batch_of(lengths)
        with torch.inference_mode():
            got = module(*module.inputs(batch))[: len(batch)]
        expected = torch.from_numpy(plain.infer(batch))
        assert torch.nn.functional.cosine_similarity(expected, got).mean() > 0.99


@needs_compiler
@needs_vectors
def test_the_model_serves_close_to_fp32_and_its_label_says_int8_compiled(tmp_path: Path) -> None:
    folder = save(BertModel(BertConfig(num_hidden_layers=2, **_SIZES)), tmp_path)
    plain = create_backend(resolve(settings(folder, "pytorch")).model)
    plain.load_model()
    started = start(folder, "pytorch", compile=True, quantized=True, quantization="int8")
    info = started.backend.info
    assert (info.dtype, info.compiled, info.quantized_layers, info.padding_free) == ("int8", True, 12, True)
    assert info.execution_provider.endswith(f"compiled, INT8 layers ({torch.ops.mlis.int8_instructions()})")
    assert " int8 compiled on cpu" in title(started.resolution, info)
    for lengths in MIXES:
        expected, got = (torch.from_numpy(rows_of(each, lengths)) for each in (plain, started.backend))
        assert torch.nn.functional.cosine_similarity(expected, got).min() > 0.99


@needs_compiler
@needs_vectors
def test_a_cross_encoder_scores_pairs_of_every_mix_as_fp32_does(tmp_path: Path) -> None:
    folder = save_cross_encoder(tmp_path, hidden_size=128, intermediate_size=256)
    plain, compiled = both(folder, task="cross_encoder", quantized=True, quantization="int8")
    assert (compiled.info.dtype, compiled.info.compiled) == ("int8", True)
    got, expected = (
        np.concatenate([rows_of(each, mix, segments=True)[:, 0] for mix in MIXES]) for each in (compiled, plain)
    )
    assert np.corrcoef(got, expected)[0, 1] > 0.99


@needs_compiler
@needs_vectors
def test_a_model_without_berts_layers_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = save(MPNetModel(MPNetConfig(num_hidden_layers=1, **_SIZES)), tmp_path)
    with pytest.raises(ModelError, match="model.compile: false"):
        start(folder, "pytorch", compile=True, quantized=True, quantization="int8")


def test_a_processor_without_the_instructions_refuses_or_falls_back_as_the_settings_say(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolving, "has_int8_vectors", lambda: False)
    asked = {"compile": True, "quantized": True, "quantization": "int8"}
    with pytest.raises(ModelError, match="AVX2"):
        resolve(settings(tiny, "pytorch", **asked, allow_fallback=False))
    found = resolve(settings(tiny, "pytorch", **asked, allow_fallback=True))
    assert not found.model.compile
    assert "AVX2" in found.fallbacks[0]


@needs_compiler
def test_what_runs_is_the_best_that_this_processor_has() -> None:
    native.load_operators()
    found = next((name for name, needs in _BEST if needs <= cpu_flags()), "")
    if _TARGET in os.environ:
        found = _LESSER[os.environ[_TARGET]][0]
    assert torch.ops.mlis.int8_instructions() == found
    assert bool(found) == has_int8_vectors()


@needs_compiler
@needs_vectors
def test_the_rate_at_most_counts_each_operation_once() -> None:
    native.load_operators()
    panel, _ = torch.ops.mlis.int8_panel()
    rows = 16 if torch.ops.mlis.int8_instructions() == "AMX" else 6
    assert torch.ops.mlis.int8_multiply_in_cache(3) == 3 * 2 * rows * 256 * panel
    assert torch.ops.mlis.int8_multiply_in_cache(0) == 0


# What is run again for each lesser processor.
_OF_EACH_TARGET = (
    test_a_layer_gives_what_float64_gives_with_the_same_roundings,
    test_sums_of_the_largest_bytes_are_exact,
    test_a_text_that_is_not_finite_stays_so_and_leaves_its_neighbours_alone,
    test_a_text_gets_the_same_answer_to_the_last_bit_whatever_it_travels_with,
    test_the_packed_model_is_close_to_fp32,
    test_what_runs_is_the_best_that_this_processor_has,
    test_the_rate_at_most_counts_each_operation_once,
)


@needs_compiler
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", _LESSER)
def test_the_same_holds_as_it_is_built_for_a_lesser_processor(target: str) -> None:
    """In a process of its own: operators can be registered only once."""
    if not _LESSER[target][1] <= cpu_flags():
        pytest.skip("this processor is less than that")
    tests = [f"{__file__}::{each.__name__}" for each in _OF_EACH_TARGET]
    root = Path(__file__).parents[2]
    environment = {**os.environ, _TARGET: target, "PYTHONPATH": str(root)}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=590)
    assert ran.returncode == 0, ran.stdout[-5000:]
