"""An exported folder as what the server runs: its settings, its tokenizer, its graph. Needs no library of the model."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ml_inference_server.backends.exported.manifest import MANIFEST, REMEDY, Manifest, read_manifest, verify_files
from ml_inference_server.backends.files.model_errors import one_line
from ml_inference_server.backends.files.model_files import ModelFiles, local_path
from ml_inference_server.backends.model.export import Exported
from ml_inference_server.backends.text.tokenizer import FastTokenizer
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True)
class ExportedFolder:
    """A folder whose files are those that were exported, all of them."""

    path: Path
    manifest: Manifest

    def requested(self, model: ModelSettings) -> ModelSettings:
        """`model` with what it leaves open taken from the folder; `auto` stays.

        ConfigError where it asks for something else than the folder holds.
        """
        holds, explicit = self.manifest, model.model_fields_set
        precision = holds.graph.precision
        if "backend" in explicit and model.backend not in ("auto", holds.backend):
            raise self._contradiction("model.backend", model.backend, holds.backend)
        if explicit & {"quantized", "quantization"}:
            asked = model.requested_quantization("cpu")
            if asked not in ("auto", precision):
                raise self._contradiction("model.quantization", asked, precision)
        if model.task not in ("auto", holds.task):
            raise self._contradiction("model.task", model.task, holds.task)
        if model.compile:
            raise ConfigError(
                f"model.compile is for backend pytorch, and {self.path} was exported for {holds.backend}: leave it out"
            )
        if "random_weights" in explicit and model.random_weights != holds.source.random_weights:
            raise ConfigError(
                f"model.random_weights is {str(model.random_weights).lower()}, but {self.path} holds its own weights: "
                f"leave it out"
            )
        if model.max_tokens is not None and model.max_tokens > holds.text.max_tokens:
            raise ConfigError(
                f"model.max_tokens is {model.max_tokens}, but {self.path} was exported for at most "
                f"{holds.text.max_tokens} tokens: lower it, or export the model again with --max-tokens"
            )
        filled: dict[str, object] = {"random_weights": holds.source.random_weights}
        if "backend" not in explicit:
            filled["backend"] = holds.backend
        if not explicit & {"quantized", "quantization"}:
            filled |= {"quantized": precision != "none", "quantization": None if precision == "none" else precision}
        return model.model_copy(update=filled)

    def concrete(self, requested: ModelSettings) -> ModelSettings:
        """`requested` with the folder's own in the place of each `auto`."""
        precision = self.manifest.graph.precision
        return requested.model_copy(
            update={
                "backend": self.manifest.backend,
                "quantized": precision != "none",
                "quantization": None if precision == "none" else precision,
            }
        )

    def _contradiction(self, key: str, asked: str, holds: str) -> ConfigError:
        return ConfigError(
            f"{key} is {asked}, but {self.path} was exported as {holds}: leave {key} out, or serve the model itself"
        )

    def tokenizer(self, max_tokens: int | None = None) -> FastTokenizer:
        """max_tokens: of the settings; None: the limit of the export."""
        rules = self.manifest.text
        file = self.path / rules.file
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library has no type of its own
            raise ModelError(f"{file} cannot be read ({one_line(error)}): {REMEDY}") from error
        return FastTokenizer(
            tokenizer,
            max_tokens=rules.max_tokens if max_tokens is None else max_tokens,
            pad_id=rules.pad_id,
            side=rules.truncation_side,
            prompts=rules.prompts,
            takes_segments=rules.takes_segments,
        )

    def graph(self, max_tokens: int | None) -> Exported:
        """What an engine runs. max_tokens: of the settings."""
        holds, source = self.manifest, self.manifest.source
        return Exported(
            file=self.path / holds.graph.file,
            output=holds.graph.output,
            weights=holds.graph.weights,
            model=source.model,
            files=ModelFiles(
                self.path, "exported folder", holds.graph.file, source.weights_sha256, source.model_sha256
            ),
            tokenizer=self.tokenizer(max_tokens),
            task=holds.task,
            similarity=holds.similarity,
            company=holds.company,
            dimension=holds.dimension,
            parameters=source.parameters,
            precision=holds.graph.precision,
            facts=holds.graph.facts,
        )


def open_folder(name: str) -> ExportedFolder | None:
    """The exported folder that `name` means, verified; None where it means something else. ModelError if damaged."""
    path = local_path(name)
    if path is None or not ((path / MANIFEST).exists() or (path / MANIFEST).is_symlink()):
        return None
    manifest = read_manifest(path)
    verify_files(path, manifest)
    return ExportedFolder(path, manifest)


def exported_graph(settings: ModelSettings) -> Exported | None:
    """The graph of the exported folder that `settings.name` means; None where it means a model."""
    folder = open_folder(settings.name)
    return None if folder is None else folder.graph(settings.max_tokens)
