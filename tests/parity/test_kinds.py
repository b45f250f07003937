"""Kinds of models that look like others, or that go wrong in a way of their own: served right, or refused by name."""

import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

from ml_inference_server.backends import onnx
from ml_inference_server.backends.base import Company, TokenBatch
from ml_inference_server.backends.compiled import native
from ml_inference_server.backends.model import export
from ml_inference_server.backends.model.loading import TokenModule, load_model, locate, plain_model
from ml_inference_server.backends.startup.start import Described, Started
from ml_inference_server.backends.text import limits, text_input
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.server.workers import ThreadWorker, Worker
from ml_inference_server.utils.config import Settings
from tests.conftest import RunningServer, free_ports, running
from tests.parity import parts, zoo
from tests.parity.families import PAIRS, TEXTS, check_answers
from tests.parity.tiny_model import INT8, embed, refused, settings, start

pytestmark = pytest.mark.real
needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler (g++ or clang++)")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLIS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@contextlib.asynccontextmanager
async def serve(started: Started) -> AsyncIterator[RunningServer]:
    async def load(settings: Settings, phase: Callable[[str], None]) -> tuple[Described, Worker]:
        return started, ThreadWorker(started.backend)

    whole = Settings.model_validate(free_ports({"model": started.resolution.model.model_dump()}))
    async with running(RunningServer, whole, load) as server:
        yield server


def plain(model: Path, **options: Any) -> SentenceTransformer:
    return SentenceTransformer(str(model), device="cpu", local_files_only=True, **options)


def rows_of(model: SentenceTransformer, texts: Any = TEXTS) -> np.ndarray:
    return np.asarray(model.encode(list(texts), batch_size=1, show_progress_bar=False))


