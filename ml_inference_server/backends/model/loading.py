"""A model's own files as a torch module that takes token ids: what PyTorch runs and what the export writes as ONNX."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from transformers import PreTrainedModel

from ml_inference_server.backends.base import Company, TextTokenizer
from ml_inference_server.backends.files.model_errors import errors_of_the_model
from ml_inference_server.backends.files.model_files import ModelFiles, architecture_of, find_model
from ml_inference_server.backends.files.model_kind import ModelKind, Task, kind_of
from ml_inference_server.backends.model.load_guard import LoadGuard
from ml_inference_server.backends.model.misfits import cannot_load, check_fit
from ml_inference_server.backends.text import limits
from ml_inference_server.backends.text.library_tokenizer import Variant
from ml_inference_server.backends.text.text_input import Prepared, prepare
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError, StartError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """FP32 on the CPU, in evaluation mode.

    module: forward(input_ids, attention_mask, token_type_ids or None, variant=0) -> (batch, dimension) for an embedding
    model, (batch, 1) raw logits for a cross-encoder. transformer: the part of it whose precision may be changed. base:
    the Hugging Face model that turns token ids into hidden states, None where there is none (StaticEmbedding, Router).
    variants: how many ways texts take through the model; each text's tokens say which (`Encoded.variant`).
    """

    module: "TokenModule"
    transformer: torch.nn.Module
    base: Any
    files: ModelFiles
    task: Task
    similarity: str
    tokenizer: TextTokenizer
    company: Company
    dimension: int
    takes_token_type_ids: bool
    variants: int


class TokenModule(torch.nn.Module):
    """A sentence-transformers model as a function of token ids, with all of its modules."""

    def __init__(self, model: Any, variants: tuple[Variant, ...], truncate_dim: int | None) -> None:
        super().__init__()
        self.model = model
        self._variants = variants
        self.truncate_dim = truncate_dim
        self._output = "scores" if isinstance(model, CrossEncoder) else "sentence_embedding"

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        variant: int = 0,
    ) -> torch.Tensor:
        features: dict[str, Any] = dict(self._variants[variant].features)
        if self._variants[variant].is_bag:
            lengths = attention_mask.sum(dim=1)
            features |= {"input_ids": input_ids[attention_mask.bool()], "offsets": lengths.cumsum(0) - lengths}
        else:
            features |= {"input_ids": input_ids, "attention_mask": attention_mask}
            if token_type_ids is not None:
                features["token_type_ids"] = token_type_ids
        rows: torch.Tensor = self.model(features)[self._output].float()
        # Logits stay raw and in FP32: a sigmoid in half precision saturates, and then good answers tie.
        return rows if self.truncate_dim is None else rows[:, : self.truncate_dim]


def load_model(settings: ModelSettings) -> LoadedModel:
    """Find, verify and load `settings.name`. ModelError if it is not fit to run."""
    files, kind = locate(settings)
    log.info("%s is %s: serving it as %s", settings.name, kind.sentence, kind.task)
    model = plain_model(settings, files, kind.task)
    first = model[0]
    truncate_dim = getattr(model, "truncate_dim", None)
    with errors_of_the_model(files):
        prepared = prepare(model, settings.max_tokens, files)
        module = TokenModule(model, prepared.variants, truncate_dim).eval().requires_grad_(False)
        company = _settle(module, first, prepared, files)
        dimension = _dimension(module, prepared)
    return LoadedModel(
        module=module,
        transformer=first,
        base=first.model if isinstance(first, Transformer) else None,
        files=files,
        task=kind.task,
        similarity="logit" if isinstance(model, CrossEncoder) else str(model.similarity_fn_name),
        tokenizer=prepared.tokenizer,
        company=company,
        dimension=dimension,
        takes_token_type_ids=prepared.takes_token_type_ids,
        variants=len(prepared.variants),
    )


def locate(settings: ModelSettings) -> tuple[ModelFiles, ModelKind]:
    """The verified files of `settings.name`, and what they can be served as. ModelError if they cannot."""
    if settings.random_weights:
        task: Task = "cross_encoder" if settings.task == "cross_encoder" else "embedding"
        return architecture_of(settings.name), ModelKind(task, "an architecture with random weights")
    files = find_model(settings.name)
    return files, kind_of(files.folder, settings.task)


def plain_model(settings: ModelSettings, files: ModelFiles, task: Task) -> Any:
    """The model as sentence-transformers loads it, in FP32 on the CPU; what is served is judged by it.

    ModelError if a tensor has no weights in the files: it would run with random numbers.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # What they warn of is checked here: missing weights, texts above the limit. Their tables say it in many lines.
    for library in ("transformers", "sentence_transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "device": "cpu",
        "local_files_only": True,
        "trust_remote_code": False,
        "model_kwargs": {"use_safetensors": True, "dtype": torch.float32},
    }
    try:
        with LoadGuard(files), _reports() as reports:
            if task == "cross_encoder":
                labels = {"num_labels": 1} if settings.random_weights else {}
                model: Any = CrossEncoder(str(files.folder), **options, **labels)
            else:
                model = SentenceTransformer(str(files.folder), **options)
    except StartError:
        raise
    except Exception as error:
        raise cannot_load(files, error) from error
    if settings.random_weights:
        _randomise(model)
    else:
        _check_complete(model, reports, files)
        check_fit(model, files)
    if task == "cross_encoder" and model.num_labels != 1:
        raise ModelError(
            f"a cross-encoder gives one score; this model has {model.num_labels} labels: it is a classifier; "
            f"use a model with one"
        )
    kept = getattr(model, "truncate_dim", None)
    if kept is not None and not (isinstance(kept, int) and kept > 0):
        raise ModelError(
            f"{files.folder}/config_sentence_transformers.json says truncate_dim: {kept!r}: set it to how many numbers "
            f"of a vector are kept, or remove it"
        )
    model.eval()
    return model


