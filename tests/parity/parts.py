"""What the models of the tests are put together from: tokenizers of each kind, seeded weights, folders."""

import functools
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ml_inference_server.backends.files.model_files import find_model
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.sample import sample_pairs

WIDTH = 32
LIMIT_TOKENS = 64
VOCABULARY = 1200
WORDPIECE_VOCABULARY = 30522  # of MiniLM's tokenizer
# The shape of every encoder here, under the names that most configurations share.
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}

Tail = Callable[[int], list[torch.nn.Module]]
"""The modules behind a transformer, from the width of its vectors."""

Module = TypeVar("Module", bound=torch.nn.Module)


def wordpiece(limit: int = LIMIT_TOKENS) -> PreTrainedTokenizerBase:
    """MiniLM's own."""
    tokenizer = AutoTokenizer.from_pretrained(find_model(ModelSettings().name).folder)
    tokenizer.model_max_length = limit
    return tokenizer


@functools.cache
def _trained(kind: str, specials: tuple[str, ...]) -> str:
    """The JSON of a tokenizer trained on the sample."""
    texts = [text for pair in sample_pairs() for text in pair]
    options: dict[str, Any] = {"vocab_size": VOCABULARY, "special_tokens": list(specials), "show_progress": False}
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(unk_token="<unk>", **options))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, **options))
    return tokenizer.to_str()


def trained(
    kind: str, specials: Sequence[str], around: str | None = None, limit: int | None = LIMIT_TOKENS, **names: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer of `kind` (bytes or unigram). around: what a text gets, such as "<s> $A </s>"; names: of tokens."""
    tokenizer = Tokenizer.from_str(_trained(kind, tuple(specials)))
    if around is not None:
        used = [(name, tokenizer.token_to_id(name)) for name in specials if name in around]
        pair = f"{around} {around.replace('$A', '$B').replace('<s>', '</s>')}"
        tokenizer.post_processor = processors.TemplateProcessing(single=around, pair=pair, special_tokens=used)
    if limit is not None:
        names["model_max_length"] = limit
    names = {"model_input_names": ["input_ids", "attention_mask"], **names}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def roberta_tokens(kind: str = "bytes", limit: int | None = LIMIT_TOKENS) -> PreTrainedTokenizerFast:
    specials = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return trained(kind, specials, "<s> $A </s>", limit, unk_token="<unk>", mask_token="<mask>", **names)


def decoder_tokens(
    pad: str | None = "<pad>", side: str = "left", adds_end: bool = True, limit: int | None = LIMIT_TOKENS
) -> PreTrainedTokenizerFast:
    names = {} if pad is None else {"pad_token": pad}
    around = "$A <end>" if adds_end else None
    return trained("bytes", ("<end>", "<pad>"), around, limit, eos_token="<end>", padding_side=side, **names)


def t5_tokens(limit: int | None = None) -> PreTrainedTokenizerFast:
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return trained("unigram", ("<pad>", "</s>", "<unk>"), "$A </s>", limit, **names)


def spread(network: Module, name: str = "", factor: float = 1.0) -> Module:
    """Seeded weights as large as trained ones: a wrong token, position or segment then moves an answer visibly."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, factor * parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval()


def bare(folder: Path, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """As transformers saves a model: no modules.json."""
    spread(network, type(network).__name__).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def embedder(
    folder: Path,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tail: Tail | str = "mean",
    **options: Any,
) -> Path:
    """As sentence-transformers saves a model. tail: the modules behind the transformer, or the mode of one pooling."""
    bare(folder / "transformer", network, tokenizer)
    first = modules.Transformer(str(folder / "transformer"))
    width = first.get_embedding_dimension()
    behind = [modules.Pooling(width, tail)] if isinstance(tail, str) else tail(width)
    for number, module in enumerate(behind):
        if not isinstance(module, modules.Pooling):
            spread(module, f"module {number}")
    return save_modules(folder / "model", [first, *behind], **options)


def save_modules(folder: Path, parts: Sequence[torch.nn.Module], **options: Any) -> Path:
    model = SentenceTransformer(modules=list(parts), device="cpu", **options)
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def cross_encoder(folder: Path, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Path:
    """As sentence-transformers saves a CrossEncoder."""
    bare(folder / "transformer", network, tokenizer)
    model = CrossEncoder(str(folder / "transformer"), device="cpu", **options)
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


def change_json(file: Path, **keys: Any) -> None:
    """Set keys of a JSON object; None removes one."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    content |= keys
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")
