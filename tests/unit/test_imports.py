"""Who may import whom. An arrow that is not in ALLOWED fails here, wherever in a file the import stands."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "ml_inference_server"

# First the importing room, then what it may reach: a room with everything below it, or one module of it.
# A module belongs to the longest name here that leads to it.
ALLOWED: dict[str, set[str]] = {
    "utils": set(),
    "proto": set(),
    "": {"api"},
    "api": {"proto"},
    # Upwards: base, files, text, model, exported, compiled, the engines (the files of `backends` itself), startup.
    "backends.base": {"utils"},
    "backends.files": {"utils"},
    "backends.text": {"backends.base", "backends.files", "utils"},
    "backends.model": {"backends.base", "backends.files", "backends.text", "utils"},
    "backends.exported": {"backends.base", "backends.files", "backends.text", "backends.model", "utils"},
    "backends.compiled": {"backends.base", "backends.files", "backends.model", "utils"},
    "backends": {
        "backends.base",
        "backends.files",
        "backends.text",
        "backends.model",
        "backends.exported",
        "backends.compiled",
        "utils",
    },
    "backends.startup": {"backends", "utils"},
    "engine_bench": {"backends", "utils"},
    # Who comes in: asked by all protocols.
    "door": {"utils"},
    "metrics": {"door", "utils"},
    "worker_processes": {"metrics", "utils"},
    # What is said over gRPC stands on the use cases, which know no protocol; only the start and the stop know both.
    "server": {
        "door",
        "backends.base",
        "backends.startup.resolve",
        "backends.startup.start",
        "backends.text.windows",
        "metrics",
        "utils",
    },
    "server.rpc": {
        "door",
        "server.answer_headers",
        "server.call",
        "server.calls",
        "server.encodings",
        "server.field_names",
        "server.observation",
        "server.open_inference",
        "server.options",
        "server.ready_model",
        "server.service",
        "server.similarity",
        "server.state",
        "server.status",
        "server.tei_words",
        "server.tensors",
        "server.token_service",
        "metrics",
        "proto",
        "utils",
    },
    "server.http": {
        "door",
        "server.answer_headers",
        "server.call",
        "server.calls",
        "server.encodings",
        "server.field_names",
        "server.observation",
        "server.open_inference",
        "server.options",
        "server.scheduler",
        "server.service",
        "server.similarity",
        "server.state",
        "server.status",
        "server.tei_words",
        "server.tensors",
        "server.token_service",
        "metrics",
        "utils",
    },
    "server.lifecycle": {
        "door",
        "server.health",
        "server.ready_model",
        "server.state",
        "server.caller_limits",
        "server.calls",
        "server.http",
        "server.rpc",
        "backends.startup.resolve",
        "metrics",
        "utils",
        "server.open_inference",
        "worker_processes",
        "server.entrance",
    },
    "server.serve": {"server.health", "server.lifecycle", "utils", "worker_processes"},
    # Upwards: the types of a result, load, target, result, measure, report, the commands, studies.
    "benchmark.result.document": {"utils"},
    "benchmark.load": {"proto", "utils"},
    "benchmark.target": {"benchmark.result.document", "benchmark.load", "utils"},
    "benchmark.result": {"benchmark.result.document", "benchmark.load", "benchmark.target", "utils"},
    "benchmark.measure": {"benchmark.load", "benchmark.target", "benchmark.result", "utils"},
    "benchmark.report": {"benchmark.load", "benchmark.target", "benchmark.result", "benchmark.measure", "utils"},
    "benchmark": {
        "benchmark.load",
        "benchmark.target",
        "benchmark.result",
        "benchmark.measure",
        "benchmark.report",
        "utils",
    },
    "benchmark.studies": {"benchmark", "door", "proto", "utils"},
    # The proxy's side knows errors and their form, nothing of an engine; the policy runs in Ray's controller, alone.
    "deploy.ray_proxy": {"server.rpc.method_handlers", "server.rpc.native", "utils"},
    "deploy.ray_scaling": set(),
    "deploy.ray_entrance": {"deploy.ray_proxy", "door", "metrics.view", "server.entrance", "server.rpc", "utils"},
    "deploy.ray_http": {"deploy.ray_proxy", "metrics", "server.http", "server.lifecycle", "utils"},
    "deploy": {
        "deploy.ray_entrance",
        "deploy.ray_http",
        "deploy.ray_proxy",
        "deploy.ray_scaling",
        "metrics.view",
        "server.entrance",
        "server.lifecycle",
        "utils",
    },
    "main": {"server.serve", "utils", "worker_processes"},
    "client": {"benchmark", "utils"},
    "cli": {
        "backends.compiled.native",
        "backends.startup.write_folder",
        "benchmark",
        "client",
        "door",
        "main",
        "api",
        "utils",
    },
    "__main__": {"cli"},
    "run_all_experiments": {"benchmark", "utils"},
}

# The data that a room may open beside its own. Paths start in the package; ".." is the checkout.
DATA: dict[str, set[str]] = {
    "utils": {"sample", "experiments", ".."},
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
    "backends/model/loading.py": {"torch", "sentence_transformers", "transformers"},
    "backends/text/text_input.py": {"sentence_transformers", "torch"},
    "backends/text/library_tokenizer.py": {"sentence_transformers", "torch"},
    "backends/text/limits.py": {"torch"},
    "backends/model/load_guard.py": {"torch"},
    "backends/model/misfits.py": {"sentence_transformers", "torch"},
    "backends/compiled/packed.py": {"torch", "transformers"},
    "backends/compiled/graph.py": {"torch"},
    "backends/model/quantize_torch.py": {"torch"},
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


def room_of(below: str) -> str:
    """The longest name in ALLOWED that leads to a module, given from below the package; "" where there is none."""
    leads = [name for name in ALLOWED if below == name or below.startswith(f"{name}.")]
    return max(leads, key=len, default="")


def opened(source: str, path: Path) -> Iterator[tuple[int, Path]]:
    """Each place that `source`, standing at `path`, finds from its own: (line, the path)."""
    tree = ast.parse(source)
    inside = {id(child): parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "__file__":
            whole: ast.AST = node
            while isinstance(parent := inside[id(whole)], ast.expr):
                whole = parent
            yield node.lineno, Path(eval(ast.unparse(whole), {"Path": Path, "__file__": str(path)}))  # noqa: S307


def data_violations(path: Path, source: str) -> list[str]:
    """What `source`, standing at `path` in the package, opens and may not."""
    room = room_of(".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts))
    found = []
    for line, place in opened(source, path):
        if place.is_relative_to(path.parent):
            continue
        outside = not place.is_relative_to(ROOT / PACKAGE)
        name = ".." if outside else place.relative_to(ROOT / PACKAGE).parts[0]
        if name not in DATA.get(room.split(".")[0], set()):
            found.append(f"{path.relative_to(ROOT)}:{line} may not open {name}")
    return found


def is_allowed(part: str, target: str) -> bool:
    """`target` lies below the package: "utils.config:Settings", or ":__version__" for the package itself."""
    if target.startswith(":"):
        return target == ":__version__"
    module = target.split(":")[0]
    if room_of(module) == part:
        return True
    return any(target == rule or module == rule or module.startswith(f"{rule}.") for rule in ALLOWED[part])


def violations(path: Path, source: str) -> list[str]:
    """What `source`, standing at `path`, imports and may not."""
    relative = path.relative_to(ROOT).with_suffix("")
    is_package = relative.name == "__init__"
    module = ".".join(relative.parent.parts if is_package else relative.parts)
    below = module.removeprefix(PACKAGE).lstrip(".")
    part = room_of(below)
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
            if top == PACKAGE and (not is_allowed(part, name.removeprefix(PACKAGE).lstrip("."))):
                found.append(f"{module}:{node.lineno} may not import {name}")
            elif top in HEAVY - home and id(node) not in in_functions:
                found.append(f"{module}:{node.lineno} may import {top} only inside the function that needs it")
    return found


@pytest.mark.parametrize("path", our_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_the_allowed_way(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []


def test_every_room_has_a_rule() -> None:
    inside = [path.relative_to(ROOT / PACKAGE).with_suffix("").parts for path in our_files()[:-1]]
    rooms = {parts[0] for parts in inside} | {".".join(parts[:2]) for parts in inside if len(parts) > 2}
    deep = {room for room in rooms if "." in room and room.split(".")[0] in ("backends", "benchmark")}
    assert ({room for room in rooms if "." not in room} | deep) - {"__init__"} <= set(ALLOWED)


def test_no_room_leads_back_to_itself() -> None:
    """The rules themselves have no circle: there is an order in which each room needs only those before it."""
    needs = {
        room: {other for rule in rules for other in ALLOWED if covers(rule, other) and other != room}
        for room, rules in ALLOWED.items()
    }
    while ready := {room for room, others in needs.items() if not others}:
        needs = {room: others - ready for room, others in needs.items() if room not in ready}
    assert needs == {}


def covers(rule: str, room: str) -> bool:
    """Whether something of `room` may be imported under `rule`."""
    return room_of(rule) == room or room.startswith(f"{rule}.")


@pytest.mark.parametrize("path", our_files()[:-1], ids=lambda path: str(path.relative_to(ROOT)))
def test_data_is_opened_by_the_room_that_holds_it(path: Path) -> None:
    assert data_violations(path, path.read_text(encoding="utf-8")) == []


def test_a_foreign_data_file_is_noticed() -> None:
    source = 'from pathlib import Path\nX = Path(__file__).resolve().parent.parent / "docs" / "speed.json"'
    assert len(data_violations(ROOT / PACKAGE / "metrics" / "x.py", source)) == 1
    own = 'from pathlib import Path\nX = Path(__file__).parent / "page.html"'
    assert data_violations(ROOT / PACKAGE / "metrics" / "x.py", own) == []


@pytest.mark.parametrize(
    ("path", "source", "blamed"),
    [
        ("utils/x.py", "from ml_inference_server.backends import base", "ml_inference_server.backends.base"),
        ("backends/x.py", "def f():\n    import ml_inference_server.metrics.registry", "metrics.registry"),
        ("backends/x.py", "from ..server.batching import Batch", "ml_inference_server.server.batching:Batch"),
        ("backends/__init__.py", "from .. import metrics", "ml_inference_server.metrics"),
        ("server/rpc/x.py", "from ml_inference_server.backends import pytorch", "backends.pytorch"),
        ("server/x.py", "from ml_inference_server.backends import BACKENDS", "backends:BACKENDS"),
        ("server/x.py", "from ml_inference_server.server.rpc.status import grpc_code", "server.rpc.status:grpc_code"),
        ("server/rpc/x.py", "from ..scheduler import DynamicBatcher", "server.scheduler:DynamicBatcher"),
        ("server/x.py", "from ml_inference_server.backends.files.model_files import f", "backends.files.model_files:f"),
        ("backends/text/x.py", "from ml_inference_server.backends.model import loading", "backends.model.loading"),
        ("backends/x.py", "from ml_inference_server.backends.startup import parity", "backends.startup.parity"),
        ("backends/startup/x.py", "from ml_inference_server.engine_bench import compare", "engine_bench.compare"),
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
        ("server/x.py", "from ml_inference_server.backends.startup.start import start_backend"),
        ("server/x.py", "from ml_inference_server import __version__\nfrom . import batching"),
        ("server/rpc/x.py", "from ..call import Call\nfrom ...metrics import registry"),
        ("backends/pytorch.py", "import torch\nfrom .base import Backend"),
        ("benchmark/x.py", "def f():\n    from datasets import load_dataset"),
    ],
)
def test_a_right_import_passes(path: str, source: str) -> None:
    assert violations(ROOT / PACKAGE / path, source) == []


@pytest.mark.parametrize("module", ["main", "client", "benchmark.runner", "cli"])
def test_starting_loads_no_engine(module: str) -> None:
    program = f"import sys, {PACKAGE}.{module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (loaded.stdout, loaded.returncode) == ("[]\n", 0), loaded.stderr