@contextlib.contextmanager
def _reports() -> Iterator[list[Mapping[str, Any]]]:
    """What transformers says of each model that it loads meanwhile: missing keys and so on."""
    found: list[Mapping[str, Any]] = []
    original = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls: type[PreTrainedModel], *arguments: Any, **options: Any) -> Any:
        options["output_loading_info"] = True
        model, report = original.__func__(cls, *arguments, **options)
        found.append(report)
        return model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment]
    try:
        yield found
    finally:
        PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]


def _check_complete(model: Any, reports: list[Mapping[str, Any]], files: ModelFiles) -> None:
    """Judged by what transformers found missing after its own renaming, not by the names in the files."""
    pooled = any(
        "pooler_output" in str(each.modality_config) for each in model.modules() if isinstance(each, Transformer)
    )
    is_embedding = isinstance(model, SentenceTransformer)
    for report in reports:
        missing = sorted(report.get("missing_keys", ()))
        if is_embedding and not pooled:  # the pooler is no part of such an embedding, and many files leave it out
            missing = [key for key in missing if "pooler." not in key]
        if missing:
            raise ModelError(
                f"{files.weights_file} holds no weights for {missing[0]} and {len(missing) - 1} more tensors: "
                f"the files belong to another architecture, or are damaged; download it again"
            )


def _settle(module: TokenModule, first: torch.nn.Module, prepared: Prepared, files: ModelFiles) -> Company:
    """Mend what would make an answer depend on others, where that can be, and find out which texts may run together."""
    for transformer in [each for each in first.modules() if isinstance(each, Transformer)]:
        limits.keep_one_attention(transformer.model, prepared.tokenizer.max_tokens, files)
        config = transformer.model.config
        if getattr(config, "pad_token_id", None) is None and prepared.pad_id_is_free:
            config.pad_token_id = prepared.tokenizer.pad_id  # heads of decoders look for the last token by it
    company = limits.find_company(module, prepared)
    if company is not Company.ANY:
        log.warning(
            "this model's answers change with the texts beside them: texts run %s, which is slower",
            "with others of their length" if company is Company.EQUAL_LENGTHS else "one by one",
        )
    return company


def _dimension(module: TokenModule, prepared: Prepared) -> int:
    row = limits.run_alone(module, prepared.probes[0][0])
    if row.ndim != 2:
        raise ModelError("the model does not end in one vector for a text: it has no pooling, or gives many vectors")
    return int(row.shape[1])


def _randomise(model: Any) -> None:
    """Seeded weights of the right shape: for speed work, where the numbers do not matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.05, generator=generator)
