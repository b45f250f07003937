"""What kind of model a folder holds, read from its files: it decides the task, or that the model is refused.

sentence-transformers loads almost any folder as almost any kind: a reranker as embeddings, a sparse encoder with mean
pooling. The vectors look right and mean nothing. So the kind is settled before anything is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ml_inference_server.backends.files.file_checks import read_json
from ml_inference_server.utils.errors import ModelError

Task = Literal["embedding", "cross_encoder"]

# `model_type` of config_sentence_transformers.json -> (task, or none where it cannot be served, what it is called).
_KINDS: dict[str, tuple[Task | None, str]] = {
    "SentenceTransformer": ("embedding", "an embedding model"),
    "CrossEncoder": ("cross_encoder", "a cross-encoder"),
    "SparseEncoder": (None, "a sparse encoder (SPLADE and the like)"),
    "MultiVectorEncoder": (None, "a multi-vector model (ColBERT and the like)"),
    "ColBERT": (None, "a multi-vector model (ColBERT and the like)"),
}
# Module classes that only one kind has -> its `model_type`. Older files tell no `model_type`.
_TELLING_MODULES = {
    "LogitScore": "CrossEncoder",
    "SpladePooling": "SparseEncoder",
    "MLMTransformer": "SparseEncoder",
    "SparseAutoEncoder": "SparseEncoder",
    "CSRSparsity": "SparseEncoder",
    "SparseStaticEmbedding": "SparseEncoder",
    "IDF": "SparseEncoder",
    "MultiVectorMask": "MultiVectorEncoder",
}
# The end of an architecture's name in a config.json that stands alone -> what the model was made for.
_HEADS = {
    "ForMaskedLM": "a masked language model, which may be a SPLADE model",
    "ForPreTraining": "a model with the heads of its pre-training",
    "ForCausalLM": "a language model, which may be a reranker",
    "LMHeadModel": "a language model, which may be a reranker",
    "ForConditionalGeneration": "a model that generates text",
    "ForTokenClassification": "a model that labels tokens",
    "ForQuestionAnswering": "a model that finds answers in a text",
    "ForMultipleChoice": "a model for multiple choice",
    "ForNextSentencePrediction": "a model that predicts the next sentence",
}


@dataclass(frozen=True, slots=True)
class ModelKind:
    """`task` is what the folder can be served as; `sentence` says what was found, for the log."""

    task: Task
    sentence: str


def kind_of(folder: Path, asked: Literal["auto", "embedding", "cross_encoder"]) -> ModelKind:
    """The kind of a verified folder. ModelError where it cannot be served as `asked`, or auto cannot know."""
    modules = read_json(folder / "modules.json")
    found = _of_bare_files(folder, asked) if modules is None else _of_modules(folder, modules)
    if asked not in ("auto", found.task):
        raise ModelError(
            f"model.task is {asked}, but {folder} is {found.sentence}: set model.task: {found.task}, or auto"
        )
    return found


def _of_modules(folder: Path, modules: Sequence[dict[str, Any]]) -> ModelKind:
    """Of a folder saved by sentence-transformers."""
    types = _module_types(folder, modules)
    foreign = [name for name in types if not name.startswith(("sentence_transformers.", "pylate."))]
    if foreign:
        raise ModelError(
            f"{folder} needs the module {foreign[0]}, which is code in the model's repository; such code is never run "
            f"here: use a model whose modules are all sentence-transformers' own"
        )
    saved = read_json(folder / "config_sentence_transformers.json") or {}
    model_type = str(saved.get("model_type") or "SentenceTransformer") if isinstance(saved, dict) else ""
    for name in types:
        if name.startswith("pylate."):
            model_type = "ColBERT"
        model_type = _TELLING_MODULES.get(name.rpartition(".")[2], model_type)
    task, called = _KINDS.get(model_type, (None, f"of the kind {model_type!r}"))
    if task is None:
        raise ModelError(
            f"{folder} is {called}: this server gives one dense vector for a text (an embedding model) or one score "
            f"for a pair (a cross-encoder), and cannot serve it as either; use a model of these kinds"
        )
    return ModelKind(task, f"{called} (saved by sentence-transformers)")


def _module_types(folder: Path, modules: Sequence[dict[str, Any]]) -> list[str]:
    """The classes of all modules, those that a Router holds included."""
    types = [str(each.get("type", "")) for each in modules]
    for each in modules:
        if str(each.get("type", "")).rpartition(".")[2] in ("Router", "Asym"):
            place = folder / str(each.get("path", ""))
            routes = read_json(place / "router_config.json") or read_json(place / "config.json") or {}
            inner = routes.get("types", {}) if isinstance(routes, dict) else {}
            types += [str(name) for name in inner.values()] if isinstance(inner, dict) else []
    return types


def _of_bare_files(folder: Path, asked: str) -> ModelKind:
    """Of a folder with a config.json and no modules.json, as transformers saves it."""
    parts = [*folder.glob("config_sentence_transformers.json"), *folder.glob("[0-9]_*/config.json")]
    if parts:
        raise ModelError(
            f"{folder} holds {parts[0].relative_to(folder)} and no modules.json that says how its modules are used: "
            f"download it again"
        )
    config = read_json(folder / "config.json") or {}
    listed = config.get("architectures") if isinstance(config, dict) else None
    architecture = str(listed[0]) if isinstance(listed, list) and listed else ""
    if "ColBERT" in architecture or (folder / "artifact.metadata").exists():
        raise ModelError(f"{folder} is {_KINDS['ColBERT'][1]}: this server gives one vector for a text, not many")
    if architecture.endswith("ForSequenceClassification"):
        return ModelKind("cross_encoder", f"a cross-encoder ({architecture})")
    head = next((end for end in _HEADS if architecture.endswith(end)), None)
    if head is None:
        how = "the mean of its tokens, as sentence-transformers does without a modules.json"
        return ModelKind("embedding", f"an embedding model ({architecture or 'no architecture is named'}; {how})")
    is_language_model = head in ("ForCausalLM", "LMHeadModel")
    if asked == "cross_encoder" and is_language_model:
        return ModelKind("cross_encoder", f"a reranker ({architecture}; log-odds of the words yes and no)")
    pooling = "the last token's vector" if is_language_model else "the mean of its tokens' vectors"
    if asked == "embedding":
        return ModelKind("embedding", f"{_HEADS[head]} ({architecture}), served as embeddings by {pooling}")
    reranker = "; or model.task: cross_encoder to score pairs by the words yes and no" if is_language_model else ""
    raise ModelError(
        f"{folder} is {_HEADS[head]} ({architecture}), and has no modules.json that says how to make vectors of it: "
        f"set model.task: embedding to serve {pooling}, as sentence-transformers does{reranker}"
    )