def logits_of(model: Path, pairs: Any = PAIRS) -> np.ndarray:
    scorer = CrossEncoder(str(model), device="cpu", local_files_only=True)
    scores = scorer.predict(list(pairs), batch_size=1, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    return np.asarray(scores, np.float32)[:, None]


def roberta(folder: Path, tail: parts.Tail | str = "mean", limit: int | None = parts.LIMIT_TOKENS) -> Path:
    """Its table has two rows that no text can use, and exactly `LIMIT_TOKENS` that one can."""
    config = hf.RobertaConfig(**{**zoo.ROBERTA, "max_position_embeddings": parts.LIMIT_TOKENS + 2})
    return parts.embedder(folder, hf.RobertaModel(config), parts.roberta_tokens(limit=limit), tail)


# Another kind of model than an embedding model.


def splade(folder: Path) -> Path:
    parts.bare(folder / "transformer", hf.BertForMaskedLM(zoo.bert_config()), parts.wordpiece())
    parts_of_it: list[torch.nn.Module] = [MLMTransformer(str(folder / "transformer")), SpladePooling()]
    SparseEncoder(modules=parts_of_it, device="cpu").save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


def multi_vector(folder: Path) -> Path:
    model = zoo.bert(folder)
    parts.change_json(model / "config_sentence_transformers.json", model_type="MultiVectorEncoder")
    return model


def pylate(folder: Path) -> Path:
    model = zoo.bert(folder, zoo.dense_tail)
    listed = json.loads((model / "modules.json").read_text())
    listed[2]["type"] = "pylate.models.Dense.Dense"
    (model / "modules.json").write_text(json.dumps(listed))
    return model


@pytest.mark.parametrize("task", ["auto", "embedding", "cross_encoder"])
@pytest.mark.parametrize(
    ("build", "named"), [(splade, "a sparse encoder"), (multi_vector, "a multi-vector model"), (pylate, "ColBERT")]
)
def test_what_gives_no_single_vector_is_refused_by_name(
    build: zoo.Builder, named: str, task: str, tmp_path: Path
) -> None:
    assert named in refused(build(tmp_path), "pytorch", task=task)


@pytest.mark.parametrize("build", [zoo.CROSS_ENCODERS[zoo.PLAIN_CROSS_ENCODER], zoo.bert_reranker, zoo.logit_score])
def test_a_reranker_is_served_as_one_and_never_as_embeddings(build: zoo.Builder, tmp_path: Path) -> None:
    model = build(tmp_path)
    started = start(model, "pytorch")
    assert (started.info.task, started.info.similarity) == ("cross_encoder", "logit")
    check_answers(started.backend, [], logits_of(model))
    message = refused(model, "pytorch", task="embedding")
    assert "model.task is embedding" in message
    assert "set model.task: cross_encoder" in message


def test_an_embedding_model_is_no_cross_encoder(tmp_path: Path) -> None:
    assert "set model.task: embedding" in refused(zoo.bert(tmp_path), "pytorch", task="cross_encoder")


def causal(folder: Path) -> Path:
    tokenizer = parts.decoder_tokens()
    tokenizer.add_tokens(["yes", "no"])
    config = hf.Qwen3Config(head_dim=16, pad_token_id=1, **{**zoo.DECODER, "vocab_size": len(tokenizer)})
    return parts.bare(folder / "model", hf.Qwen3ForCausalLM(config), tokenizer)


def masked(folder: Path) -> Path:
    return parts.bare(folder / "model", hf.BertForMaskedLM(zoo.bert_config()), parts.wordpiece())


@pytest.mark.parametrize(("build", "tasks"), [(masked, ["embedding"]), (causal, ["embedding", "cross_encoder"])])
def test_a_language_model_alone_is_served_only_as_what_one_says(
    build: zoo.Builder, tasks: list[str], tmp_path: Path
) -> None:
    model = build(tmp_path)
    message = refused(model, "pytorch")
    for task in tasks:
        assert f"model.task: {task}" in message
        started = start(model, "pytorch", task=task)
        assert started.info.task == task
        if task == "embedding":
            check_answers(started.backend, [None], rows_of(plain(model)))
        else:
            check_answers(started.backend, [], logits_of(model))


# What a model's files say besides its weights, over the wire.


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
async def test_score_and_rerank_compare_as_the_model_says(name: str, tmp_path: Path) -> None:
    model = zoo.bert(tmp_path, similarity_fn_name=name)
    library = plain(model)
    queries, documents = rows_of(library, TEXTS[1:2]), rows_of(library, TEXTS[2:])
    expected = library.similarity(queries, documents)[0].tolist()
    async with serve(start(model, "pytorch")) as server:
        pairs = [pb.Pair(query=TEXTS[1], passage=text) for text in TEXTS[2:]]
        assert list((await server.stub.Score(pb.ScoreRequest(pairs=pairs))).scores) == pytest.approx(expected, rel=1e-4)
        ranks = (await server.stub.Rerank(pb.RerankRequest(query=TEXTS[1], documents=TEXTS[2:]))).ranks
        assert [rank.score for rank in ranks] == pytest.approx(sorted(expected, reverse=True), rel=1e-4)
        assert [rank.index for rank in ranks] == sorted(range(len(expected)), key=lambda i: -expected[i])
        assert (await server.stub.GetServerInfo(pb.GetServerInfoRequest())).resolved.similarity == name


def shortened(folder: Path) -> Path:
    return zoo.bert(folder, truncate_dim=12)


@pytest.mark.parametrize("build", [zoo.chat_decoder, shortened])
async def test_a_template_and_a_shorter_vector_reach_the_caller(build: zoo.Builder, tmp_path: Path) -> None:
    model = build(tmp_path)
    expected = rows_of(plain(model))
    async with serve(start(model, "pytorch")) as server:
        reply = await server.stub.Embed(pb.EmbedRequest(texts=TEXTS))
        got = np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)
        np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())


