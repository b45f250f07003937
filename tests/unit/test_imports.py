"""Who may import whom. An arrow that is not in ALLOWED fails here, wherever in a file the import stands."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "ml_inference_server"

# First the importing part, then what it may reach: a part with everything below it, or one module of it.
ALLOWED: dict[str, set[str]] = {
    "utils": set(),
    "proto": set(),
    "backends": {"utils"},
    "metrics": {"utils"},
    "server": {
        "backends.base",
        "backends.tokenizer",
        "backends.resolve",
        "backends.start",
        "metrics",
        "proto",
        "utils",
    },
    "benchmark": {"proto", "utils"},
    "deploy": {"server"},
    "main": {"server", "utils"},
    "client": {"benchmark", "utils"},
    "run_all_experiments": {"benchmark", "utils"},
}

# Slow to load, or not installed everywhere: at module level only in the file that is chosen by name.
HEAVY = {
    "torch",
    "onnxruntime",
    "openvino",
    "ray",
    "sentence_transformers",
    "transformers",
    "datasets",
    "matplotlib",
}
HOME_OF_HEAVY = {
    "backends/pytorch.py": {"torch", "sentence_transformers", "transformers"},
    "backends/loading.py": {"torch", "sentence_transformers", "transformers"},
    "backends/text_input.py": {"sentence_transformers", "torch"},
    "backends/library_tokenizer.py": {"sentence_transformers", "torch"},
    "backends/limits.py": {"torch"},
    "backends/load_guard.py": {"torch"},
    "backends/misfits.py": {"sentence_transformers", "torch"},
    "backends/packed.py": {"torch", "transformers"},
    "backends/compiled.py": {"torch"},
    "backends/quantize_torch.py": {"torch"},
    "backends/onnx.py": {"onnxruntime"},
    "backends/openvino.py": {"openvino"},
    "deploy/ray_serve.py": {"ray"},
}


def our_files() -> list[Path]:
    inside = sorted(path for path in (ROOT / PACKAGE).rglob("*.py") if not path.stem.endswith(("_pb2", "_pb2_grpc")))
    return [*inside, ROOT / "run_all_experiments.py"]


def imported(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names, `package.module:name` where a name is taken out of a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    source = node.module or ""
    if node.level:
        base = module.split(".")[: len(module.split(".")) - node.level + is_package]
        source = ".".join([*base, *([source] if source else [])])
    for alias in node.names:
        path = ROOT / Path(*source.split("."), alias.name)
        is_module = path.is_dir() or path.with_suffix(".py").is_file()
        yield f"{source}.{alias.name}" if is_module else f"{source}:{alias.name}"


def is_allowed(part: str, target: str) -> bool:
    """`target` lies below the package: "utils.config:Settings", or ":__version__" for the package itself."""
    if target.startswith(":"):
        return target == ":__version__"
    module = target.split(":")[0]
    if module.split(".")[0] == part:
        return True
    return any(target == rule or module == rule or module.startswith(f"{rule}.") for rule in ALLOWED[part])


def violations(path: Path, source: str) -> list[str]:
    """What `source`, standing at `path`, imports and may not."""
    relative = path.relative_to(ROOT).with_suffix("")
    is_package = relative.name == "__init__"
    module = ".".join(relative.parent.parts if is_package else relative.parts)
    below = module.removeprefix(PACKAGE).lstrip(".")
    part = below.split(".")[0]
    tree = ast.parse(source)
    in_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    home = HOME_OF_HEAVY.get(path.relative_to(ROOT).as_posix().removeprefix(f"{PACKAGE}/"), set())
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for name in imported(node, module, is_package):
            top = name.replace(":", ".").split(".")[0]
            if top == PACKAGE and (not part or not is_allowed(part, name.removeprefix(PACKAGE).lstrip("."))):
                found.append(f"{module}:{node.lineno} may not import {name}")
            elif top in HEAVY - home and id(node) not in in_functions:
                found.append(f"{module}:{node.lineno} may import {top} only inside the function that needs it")
    return found


@pytest.mark.parametrize("path", our_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_the_allowed_way(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []


def test_every_part_of_the_package_has_a_rule() -> None:
    parts = {path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py") for path in our_files()[:-1]}
    assert parts - {"__init__"} <= set(ALLOWED)


@pytest.mark.parametrize(
    ("path", "source", "blamed"),
    [
        ("utils/x.py", "from ml_inference_server.backends import base", "ml_inference_server.backends.base"),
        ("backends/x.py", "def f():\n    import ml_inference_server.metrics.registry", "metrics.registry"),
        ("backends/x.py", "from ..server.batching import Batch", "ml_inference_server.server.batching:Batch"),
        ("backends/__init__.py", "from .. import metrics", "ml_inference_server.metrics"),
        ("server/servicers/x.py", "from ml_inference_server.backends import pytorch", "backends.pytorch"),
        ("server/x.py", "from ml_inference_server.backends import BACKENDS", "backends:BACKENDS"),
        ("server/x.py", "from ml_inference_server.backends.model_files import find", "backends.model_files:find"),
        ("benchmark/x.py", "if True:\n    import ml_inference_server.server", "ml_inference_server.server"),
        ("main.py", "from ml_inference_server.backends.base import Backend", "backends.base:Backend"),
        ("utils/x.py", "from ml_inference_server import main", "ml_inference_server.main"),
        ("__init__.py", "from ml_inference_server.utils import cpu", "utils.cpu"),
        ("server/x.py", "try:\n    import torch.cuda\nexcept ImportError:\n    pass", "import torch only inside"),
        ("backends/onnx.py", "class A:\n    from torch import nn", "import torch only inside"),
        ("benchmark/x.py", "from matplotlib import pyplot", "import matplotlib only inside"),
    ],
)
def test_a_wrong_import_is_noticed(path: str, source: str, blamed: str) -> None:
    found = violations(ROOT / PACKAGE / path, source)
    assert len(found) == 1
    assert blamed in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("server/x.py", "from ml_inference_server.backends.start import start_backend"),
        ("server/x.py", "from ml_inference_server import __version__\nfrom . import batching"),
        ("server/servicers/x.py", "from ..batching import Batch\nfrom ...metrics import registry"),
        ("backends/pytorch.py", "import torch\nfrom .base import Backend"),
        ("benchmark/x.py", "def f():\n    from datasets import load_dataset"),
    ],
)
def test_a_right_import_passes(path: str, source: str) -> None:
    assert violations(ROOT / PACKAGE / path, source) == []


@pytest.mark.parametrize("module", ["main", "client", "benchmark.runner"])
def test_starting_loads_no_engine(module: str) -> None:
    program = f"import sys, {PACKAGE}.{module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (loaded.stdout, loaded.returncode) == ("[]\n", 0), loaded.stderr
