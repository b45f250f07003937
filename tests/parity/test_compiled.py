"""model.compile: the packed, compiled model answers as the padded, uncompiled one, or the server does not start."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from ml_inference_server.backends import create_backend
from ml_inference_server.backends.base import Backend, Encoded, TokenBatch, packed_size
from ml_inference_server.backends.compiled import graph, native, packed
from ml_inference_server.backends.files.model_files import find_model
from ml_inference_server.backends.model.loading import load_model
from ml_inference_server.backends.startup.resolve import resolve, title
from ml_inference_server.backends.startup.start import start_backend
from ml_inference_server.utils.cache import cache_root
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError
from tests.parity.tiny_model import SHAPE, refused, save, settings, start

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler (g++ or clang++)")
MIXES = ([7], [2], [3, 48, 5, 5, 31, 2, 40], [9] * 12, list(range(2, 49)))


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def batch_of(lengths: list[int], segments: bool = False) -> TokenBatch:
    random = np.random.default_rng(sum(lengths))
    texts = [Encoded(random.integers(1000, 20000, n).astype(np.int32)) for n in lengths]
    if segments:
        texts = [Encoded(text.ids, (np.arange(text.length) >= text.length // 2).astype(np.int32)) for text in texts]
    return TokenBatch.of(texts)


def rows_of(backend: Backend, lengths: list[int], segments: bool = False) -> np.ndarray:
    return backend.infer(batch_of(lengths, segments))


def both(folder: Path, **keys: object) -> tuple[Backend, Backend]:
    """The padded model in FP32, and the compiled one."""
    plain = create_backend(resolve(settings(folder, "pytorch", task=keys.get("task", "embedding"))).model)
    plain.load_model()
    return plain, start(folder, "pytorch", compile=True, **keys).backend


@needs_compiler
def test_every_mix_of_lengths_gets_the_padded_models_answers_from_one_graph(tiny: Path) -> None:
    plain, compiled = both(tiny)
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in MIXES:
            np.testing.assert_allclose(rows_of(compiled, lengths), rows_of(plain, lengths), atol=2e-6)


@needs_compiler
def test_means_are_computed_without_any_array_of_texts_by_longest(tiny: Path) -> None:
    """One long text beside many short ones would cost as much again in padding that nothing reads."""
    module = packed.PackedModule(load_model(settings(tiny, "pytorch")))
    texts = [Encoded(np.ones(n, np.int32)) for n in [200, *[2] * 30]]
    assert max(each.numel() for each in module.inputs(TokenBatch.of(texts))) == packed_size(260)


@needs_compiler
@pytest.mark.parametrize("dim", [32, 64])
def test_bf16_attention_of_heads_of_any_tile_width(dim: int, tmp_path: Path) -> None:
    """In AMX tiles where the processor has them; otherwise text by text."""
    native.load_operators()
    torch.manual_seed(0)
    for lengths in [[1], [16, 17], [31, 33, 2], [200, 5]]:
        starts = torch.tensor([0, *np.cumsum(lengths)])
        q, k, v = (torch.randn(sum(lengths), 3, dim).bfloat16() for _ in range(3))
        for causal in (False, True):
            got = torch.ops.mlis.packed_attention(q, k, v, starts, dim**-0.5, causal).float()
            for first, end in itertools.pairwise(starts):
                one, two, three = (each[first:end].float().transpose(0, 1) for each in (q, k, v))
                expected = torch.nn.functional.scaled_dot_product_attention(one, two, three, is_causal=causal)
                torch.testing.assert_close(got[first:end], expected.transpose(0, 1), atol=0.02, rtol=0.02)


@needs_compiler
@pytest.mark.parametrize(("width", "heads", "inner"), [(64, 2, 96), (128, 2, 512), (384, 12, 1536)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_bert_layer_in_tiles_gives_what_transformers_gives(width: int, heads: int, inner: int, threads: int) -> None:
    """For texts around the tiles' sizes, more rows than are kept in the cache, and places that belong to no text."""
    if not native.load_operators():
        pytest.skip("no AMX")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = BertConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=inner, num_hidden_layers=1)
    layer = BertModel(config).encoder.layer[0].eval()
    for parameter in layer.parameters():
        parameter.data = (parameter + 0.1 * torch.randn_like(parameter)).bfloat16().float()
    tiled = packed.EncoderLayer(layer)
    for lengths in [[1], [16, 17], [31, 33, 2], [200, 5, 256]]:
        starts = torch.tensor([0, *np.cumsum(lengths)])
        x = torch.randn(1, sum(lengths) + 7, width).bfloat16()
        with torch.inference_mode():
            got = tiled(x, None, packed_starts=starts)[0].float()
            assert got.isfinite().all()
            for first, end in itertools.pairwise(starts):
                expected = layer(x[:, first:end].float())[0]
                torch.testing.assert_close(got[first:end], expected.transpose(0, 1), atol=0.06, rtol=0.02)
                alike = torch.nn.functional.cosine_similarity(got[first:end], expected)
                assert alike.min() > 0.9999


@needs_compiler
def test_only_layers_of_the_exact_kind_run_in_tiles() -> None:
    kinds = {"gelu": True, "gelu_new": False, "relu": False}
    for activation, expected in kinds.items():
        config = BertConfig(hidden_act=activation, num_hidden_layers=1, **SHAPE)
        assert packed.is_bert_layer(BertModel(config).encoder.layer[0]) is expected
    decoder = BertConfig(is_decoder=True, num_hidden_layers=1, **SHAPE)
    assert not packed.is_bert_layer(BertModel(decoder).encoder.layer[0])