async def test_a_cross_encoders_default_prompt_reaches_every_pair(tmp_path: Path) -> None:
    model = zoo.bert_reranker(tmp_path, prompts={"rank": "which passage answers: "}, default_prompt_name="rank")
    pairs = [(TEXTS[1], text) for text in TEXTS[2:]]
    expected = logits_of(model, pairs)[:, 0].tolist()
    async with serve(start(model, "pytorch")) as server:
        asked = pb.ScoreRequest(pairs=[pb.Pair(query=query, passage=passage) for query, passage in pairs])
        assert list((await server.stub.Score(asked)).scores) == pytest.approx(expected, abs=1e-4)
        ranks = (await server.stub.Rerank(pb.RerankRequest(query=TEXTS[1], documents=TEXTS[2:]))).ranks
        assert [rank.score for rank in ranks] == pytest.approx(sorted(expected, reverse=True), abs=1e-4)


# Padding, and texts beside others.


@pytest.mark.parametrize(("pad", "pad_token_id"), [("<pad>", 1), ("<pad>", 0), ("<end>", 1), ("<pad>", None)])
def test_a_decoder_reranker_finds_the_last_token_whatever_the_padding_ids_say(
    pad: str, pad_token_id: int | None, tmp_path: Path
) -> None:
    model = zoo.qwen3_reranker(tmp_path, pad, pad_token_id)
    check_answers(start(model, "pytorch").backend, [], logits_of(model))


def test_a_tokenizer_without_padding_is_refused_since_sentence_transformers_needs_it(tmp_path: Path) -> None:
    model = zoo.qwen3_reranker(tmp_path, None, None)
    assert "the tokenizer does not have a padding token" in refused(model, "pytorch")
    with pytest.raises(ValueError, match="does not have a padding token"):
        logits_of(model)


@pytest.mark.parametrize(
    ("family", "company"),
    [("BERT, mean (MiniLM, E5, GTE)", {Company.ANY}), ("FNet", {Company.EQUAL_LENGTHS}),
     ("CNN over BERT", {Company.EQUAL_LENGTHS})],
)  # fmt: skip
def test_a_model_whose_answers_change_with_padding_is_known_without_a_list(
    family: str, company: set[Company], tmp_path: Path
) -> None:
    assert load_model(settings(zoo.FAMILIES[family](tmp_path), "pytorch")).company in company


