"""Tiny models, and every way in which a file of theirs is damaged here: each a name and what it does to a copy."""

import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

Damage = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]

WIDTH, POSITIONS = 16, 64
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?-'"


def _tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over single letters: a hundred tokens, so that a copy of the model is a few kilobytes."""
    words = [*_SPECIAL, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=POSITIONS, **dict(zip(names, _SPECIAL, strict=True))
    )


def _config(**keys: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(_SPECIAL) + 2 * len(_LETTERS),
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=32,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        **keys,
    )


def save_embedder(folder: Path) -> Path:
    """Transformer, mean pooling, Dense and normalisation, with prompts."""
    torch.manual_seed(0)
    BertModel(_config()).save_pretrained(folder / "base")
    _tokenizer().save_pretrained(folder / "base")
    parts = [
        modules.Transformer(str(folder / "base"), max_seq_length=48),
        modules.Pooling(WIDTH),
        modules.Dense(WIDTH, 12),
        modules.Normalize(),
    ]
    model = SentenceTransformer(modules=parts, device="cpu", prompts={"query": "find: ", "passage": ""})
    model.save_pretrained(str(folder / "model"))
    return folder / "model"


def save_cross_encoder(folder: Path) -> Path:
    """As transformers saves it, without modules.json."""
    torch.manual_seed(0)
    BertForSequenceClassification(_config(num_labels=1)).save_pretrained(folder / "model")
    _tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def _remove(file: Path) -> None:
    file.unlink()


def _replace(make: Callable[[Path], object]) -> Damage:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


def _socket(file: Path) -> None:
    where = Path.cwd()
    os.chdir(file.parent)  # a socket's name has at most 108 characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
    finally:
        os.chdir(where)


def _write(content: bytes) -> Damage:
    return lambda file: file.write_bytes(content)


def _cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0xFF
    file.write_bytes(content)


OTHER_FILES: dict[str, Damage] = {
    "missing": _remove,
    "empty": _write(b""),
    "folder": _replace(Path.mkdir),
    "dangling-link": _replace(lambda file: file.symlink_to("nowhere")),
    "link-to-itself": _replace(lambda file: file.symlink_to(file.name)),
    "fifo": _replace(os.mkfifo),
    "socket": _replace(_socket),
    "device": _replace(lambda file: file.symlink_to("/dev/zero")),
    "garbage": _write(bytes(range(256)) * 8),
    "cut": _cut,
    "flipped": _flip,
    "null": _write(b"null"),
    "list": _write(b"[]"),
    "list-of-numbers": _write(b"[1, 2]"),
    "object": _write(b"{}"),
    "number": _write(b"-1"),
    "nan": _write(b"NaN"),
    "string": _write(b'"text"'),
    "nested": _write(b"[" * 100_000 + b"]" * 100_000),
    "nested-objects": _write(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "digits": _write(b"9" * 10_000),
    "utf-16": lambda file: file.write_text(file.read_bytes().decode("latin-1"), encoding="utf-16"),
    "byte-order-mark": lambda file: file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes()),
}
VALUES: tuple[Any, ...] = (
    None, True, "x", "", -1, 0, 1, 3, 1.5, 1e30, 10**9, 10**12, 10**400, float("nan"),
    [], [-1], {}, {"x": 1}, "a\0\n../b", "9" * 5000,
)  # fmt: skip


def files_of(folder: Path) -> list[str]:
    """Whatever a start may read, by name."""
    found = (file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file())
    return [name for name in found if name != "README.md"]


def other_files(folder: Path) -> Iterator[tuple[str, Damage]]:
    """Each file of the model replaced by each thing that is none."""
    for name in files_of(folder):
        for what, damage in OTHER_FILES.items():
            yield f"{name} {what}", partial(_within, name, damage)


def places(content: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of each value within a JSON document."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*path, key)
        if key != "vocab":
            yield from places(value, (*path, key))


def set_value(copy: Path, name: str, path: tuple[str | int, ...], value: Any) -> None:
    """Set one value of a JSON file of the model."""
    content = json.loads((copy / name).read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (copy / name).write_text(json.dumps(content))


def other_values(folder: Path) -> Iterator[tuple[str, Damage]]:
    """Each value of each JSON file replaced by each of VALUES."""
    for name in files_of(folder):
        if name.endswith(".json"):
            for path in places(json.loads((folder / name).read_text())):
                for value in VALUES:
                    shown = f"{name} {'.'.join(map(str, path))}={str(value)[:20]!r}"
                    yield shown, partial(set_value, name=name, path=path, value=value)


def _within(name: str, damage: Damage, copy: Path) -> None:
    damage(copy / name)


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _filled(tensors: Tensors, value: float) -> Tensors:
    return {name: torch.full_like(tensor, value) for name, tensor in tensors.items()}


def _one_row_filled(tensors: Tensors, largest: str, value: float) -> Tensors:
    return tensors | {largest: tensors[largest].index_fill(0, torch.tensor([0]), value)}


def _without(tensors: Tensors, left_out: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != left_out}


def _weights(change: Callable[[Tensors], Tensors], name: str) -> Damage:
    def damage(copy: Path) -> None:
        save_file({key: each.contiguous() for key, each in change(load_file(copy / name)).items()}, copy / name)

    return damage


def _shards(copy: Path, *, keep: int = 2, index: Callable[[dict[str, str]], object] = lambda places: places) -> None:
    """The weights in two files and an index, of which the first `keep` files are there."""
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    places: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        places |= dict.fromkeys(part, file)
        if number <= keep:
            save_file({name: tensors[name] for name in part}, copy / file, metadata={"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index(places)}))


def _header(header: object, data: bytes = b"") -> Damage:
    encoded = json.dumps(header).encode()
    return lambda copy: (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def other_weights(folder: Path) -> Iterator[tuple[str, Damage]]:
    """Weights that can be read and do not fit, and shards that do not belong together."""
    for name in [name for name in files_of(folder) if name.endswith(".safetensors")]:
        largest = max(load_file(folder / name).items(), key=lambda item: item[1].numel())[0]
        for dtype in (
            "int8",
            "uint8",
            "int64",
            "float8_e4m3fn",
            "float8_e5m2",
            "float16",
            "bfloat16",
            "float64",
            "bool",
        ):
            as_dtype = getattr(torch, dtype)
            yield f"{name} {dtype}", _weights(partial(_cast, dtype=as_dtype), name)
        for number in ("nan", "inf", "0", "1e38"):
            full = float(number)
            yield (
                f"{name} all {number}",
                _weights(partial(_filled, value=full), name),
            )
            yield (
                f"{name} one {number}",
                _weights(partial(_one_row_filled, largest=largest, value=full), name),
            )
        yield f"{name} cut rows", _weights(lambda t: {k: v[: max(1, len(v) // 2)] for k, v in t.items()}, name)
        yield f"{name} no rows", _weights(lambda t: {k: v[:0] for k, v in t.items()}, name)
        yield f"{name} flat", _weights(lambda t: {k: v.reshape(-1) for k, v in t.items()}, name)
        yield f"{name} scalars", _weights(lambda t: {k: v.sum() for k, v in t.items()}, name)
        yield f"{name} other names", _weights(lambda t: {f"x.{k}": v for k, v in t.items()}, name)
        yield f"{name} one left out", _weights(partial(_without, left_out=largest), name)
        yield f"{name} one more", _weights(lambda t: t | {"more": torch.ones(3)}, name)
        yield f"{name} no tensors", _weights(lambda t: {}, name)
    yield "two shards", _shards
    yield "one of two shards", lambda copy: _shards(copy, keep=1)
    yield "index of other tensors", lambda copy: _shards(copy, index=lambda p: {f"x.{k}": v for k, v in p.items()})
    yield "index of other files", lambda copy: _shards(copy, index=lambda p: dict.fromkeys(p, "other.safetensors"))
    yield "index outside", lambda copy: _shards(copy, index=lambda p: dict.fromkeys(p, "../../../etc/passwd"))
    yield "index of numbers", lambda copy: _shards(copy, index=lambda p: dict.fromkeys(p, 1))
    yield "index a list", lambda copy: _shards(copy, index=list)
    yield "index empty", lambda copy: _shards(copy, index=lambda p: {})
    tensor: dict[str, Any] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    changes: dict[str, dict[str, Any]] = {
        "unknown dtype": {"dtype": "F3"},
        "negative shape": {"shape": [-2, -2]},
        "huge shape": {"shape": [10**9, 10**9, 10**9]},
        "text shape": {"shape": ["x"]},
        "offsets backwards": {"data_offsets": [16, 0]},
        "offsets text": {"data_offsets": ["a", "b"]},
        "offsets null": {"data_offsets": None},
        "no dtype": {"dtype": None},
    }
    for what, change in changes.items():
        yield f"header {what}", _header({"w": tensor | change}, bytes(16))
    yield "header overlapping", _header({"a": tensor, "b": tensor}, bytes(16))
    yield "header of a number", _header({"a": 1}, bytes(16))
    yield "header metadata list", _header({"__metadata__": [], "a": tensor}, bytes(16))


def other_words(folder: Path) -> Iterator[tuple[str, Damage]]:
    """Tokenizers that do not fit the model, module lists and settings with values that mean something else."""
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])

    def vocabulary(change: Callable[[dict[str, int]], dict[str, int]]) -> Damage:
        def damage(copy: Path) -> None:
            content = json.loads((copy / "tokenizer.json").read_text())
            content["model"]["vocab"] = change(content["model"]["vocab"])
            (copy / "tokenizer.json").write_text(json.dumps(content))

        return damage

    yield "ids above the table", vocabulary(lambda v: {k: i if i < 5 else i + size for k, i in v.items()})
    yield "one id above the table", vocabulary(lambda v: v | {"z": size + 7})
    yield "huge ids", vocabulary(lambda v: v | {"a": 2**31 + 5})
    yield "special ids above the table", vocabulary(lambda v: v | {"[CLS]": size + 7, "[SEP]": size + 8})
    yield "no special tokens", vocabulary(lambda v: {k: i for k, i in v.items() if i >= 5})
    yield "equal ids", vocabulary(lambda v: dict.fromkeys(v, 3))
    yield "no words", vocabulary(lambda v: {})
    values: list[tuple[str, tuple[str | int, ...], list[Any]]] = [
        ("config.json", ("model_type",), ["gpt2", "t5", "llama", "roberta", "clip", "vit", "whisper", "no-such-type"]),
        ("config.json", ("hidden_act",), ["relu", "no-such-act", "../x"]),
        ("config.json", ("num_labels",), [0, -1, 2, 10**6, 10**9, 10**12, "x"]),
        ("config.json", ("auto_map",), [{"AutoModel": "code.Model", "AutoConfig": "code.Config"}, 1, "x"]),
        ("config.json", ("quantization_config",), [{"quant_method": "gptq", "bits": 4}, {"quant_method": "x"}, 1, {}]),
        ("config.json", ("torch_dtype",), ["float16", "x", 1]),
        ("config.json", ("attn_implementation",), ["flash_attention_2", "x"]),
        ("config.json", ("_attn_implementation",), ["flash_attention_2", "x"]),
        ("config.json", ("text_config",), [{}, [], 1, {"model_type": "bert"}]),
        ("config.json", ("id2label",), [{str(i): str(i) for i in range(3)}, {"x": "y"}]),
        ("config.json", ("pruned_heads",), [{"0": [0]}, {"7": [0]}, {"0": [9]}]),
        ("config.json", ("problem_type",), ["x", 1]),
        ("tokenizer_config.json", ("tokenizer_class",), ["BertTokenizer", "T5Tokenizer", "NoSuch", "../x"]),
        ("tokenizer_config.json", ("model_max_length",), [0, -1, 2, 10**30, 1e30, "x", None, 1.5]),
        ("tokenizer_config.json", ("padding_side",), ["left", "x"]),
        ("tokenizer_config.json", ("truncation_side",), ["left", "x", 1]),
        ("tokenizer_config.json", ("chat_template",), ["{{ x", "{% for i in range(10**12) %}x{% endfor %}", 1, []]),
        ("tokenizer_config.json", ("auto_map",), [{"AutoTokenizer": ["code.T", None]}]),
        ("tokenizer_config.json", ("added_tokens_decoder",), [{"x": 1}, [], {"9999999999": {"content": "new"}}]),
    ]
    if (folder / "modules.json").exists():
        values += [
            ("config_sentence_transformers.json", ("prompts",), [[], "x", {"query": 1}, {"query": None}, {"": "x"}]),
            ("config_sentence_transformers.json", ("default_prompt_name",), ["no-such", 1, []]),
            ("config_sentence_transformers.json", ("similarity_fn_name",), ["no-such", 1, [], "dot", "euclidean"]),
            ("config_sentence_transformers.json", ("truncate_dim",), [0, -1, 1, 5, 12, 13, 10**12, "x", 1.5, []]),
            ("config_sentence_transformers.json", ("model_type",), ["no-such", "SparseEncoder", 1, []]),
            ("sentence_bert_config.json", ("max_seq_length",), [0, -1, 1, 2, 3, 63, 64, 65, 10**12, "x", 1.5, 1e30]),
            ("sentence_bert_config.json", ("do_lower_case",), [True, "x"]),
            ("sentence_bert_config.json", ("model_args",), [{"dtype": "float16"}, {"attn_implementation": "x"}, 1]),
            ("sentence_bert_config.json", ("config_args",), [{"hidden_size": 8}, {"x": 1}, 1]),
            ("sentence_bert_config.json", ("processing_kwargs",), [{"text": {"max_length": 3}}, {"text": 1}, 1]),
            ("sentence_bert_config.json", ("unpad_inputs",), [True]),
            ("sentence_bert_config.json", ("module_output_name",), ["x"]),
            ("modules.json", (0, "path"), ["..", "/etc", "../../..", "a\0b", "x" * 300, "1_Pooling", "~"]),
            ("modules.json", (2, "path"), ["..", "/etc", "2_Dense/../..", "a\0b", "x" * 300, "", "1_Pooling"]),
            ("modules.json", (2, "type"), ["os.system", "code.Module", "sentence_transformers.models.NoSuch", "x", ""]),
            ("modules.json", (2,), [{}, {"type": "sentence_transformers.base.modules.dense.Dense"}]),
            (
                "modules.json",
                (0, "type"),
                ["sentence_transformers.models.CLIPModel", "sentence_transformers.models.BoW"],
            ),
            (
                "2_Dense/config.json",
                ("activation_function",),
                ["os.system", "torch.nn.modules.activation.ReLU", "x", ""],
            ),
            ("1_Pooling/config.json", ("pooling_mode",), ["cls", "max", "lasttoken", "no-such", ["mean", "max"]]),
            ("1_Pooling/config.json", ("include_prompt",), [False, 0, None, ""]),
        ]
    for name, path, each in values:
        for value in each:
            shown = f"{name} {'.'.join(map(str, path))}={str(value)[:20]!r}"
            yield shown, partial(set_value, name=name, path=path, value=value)
    if (folder / "modules.json").exists():
        yield "no modules", lambda copy: (copy / "modules.json").write_text("[]")
        for places_kept in ([0], [1], [2], [1, 0, 2, 3], [0, 2, 1], [0, 0], [3], [0, 1, 2, 3, 2], [0, 1, 1]):
            yield f"modules {places_kept}", partial(_keep_modules, kept=places_kept)


def _keep_modules(copy: Path, kept: list[int]) -> None:
    content = json.loads((copy / "modules.json").read_text())
    parts = [content[i] | {"idx": number, "name": str(number)} for number, i in enumerate(kept)]
    (copy / "modules.json").write_text(json.dumps(parts))
