"""model.compile with int8: layers whose matrices are INT8, without padding, on processors with AVX-512 VNNI."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel

from ml_inference_server.backends import create_backend
from ml_inference_server.backends.compiled import native, packed
from ml_inference_server.backends.startup import resolve as resolving
from ml_inference_server.backends.startup.resolve import resolve, title
from ml_inference_server.utils.cpu import has_int8_vectors
from ml_inference_server.utils.errors import ModelError
from tests.parity.test_compiled import MIXES, both, needs_compiler, rows_of, save_cross_encoder
from tests.parity.tiny_model import SHAPE, save, settings, start

_SIZES = {**SHAPE, "hidden_size": 128, "intermediate_size": 256}
needs_vnni = pytest.mark.skipif(not has_int8_vectors(), reason="no AVX-512 VNNI")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bert_layer(width: int, heads: int, inner: int) -> torch.nn.Module:
    config = BertConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=inner, num_hidden_layers=1)
    layer = BertModel(config).encoder.layer[0].eval()
    for parameter in layer.parameters():
        parameter.data = parameter + 0.05 * torch.randn_like(parameter)
    return layer.double()


def rounded(linear: torch.nn.Linear) -> None:
    """Weights in steps of a 127th of the largest of each output, and inputs in 255 steps of each row's range."""
    weight = linear.weight.data
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    linear.weight.data = (weight / scale).round() * scale

    def round_inputs(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = inputs
        low, high = x.amin(dim=-1, keepdim=True).clamp_max(0), x.amax(dim=-1, keepdim=True).clamp_min(0)
        scale = (high - low) / 255
        zero = (-low / scale).round()
        return ((x / scale).round().clamp(-zero, 255 - zero)) * scale

    linear.register_forward_pre_hook(round_inputs)


@needs_compiler
@needs_vnni
@pytest.mark.parametrize(("width", "heads", "inner"), [(64, 2, 128), (128, 2, 512), (384, 12, 1536), (192, 3, 320)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_gives_what_float64_gives_with_the_same_roundings(
    width: int, heads: int, inner: int, threads: int
) -> None:
    """For texts around the kernels' steps, and more rows than pass through together."""
    native.load_operators()
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
                assert difference.max() < 0.1
                alike = torch.nn.functional.cosine_similarity(got[first:end].double(), unrounded)
                assert alike.min() > 0.998


@needs_compiler
@needs_vnni
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
@needs_vnni
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
@needs_vnni
def test_the_model_serves_close_to_fp32_and_its_label_says_int8_compiled(tmp_path: Path) -> None:
    folder = save(BertModel(BertConfig(num_hidden_layers=2, **_SIZES)), tmp_path)
    plain = create_backend(resolve(settings(folder, "pytorch")).model)
    plain.load_model()
    started = start(folder, "pytorch", compile=True, quantized=True, quantization="int8")
    info = started.backend.info
    assert (info.dtype, info.compiled, info.quantized_layers, info.padding_free) == ("int8", True, 12, True)
    assert info.execution_provider.endswith("compiled, INT8 layers (AVX-512 VNNI)")
    assert " int8 compiled on cpu" in title(started.resolution, info)
    for lengths in MIXES:
        expected, got = (torch.from_numpy(rows_of(each, lengths)) for each in (plain, started.backend))
        assert torch.nn.functional.cosine_similarity(expected, got).min() > 0.99


@needs_compiler
@needs_vnni
def test_a_cross_encoder_scores_pairs_of_every_mix_as_fp32_does(tmp_path: Path) -> None:
    folder = save_cross_encoder(tmp_path, hidden_size=128, intermediate_size=256)
    plain, compiled = both(folder, task="cross_encoder", quantized=True, quantization="int8")
    assert (compiled.info.dtype, compiled.info.compiled) == ("int8", True)
    got, expected = (
        np.concatenate([rows_of(each, mix, segments=True)[:, 0] for mix in MIXES]) for each in (compiled, plain)
    )
    assert np.corrcoef(got, expected)[0, 1] > 0.99


@needs_compiler
@needs_vnni
def test_a_model_without_berts_layers_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = save(MPNetModel(MPNetConfig(num_hidden_layers=1, **_SIZES)), tmp_path)
    with pytest.raises(ModelError, match="model.compile: false"):
        start(folder, "pytorch", compile=True, quantized=True, quantization="int8")


def test_a_processor_without_the_instructions_refuses_or_falls_back_as_the_settings_say(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolving, "has_int8_vectors", lambda: False)
    asked = {"compile": True, "quantized": True, "quantization": "int8"}
    with pytest.raises(ModelError, match="AVX-512 VNNI"):
        resolve(settings(tiny, "pytorch", **asked, allow_fallback=False))
    found = resolve(settings(tiny, "pytorch", **asked, allow_fallback=True))
    assert not found.model.compile
    assert "AVX-512 VNNI" in found.fallbacks[0]