class LessTheMeanOfTheBatch(torch.nn.Module):
    """A module of a kind that no list knows."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        rows = features["sentence_embedding"]
        return {**features, "sentence_embedding": rows - 0.05 * rows.mean(dim=0)}


def test_an_influence_of_neighbours_that_no_list_names_is_found(tmp_path: Path) -> None:
    asked = settings(zoo.bert(tmp_path), "pytorch")
    files, kind = locate(asked)
    model = plain_model(asked, files, kind.task)
    prepared = text_input.prepare(model, None, files)
    assert limits.find_company(TokenModule(model, prepared.variants, None), prepared) is Company.ANY
    model.append(LessTheMeanOfTheBatch())
    assert limits.find_company(TokenModule(model, prepared.variants, None), prepared) is Company.NONE


def test_sparse_attention_that_depends_on_the_past_is_refused_and_served_below_its_threshold(tmp_path: Path) -> None:
    model = zoo.big_bird(tmp_path, "block_sparse", 256)
    assert "set model.max_tokens: 72" in refused(model, "pytorch")
    library = plain(model)
    library.max_seq_length = 72
    check_answers(start(model, "pytorch", max_tokens=72).backend, [None], rows_of(library))


@pytest.fixture(scope="module")
def compiled_roberta(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Started]:
    def tail(width: int) -> list[torch.nn.Module]:
        return [modules.Pooling(width, "mean"), modules.Dense(width, 24)]

    model = roberta(tmp_path_factory.mktemp("roberta"), tail)
    return model, start(model, "pytorch", compile=True)


@needs_compiler
@pytest.mark.slow
def test_the_compiled_mean_counts_no_token_that_fills_up(compiled_roberta: tuple[Path, Started]) -> None:
    """The last of the texts has the right length and direction, behind a Dense that would turn a wrong length."""
    model, started = compiled_roberta
    tokenizer = started.backend.tokenizer
    texts = ["a cell divides and grows again", "how to bake bread at home today", "rivers run"]
    texts = [tokenizer_text(started, text, tokens) for text, tokens in zip(texts, (8, 8, 6), strict=True)]
    encoded = tokenizer.encode(texts)
    assert [each.length for each in encoded] == [8, 8, 6]
    got, expected = started.backend.infer(TokenBatch.of(encoded)), rows_of(plain(model), texts)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def tokenizer_text(started: Started, text: str, tokens: int) -> str:
    """The text, cut or filled up to so many tokens."""
    text += " x" * tokens
    while started.backend.tokenizer.encode([text])[0].length > tokens:
        text = text[:-1]
    return text


@needs_compiler
@pytest.mark.slow
def test_a_literal_padding_token_in_a_text_takes_the_position_that_the_library_gives_it(
    compiled_roberta: tuple[Path, Started],
) -> None:
    model, started = compiled_roberta
    texts = ["<pad>", "bread <pad> and <pad><pad> butter", "rivers"]
    tokenizer = started.backend.tokenizer
    encoded = tokenizer.encode(texts)
    assert [int((each.ids == tokenizer.pad_id).sum()) for each in encoded] == [1, 3, 0]
    expected = rows_of(plain(model), texts)
    np.testing.assert_allclose(started.backend.infer(TokenBatch.of(encoded)), expected, atol=1e-5)


# Names and shapes of weights.


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = model / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def test_weights_under_their_older_names_are_read(tmp_path: Path) -> None:
    model = zoo.bert(tmp_path)
    before = rows_of(plain(model))

    def older(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in weights.items()
        }
        assert set(renamed) != set(weights)
        return renamed

    change_weights(model, older)
    check_answers(start(model, "pytorch").backend, [None], before)


@pytest.mark.parametrize("family", ["BERT, mean (MiniLM, E5, GTE)", "NomicBERT (nomic-embed)", zoo.PLAIN_CROSS_ENCODER])
@pytest.mark.parametrize("fault", ["missing", "of another shape"])
def test_weights_that_do_not_fit_are_refused(family: str, fault: str, tmp_path: Path) -> None:
    model = zoo.FAMILIES[family](tmp_path)

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(name for name in weights if "1" in name and name.endswith("weight") and weights[name].ndim == 2)
        if fault == "missing":
            return {key: tensor for key, tensor in weights.items() if key != name}
        return {**weights, name: weights[name][:-1].contiguous()}

    change_weights(model, change)
    message = refused(model, "pytorch")
    assert "holds no weights for" in message if fault == "missing" else "cannot be loaded" in message


# Limits of tokens.


@pytest.mark.parametrize("limit", [None, parts.LIMIT_TOKENS + 2], ids=["none", "all rows"])
async def test_the_limit_is_what_the_table_of_positions_can_take(limit: int | None, tmp_path: Path) -> None:
    """The tokenizer names no limit (transformers says 1e30 then), or the table's rows: a text above harms nobody."""
    model = roberta(tmp_path, limit=limit)
    library = plain(model)
    library.max_seq_length = parts.LIMIT_TOKENS
    expected = rows_of(library)
    started = start(model, "pytorch")
    assert started.info.max_tokens == parts.LIMIT_TOKENS
    async with serve(started) as server:
        reply = await server.stub.Embed(pb.EmbedRequest(texts=TEXTS))
        got = np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)
        np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())
        assert reply.truncated >= 1


def test_a_table_that_is_much_smaller_than_the_tokenizer_says(tmp_path: Path) -> None:
    config = zoo.bert_config(max_position_embeddings=20)
    model = parts.embedder(tmp_path, hf.BertModel(config), parts.wordpiece(500))
    library = plain(model)
    library.max_seq_length = 20
    started = start(model, "pytorch")
    assert started.info.max_tokens == 20
    check_answers(started.backend, [None], rows_of(library))
    assert "takes at most 20 tokens" in refused(model, "pytorch", max_tokens=21)


