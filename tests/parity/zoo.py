"""A tiny model of each family that people serve, by the name under which they know it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer import modules

from tests.parity import parts
from tests.parity.parts import LIMIT_TOKENS, SMALL, VOCABULARY, WIDTH, WORDPIECE_VOCABULARY

Builder = Callable[[Path], Path]
"""Writes a model somewhere below an empty folder, and gives the place."""

TABLE_ROWS = LIMIT_TOKENS + 8
ROBERTA: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": TABLE_ROWS, **SMALL}
LABEL: dict[str, Any] = {"num_labels": 1}
DECODER: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "num_key_value_heads": 1, **SMALL}
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def bert_config(**keys: Any) -> hf.BertConfig:
    return hf.BertConfig(
        **{"vocab_size": WORDPIECE_VOCABULARY, "max_position_embeddings": LIMIT_TOKENS, **SMALL, **keys}
    )


def bert(folder: Path, tail: parts.Tail | str = "mean", **options: Any) -> Path:
    """The backbone under everything that does not come from the architecture."""
    return parts.embedder(folder, hf.BertModel(bert_config()), parts.wordpiece(), tail, **options)


def normalised(mode: str) -> parts.Tail:
    return lambda width: [modules.Pooling(width, mode), modules.Normalize()]


def dense_tail(width: int) -> list[torch.nn.Module]:
    return [modules.Pooling(width, "mean"), modules.Dense(width, 24), modules.LayerNorm(24)]


def t5_tail(width: int) -> list[torch.nn.Module]:
    narrow = modules.Dense(width, 20, bias=False, activation_function=torch.nn.Identity())
    return [modules.Pooling(width, "mean"), narrow, modules.Normalize()]


def cnn_tail(width: int) -> list[torch.nn.Module]:
    return [modules.CNN(width, 8, [1, 3, 5]), modules.Pooling(24, "mean")]


def qwen3(folder: Path) -> Path:
    config = hf.Qwen3Config(head_dim=16, pad_token_id=1, **DECODER)
    tokenizer = parts.decoder_tokens()
    prompts = {"query": "Instruct: find the passage\nQuery: "}
    return parts.embedder(folder, hf.Qwen3Model(config), tokenizer, normalised("lasttoken"), prompts=prompts)


def chat_decoder(folder: Path) -> Path:
    tokenizer = parts.decoder_tokens(adds_end=False)
    tokenizer.chat_template = CHAT
    config = hf.Qwen3Config(head_dim=16, pad_token_id=1, **DECODER)
    return parts.embedder(folder, hf.Qwen3Model(config), tokenizer, "lasttoken")


def static(folder: Path) -> Path:
    return parts.save_modules(folder / "model", [static_module("static"), modules.Normalize()])


def static_module(name: str, width: int = WIDTH) -> modules.StaticEmbedding:
    module = modules.StaticEmbedding(parts.roberta_tokens("unigram"), embedding_dim=width)
    return parts.spread(module, name)


def router(folder: Path) -> Path:
    parts.bare(folder / "document", hf.BertModel(bert_config()), parts.wordpiece())
    document = [modules.Transformer(str(folder / "document")), modules.Pooling(WIDTH, "mean")]
    ways = Router.for_query_document([static_module("query")], document)
    prompts = {"query": "", "document": ""}
    return parts.save_modules(folder / "model", [ways, modules.Normalize()], prompts=prompts)


def instructor(folder: Path) -> Path:
    def tail(width: int) -> list[torch.nn.Module]:
        return [modules.Pooling(width, "mean", include_prompt=False), modules.Normalize()]

    return bert(folder, tail, prompts={"query": "represent the question: ", "document": "represent the text: "})


def xlnet(folder: Path) -> Path:
    config = hf.XLNetConfig(vocab_size=VOCABULARY, d_model=WIDTH, n_layer=2, n_head=2, d_inner=48)
    tokenizer = parts.trained(
        "unigram", ("<unk>", "<s>", "</s>", "<pad>", "<sep>", "<cls>"), "$A <sep> <cls>",
        pad_token="<pad>", sep_token="<sep>", cls_token="<cls>", unk_token="<unk>", padding_side="left",
    )  # fmt: skip
    config.pad_token_id = tokenizer.pad_token_id
    return parts.embedder(folder, hf.XLNetModel(config), tokenizer)


def longformer(folder: Path) -> Path:
    config = hf.LongformerConfig(attention_window=16, **{**ROBERTA, "max_position_embeddings": TABLE_ROWS})
    return parts.embedder(folder, hf.LongformerModel(config), parts.roberta_tokens())


def big_bird(folder: Path, attention: str = "original_full", limit: int = LIMIT_TOKENS) -> Path:
    config = hf.BigBirdConfig(
        attention_type=attention, block_size=8, num_random_blocks=2, pad_token_id=1,
        **{**ROBERTA, "max_position_embeddings": limit},
    )  # fmt: skip
    return parts.embedder(folder, hf.BigBirdModel(config), parts.roberta_tokens("unigram", limit))


def bert_reranker(folder: Path, **options: Any) -> Path:
    network = hf.BertForSequenceClassification(bert_config(num_labels=1))
    return parts.cross_encoder(folder, network, parts.wordpiece(), **options)


def qwen3_reranker(folder: Path, pad: str | None = "<pad>", pad_token_id: int | None = 1) -> Path:
    """pad: of the tokenizer; pad_token_id: by which the model looks for the last token."""
    config = hf.Qwen3Config(head_dim=16, pad_token_id=pad_token_id, **{"num_labels": 1, **DECODER})
    network = hf.Qwen3ForSequenceClassification(config)
    return parts.bare(folder / "model", network, parts.decoder_tokens(pad, "right"))


def logit_score(folder: Path) -> Path:
    """Qwen3-Reranker's way: the log-odds of two words, behind a chat template."""
    tokenizer = parts.decoder_tokens(adds_end=False)
    tokenizer.chat_template = CHAT.replace("<assistant>", "answer ")
    parts.bare(
        folder / "transformer", hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=16, pad_token_id=1, **DECODER)), tokenizer
    )
    first = modules.Transformer(str(folder / "transformer"), transformer_task="text-generation")
    model = CrossEncoder(modules=[first, LogitScore(300, 301)], device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


def padded_at_the_end(folder: Path) -> Path:
    """The padding is the last row of the table, and a text of one token has no special tokens around it."""
    tokenizer = parts.trained("bytes", ("<end>",), None, eos_token="<end>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    config = bert_config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    return parts.embedder(folder, hf.BertModel(config), tokenizer)


EMBEDDERS: dict[str, Builder] = {
    "BERT, mean (MiniLM, E5, GTE)": lambda f: bert(f, normalised("mean")),
    "BERT, first token (BGE, Arctic)": lambda f: bert(f, normalised("cls")),
    "RoBERTa (all-distilroberta, SimCSE)": lambda f: parts.embedder(
        f, hf.RobertaModel(hf.RobertaConfig(**ROBERTA)), parts.roberta_tokens()
    ),
    "XLM-R (multilingual E5, BGE-M3)": lambda f: parts.embedder(
        f, hf.XLMRobertaModel(hf.XLMRobertaConfig(**ROBERTA)), parts.roberta_tokens("unigram"), normalised("cls")
    ),
    "MPNet (all-mpnet)": lambda f: parts.embedder(
        f, hf.MPNetModel(hf.MPNetConfig(**ROBERTA)), parts.roberta_tokens(), normalised("mean")
    ),
    "DistilBERT (msmarco-distilbert)": lambda f: parts.embedder(
        f,
        hf.DistilBertModel(
            hf.DistilBertConfig(
                vocab_size=WORDPIECE_VOCABULARY,
                max_position_embeddings=LIMIT_TOKENS,
                dim=WIDTH,
                n_layers=2,
                n_heads=2,
                hidden_dim=48,
            )
        ),
        parts.wordpiece(),
    ),
    "ELECTRA": lambda f: parts.embedder(
        f,
        hf.ElectraModel(
            hf.ElectraConfig(
                vocab_size=WORDPIECE_VOCABULARY, embedding_size=16, max_position_embeddings=LIMIT_TOKENS, **SMALL
            )
        ),
        parts.wordpiece(),
    ),
    "DeBERTa v2": lambda f: parts.embedder(
        f,
        hf.DebertaV2Model(
            hf.DebertaV2Config(
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                pad_token_id=1,
                **{"position_buckets": 16, **ROBERTA},
            )
        ),
        parts.roberta_tokens("unigram"),
    ),
    "ModernBERT (GTE-ModernBERT, Nomic embed v2)": lambda f: parts.embedder(
        f,
        hf.ModernBertModel(
            hf.ModernBertConfig(
                local_attention=16,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=2,
                cls_token_id=0,
                sep_token_id=2,
                **{"global_attn_every_n_layers": 2, **ROBERTA},
            )
        ),
        parts.roberta_tokens(),
        "cls",
    ),
    "NomicBERT (nomic-embed)": lambda f: parts.embedder(
        f,
        hf.NomicBertModel(hf.NomicBertConfig(vocab_size=WORDPIECE_VOCABULARY, max_position_embeddings=256, **SMALL)),
        parts.wordpiece(),
        prompts={"query": "search_query: ", "document": "search_document: "},
    ),
    "GTE (gte-base-v1.5, multilingual)": lambda f: parts.embedder(
        f,
        hf.GteModel(hf.GteConfig(pad_token_id=1, **{**ROBERTA, "max_position_embeddings": 256})),
        parts.roberta_tokens("unigram"),
        normalised("cls"),
    ),
    "T5 encoder (GTR, sentence-T5)": lambda f: parts.embedder(
        f,
        hf.T5EncoderModel(
            hf.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
        ),
        parts.t5_tokens(),
        t5_tail,
    ),
    "Qwen3 decoder (Qwen3-Embedding)": qwen3,
    "Llama decoder": lambda f: parts.embedder(
        f, hf.LlamaModel(hf.LlamaConfig(pad_token_id=1, **DECODER)), parts.decoder_tokens(), "lasttoken"
    ),
    "Mistral decoder (E5-Mistral)": lambda f: parts.embedder(
        f,
        hf.MistralModel(hf.MistralConfig(pad_token_id=1, sliding_window=None, **DECODER)),
        parts.decoder_tokens("<end>"),
        normalised("lasttoken"),
    ),
    "GPT-2 decoder (SGPT)": lambda f: parts.embedder(
        f,
        hf.GPT2Model(hf.GPT2Config(vocab_size=VOCABULARY, n_positions=TABLE_ROWS, n_embd=WIDTH, n_layer=2, n_head=2)),
        parts.decoder_tokens("<end>", "right"),
        "weightedmean",
    ),
    "Decoder with a chat template": chat_decoder,
    "XLNet": xlnet,
    "FNet": lambda f: parts.embedder(
        f,
        hf.FNetModel(hf.FNetConfig(pad_token_id=1, **{k: v for k, v in ROBERTA.items() if k != "num_attention_heads"})),
        parts.roberta_tokens("unigram"),
    ),
    "Longformer": longformer,
    "BigBird, full attention": big_bird,
    "BigBird, sparse attention": lambda f: big_bird(f, "block_sparse", 256),
    "CNN over BERT": lambda f: bert(f, cnn_tail),
    "StaticEmbedding (model2vec, potion)": static,
    "Router (queries static, documents BERT)": router,
    "Prompts, one by default": lambda f: bert(
        f, prompts={"query": "query: ", "document": "passage: ", "topic": "about: "}, default_prompt_name="document"
    ),
    "Prompts that pooling leaves out (Instructor)": instructor,
    "Shortened vectors (truncate_dim)": lambda f: bert(f, truncate_dim=12),
    "Dot product, not normalised": lambda f: bert(f, "cls", similarity_fn_name="dot"),
    "Dense and LayerNorm behind the pooling": lambda f: bert(f, dense_tail),
    "Several poolings at once": lambda f: bert(f, lambda width: [modules.Pooling(width, ["cls", "mean", "max"])]),
    "Padding id in the last row, no special tokens": padded_at_the_end,
    "Folder without modules.json": lambda f: parts.bare(f / "model", hf.BertModel(bert_config()), parts.wordpiece()),
}

PLAIN_CROSS_ENCODER = "BERT cross-encoder (ms-marco-MiniLM)"
CROSS_ENCODERS: dict[str, Builder] = {
    PLAIN_CROSS_ENCODER: lambda f: parts.bare(
        f / "model", hf.BertForSequenceClassification(bert_config(num_labels=1)), parts.wordpiece()
    ),
    "BERT cross-encoder, saved with max_length": lambda f: bert_reranker(f, max_length=40),
    "BERT cross-encoder with a default prompt": lambda f: bert_reranker(
        f, prompts={"rank": "which passage answers: "}, default_prompt_name="rank"
    ),
    "XLM-R cross-encoder (BGE reranker)": lambda f: parts.bare(
        f / "model",
        hf.XLMRobertaForSequenceClassification(hf.XLMRobertaConfig(**{"num_labels": 1, **ROBERTA})),
        parts.roberta_tokens("unigram"),
    ),
    "DistilBERT cross-encoder": lambda f: parts.bare(
        f / "model",
        hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                vocab_size=WORDPIECE_VOCABULARY,
                max_position_embeddings=LIMIT_TOKENS,
                dim=WIDTH,
                n_layers=2,
                n_heads=2,
                hidden_dim=48,
                **LABEL,
            )
        ),
        parts.wordpiece(),
    ),
    "ModernBERT cross-encoder (GTE reranker)": lambda f: parts.bare(
        f / "model",
        hf.ModernBertForSequenceClassification(
            hf.ModernBertConfig(
                local_attention=16,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=2,
                cls_token_id=0,
                sep_token_id=2,
                **{"global_attn_every_n_layers": 2, "num_labels": 1, **ROBERTA},
            )
        ),
        parts.roberta_tokens(),
    ),
    "Qwen3 cross-encoder": qwen3_reranker,
    "Qwen3 cross-encoder without a padding id": lambda f: qwen3_reranker(f, "<pad>", None),
    "Qwen3 cross-encoder, two padding ids": lambda f: qwen3_reranker(f, "<pad>", 0),
    "Qwen3 reranker by two words (Qwen3-Reranker)": logit_score,
}

FAMILIES: dict[str, Builder] = EMBEDDERS | CROSS_ENCODERS
