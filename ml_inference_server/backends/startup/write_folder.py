"""Write an exported folder: all that serving a model takes, made by the libraries that serving it then does without.

The folder appears under its name only after a process of its own has started it as a server does, and its answers have
passed the gate.
"""

import gc
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from ml_inference_server import __version__
from ml_inference_server.backends.exported.folder import open_folder
from ml_inference_server.backends.exported.manifest import (
    MANIFEST,
    Graph,
    Manifest,
    MeasuredParity,
    Source,
    TextRules,
    write_manifest,
)
from ml_inference_server.backends.files.model_errors import shown, start_errors
from ml_inference_server.backends.files.model_files import sha256_of
from ml_inference_server.backends.model.export import Exported, GraphFacts, export_loaded
from ml_inference_server.backends.startup.own_process import in_own_process
from ml_inference_server.backends.startup.reference import reference_for, write_reference
from ml_inference_server.backends.startup.resolve import resolve
from ml_inference_server.backends.startup.start import need_libraries, pooling, start_backend
from ml_inference_server.backends.text.tokenizer import FastTokenizer
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ConfigError, ModelError
from ml_inference_server.utils.files import whole_folder

BACKENDS = ("onnx", "openvino")
STEPS = 5
_TOKENIZER = "tokenizer.json"
# What an export writes: of a former one, --force removes no other files.
_OURS = (MANIFEST, _TOKENIZER, "rows.npy", "probes.json", "model*.onnx*", "model*.xml", "model*.bin")
_MADE_WITH = {
    "onnx": ("torch", "transformers", "sentence-transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime"),
    "openvino": ("torch", "transformers", "sentence-transformers", "tokenizers", "onnx", "onnxscript", "openvino"),
}


def write_folder(model: ModelSettings, folder: Path, *, force: bool, step: Callable[[str], None]) -> Manifest:
    """Export `model` for its backend and precision into `folder`. ConfigError or ModelError says why it cannot be.

    force: replace a former export. step: told what is being done, `STEPS` times.
    """
    with start_errors(model):
        place = _place(folder, force)
        model = resolve(_checked(model)).model
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with whole_folder(place) as draft:
                return _fill(draft, model, step)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error.strerror}: {error.filename})") from error


def _place(folder: Path, force: bool) -> Path:
    """Where the folder will really stand. ConfigError if something stands there that must not be replaced."""
    place = folder.expanduser().resolve()
    if not place.exists():
        return place
    if not place.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder that is not there yet")
    inside = sorted(place.iterdir())
    if not inside:
        return place
    if not (place / MANIFEST).exists():
        raise ConfigError(f"{folder} is not empty: name a folder that is not there yet")
    if not force:
        raise ConfigError(f"{folder} holds an export already: name another folder, or replace it with --force")
    others = [each.name for each in inside if not any(each.match(pattern) for pattern in _OURS)]
    if others:
        raise ConfigError(
            f"{folder} also holds {others[0]}, which no export wrote: move it away, or name another folder"
        )
    return place


def _checked(model: ModelSettings) -> ModelSettings:
    if model.backend not in BACKENDS:
        raise ConfigError(f"backend {model.backend} cannot be exported for: use one of {', '.join(BACKENDS)}")
    if open_folder(model.name) is not None:
        raise ConfigError(f"{shown(model.name)} is an exported folder already: export the model itself")
    need_libraries(model)
    return model


def _fill(draft: Path, model: ModelSettings, step: Callable[[str], None]) -> Manifest:
    step("loading the model")
    exported, text = _exported(model, draft, step)
    step(f"writing the graph for {model.backend}" + (f" in {model.precision}" if model.quantized else ""))
    made_from, facts = _write_graph(exported, model, draft)
    step("computing what sentence-transformers answers in FP32")
    reference = reference_for(model, of_any_size=True)
    if reference is None:
        raise ModelError(f"there are no FP32 answers of {shown(model.name)} to compare with")
    write_reference(draft, reference)
    packages = [
        *_MADE_WITH[model.backend],
        *(["nncf"] if (model.backend, model.precision) == ("openvino", "int8") else []),
    ]
    manifest = Manifest(
        backend=model.backend,  # type: ignore[arg-type] # one of BACKENDS
        task=exported.task,
        similarity=exported.similarity,
        dimension=exported.dimension,
        company=exported.company,
        graph=Graph(
            file=made_from.name if model.backend == "onnx" else "model.xml",
            output=exported.output,
            precision=model.precision,
            weights=exported.describe(made_from),
            facts=facts,
        ),
        text=text,
        source=Source(
            model=model.name,
            found_in=exported.files.source,
            weights_sha256=exported.files.weights_sha256,
            model_sha256=exported.files.model_sha256,
            parameters=exported.parameters,
            random_weights=model.random_weights,
            pooling=pooling(model),
        ),
        parity=None,
        made_with={"ml-inference-server": __version__} | {name: importlib.metadata.version(name) for name in packages},
        files={each.name: sha256_of(each) for each in sorted(draft.iterdir())},
    )
    write_manifest(draft, manifest)
    step("starting the folder as a server does, and comparing its answers with these")
    parity = in_own_process(_pass_the_gate, ModelSettings(name=str(draft), device="cpu"))
    manifest = manifest.model_copy(update={"parity": parity})
    write_manifest(draft, manifest)
    return manifest


def _exported(model: ModelSettings, draft: Path, step: Callable[[str], None]) -> tuple[Exported, TextRules]:
    """The FP32 graph in the cache; the tokenizer goes into `draft`."""
    from ml_inference_server.backends.model.loading import load_model
    from ml_inference_server.backends.text.library_tokenizer import LibraryTokenizer

    loaded = load_model(model)
    tokenizer = loaded.tokenizer
    if isinstance(tokenizer, LibraryTokenizer):
        raise ModelError(
            f"{shown(model.name)} cannot be exported, because {tokenizer.reason}: its texts are tokenised by "
            f"sentence-transformers' own code, which no folder holds; serve it with model.backend pytorch"
        )
    assert isinstance(tokenizer, FastTokenizer)  # noqa: S101 - there is no third kind
    (draft / _TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    step("exporting the graph")
    exported = export_loaded(loaded, model)
    del loaded
    gc.collect()
    rules = TextRules(
        file=_TOKENIZER,
        max_tokens=tokenizer.max_tokens,
        pad_id=tokenizer.pad_id,
        truncation_side=tokenizer.side,
        takes_segments=tokenizer.takes_segments,
        prompts=dict(tokenizer.prompts),
    )
    return exported, rules


def _write_graph(exported: Exported, model: ModelSettings, draft: Path) -> tuple[Path, GraphFacts | None]:
    if model.backend == "onnx":
        from ml_inference_server.backends import onnx

        return onnx.write_graph(exported, model.precision, draft)
    from ml_inference_server.backends import openvino

    return openvino.write_graph(exported, model.precision, draft)


def _pass_the_gate(model: ModelSettings) -> MeasuredParity:
    """In a process that has loaded nothing else. ModelError if the folder is not fit to serve."""
    info = start_backend(model, lambda phase: None).info
    if info.parity_mean is None or info.parity_min is None:
        raise ModelError("the answers could not be compared with FP32")
    return MeasuredParity(mean=info.parity_mean, least=info.parity_min)