def test_each_way_of_a_router_has_a_limit_of_its_own(tmp_path: Path) -> None:
    """A static embedding takes any text; beside it the documents' transformer does not."""
    started = start(zoo.router(tmp_path), "pytorch")
    long = "a passage well above the limit of the documents " * 20
    for name, is_cut in ((None, True), ("document", True), ("query", False)):
        (text,) = started.backend.tokenizer.encode([long], name)
        assert (text.truncated, text.length <= parts.LIMIT_TOKENS) == (is_cut, is_cut)


async def test_a_router_scores_queries_and_documents_by_their_own_ways(tmp_path: Path) -> None:
    """Both run in the same batches."""
    model = zoo.router(tmp_path)
    library = plain(model)
    options: dict[str, Any] = {"batch_size": 1, "show_progress_bar": False}
    queries = library.encode_query([TEXTS[1], TEXTS[1][::-1]], **options)
    documents = library.encode_document(list(TEXTS), **options)
    expected = library.similarity(queries, documents).numpy()
    async with serve(start(model, "pytorch")) as server:
        pairs = [pb.Pair(query=query, passage=text) for query in (TEXTS[1], TEXTS[1][::-1]) for text in TEXTS]
        reply = await server.stub.Score(pb.ScoreRequest(pairs=pairs))
        assert list(reply.scores) == pytest.approx(expected.ravel().tolist(), abs=1e-4)
        assert reply.truncated >= 1
        ranking = await server.stub.Rerank(pb.RerankRequest(query=TEXTS[1], documents=TEXTS))
        assert [rank.index for rank in ranking.ranks] == np.argsort(-expected[0], kind="stable").tolist()


def test_a_limit_for_a_model_that_cuts_no_text_is_refused(tmp_path: Path) -> None:
    assert "this model cuts no text: leave it out" in refused(zoo.static(tmp_path), "pytorch", max_tokens=16)


# Where the files lie.


def test_a_model_in_the_hubs_cache_whose_configuration_is_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.bert(tmp_path)
    snapshot = tmp_path / "hub" / "models--somebody--older" / "snapshots" / ("a" * 40)
    shutil.copytree(model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    (snapshot / "0_BERT").mkdir()
    for file in list(snapshot.iterdir()):
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json"):
            file.rename(snapshot / "0_BERT" / file.name)
    listed = json.loads((snapshot / "modules.json").read_text())
    listed[0]["path"] = "0_BERT"
    (snapshot / "modules.json").write_text(json.dumps(listed))
    assert not (snapshot / "config.json").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    started = start(Path("somebody/older"), "pytorch")
    assert started.info.source == "Hugging Face cache"
    check_answers(started.backend, [None], rows_of(plain(model)))


def test_weights_in_several_files(tmp_path: Path) -> None:
    model = zoo.bert(tmp_path)
    expected = rows_of(plain(model))
    network = hf.BertModel.from_pretrained(model)
    (model / "model.safetensors").unlink()
    network.save_pretrained(model, max_shard_size="2MB")
    assert len(list(model.glob("model-*.safetensors"))) > 1
    started = start(model, "pytorch")
    assert "more" in started.info.weights_file
    check_answers(started.backend, [None], expected)


@pytest.mark.slow
def test_int8_of_a_model_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above 2 GiB: the weights lie beside the graph."""
    model = zoo.bert(tmp_path, zoo.normalised("mean"))
    for module in (export, onnx):
        monkeypatch.setattr(module, "MOST_BYTES_IN_ONE_FILE", 1000)
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "cache"))
    started = start(model, "onnx", min_parity=0.9, **INT8)
    assert list((tmp_path / "cache").glob("onnx-int8/*/*.data"))
    assert started.info.quantized_layers > 0
    got, expected = embed(started.backend), embed(start(model, "pytorch").backend)
    assert (got * expected).sum(axis=1).min() > 0.9