def save_cross_encoder(folder: Path, **sizes: object) -> Path:
    """Of random weights, with MiniLM's tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=1, **{"num_labels": 1, **SHAPE, **sizes})
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer_files = find_model("sentence-transformers/all-MiniLM-L6-v2").folder
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(tokenizer_files / name, folder)
    return folder


@needs_compiler
def test_a_cross_encoder_scores_with_its_segments(tmp_path: Path) -> None:
    plain, compiled = both(save_cross_encoder(tmp_path), task="cross_encoder")
    for lengths in MIXES:
        np.testing.assert_allclose(
            rows_of(compiled, lengths, segments=True), rows_of(plain, lengths, segments=True), atol=2e-6
        )


@needs_compiler
def test_positions_that_start_after_the_padding_id(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save(RobertaModel(RobertaConfig(num_hidden_layers=1, max_position_embeddings=60, **SHAPE)), tmp_path)
    plain, compiled = both(folder)
    np.testing.assert_allclose(rows_of(compiled, [3, 9, 40]), rows_of(plain, [3, 9, 40]), atol=2e-6)


@needs_compiler
@pytest.mark.parametrize("kind", ["relative positions", "windows"])
def test_an_architecture_that_cannot_run_packed_is_refused(kind: str, tmp_path: Path) -> None:
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "relative positions": lambda: MPNetModel(MPNetConfig(num_hidden_layers=1, **SHAPE)),
        "windows": lambda: ModernBertModel(ModernBertConfig(num_hidden_layers=3, pad_token_id=0, **SHAPE)),
    }
    assert "model.compile: false" in refused(save(models[kind](), tmp_path), "pytorch", compile=True)


@needs_compiler
def test_answers_other_than_the_uncompiled_models_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As for an architecture that counts positions otherwise.
    monkeypatch.setattr(packed, "_positions", lambda base: packed.Positions(3))
    assert "otherwise than the uncompiled one" in refused(tiny, "pytorch", compile=True)


@needs_compiler
def test_the_label_says_compiled_and_what_runs(tiny: Path) -> None:
    started = start(tiny, "pytorch", compile=True)
    assert (started.info.compiled, started.info.padding_free) == (True, True)
    assert started.info.execution_provider.endswith("compiled, attention text by text")  # FP32 has no tiles
    assert "pytorch fp32 compiled on cpu" in title(started.resolution, started.info)


@needs_compiler
def test_bf16_serves_in_tiles_and_its_label_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {**SHAPE, "hidden_size": 64}  # two heads as wide as a tile
    folder = save(BertModel(BertConfig(num_hidden_layers=2, **shape)), tmp_path)
    plain, compiled = both(folder, quantized=True, quantization="bf16")
    for lengths in MIXES:
        alike = (rows_of(plain, lengths) * rows_of(compiled, lengths)).sum(axis=1)
        assert alike.min() > 0.9995
    info = compiled.info
    runs = "AMX layers" if native.load_operators() else "attention text by text"
    assert info.execution_provider.endswith(f"compiled, {runs}")


@needs_compiler
def test_a_cache_that_cannot_be_written_is_told_and_done_without(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert start(tiny, "pytorch", compile=True).info.compiled
    assert f"the cache {cache_root()} cannot be written" in caplog.text


# Without a model


def asks(**keys: object) -> ModelSettings:
    return ModelSettings.model_validate({"backend": "pytorch", "device": "cpu", "compile": True, **keys})


def test_without_a_compiler_it_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match="needs a C\\+\\+ compiler.*model.compile: false"):
        start_backend(asks(), lambda phase: None)


def test_without_a_compiler_a_fallback_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    resolution = resolve(asks(allow_fallback=True))
    assert not resolution.model.compile
    assert "running without it" in resolution.fallbacks[0]


@pytest.mark.parametrize("keys", [{"backend": "onnx"}, {"backend": "openvino", "quantized": True}])
def test_what_cannot_be_compiled_is_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"model\.compile"):
        resolve(asks(**keys))


@pytest.mark.parametrize("positions", [packed.Positions(), packed.Positions(2, 1), packed.Positions(1, 0)])
def test_positions_are_counted_within_each_text(positions: packed.Positions) -> None:
    """Padding ids that a text holds literally share one position; what comes behind them goes on where they began."""
    texts = [[5, 1, 6, 0, 7], [1], [0, 0, 8], [9]]
    starts = np.array([0, 5, 6, 9, 10])
    got = positions.of(np.array([i for ids in texts for i in ids]), starts)
    expected: list[int] = []
    for ids in texts:
        counted = 0
        for number in ids:
            is_skipped = number == positions.skipped
            counted += not is_skipped
            expected.append(positions.first - 1 + (0 if is_skipped else counted))
    assert got.tolist() == expected


@pytest.mark.parametrize(
    ("flags", "dtype", "laid_out"),
    [
        ({"avx2", "fma"}, torch.float32, False),
        ({"avx2", "fma"}, torch.bfloat16, True),
        ({"avx2", "fma", "avx512f"}, torch.float32, True),
        ({"asimd", "asimddp"}, torch.float32, True),
    ],
)
def test_weights_stay_as_they_are_only_where_that_was_measured_to_be_faster(
    flags: set[str], dtype: torch.dtype, laid_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert graph._options(dtype)["cpp.weight_prepack"] is laid_out  # noqa: SLF001 - what reaches the compiler
