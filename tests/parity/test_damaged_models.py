"""No start ends in a traceback, hangs or takes the memory, whatever a model's folder or a setting holds.

Each file of a tiny model is damaged in turn; a start then serves what sentence-transformers answers, or refuses in one
line that says what to do. `MLIS_SWEEP=all` tries every value in every place, which takes about an hour; without it a
part is tried, the same at each run.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml_inference_server.backends.startup.resolve import resolve
from ml_inference_server.backends.startup.start import load_resolved
from ml_inference_server.utils.errors import EXIT_CONFIG, EXIT_MODEL, ModelError, StartError
from tests.integration.server_process import ROOT, arguments
from tests.parity import damaged_models as damaged
from tests.parity.damaged_models import Damage
from tests.parity.tiny_model import settings as model_settings
from tests.parity.tiny_model import start

pytestmark = [
    pytest.mark.real,
    # numpy and torch warn of zero-element tensors and of constants; what matters is how the start ends.
    pytest.mark.filterwarnings("ignore"),
]

ALL = os.environ.get("MLIS_SWEEP") == "all"
_MOST_CHARACTERS = 700
_REMEDY = re.compile(
    r"download|check (its files|the path)|name the|refusing to read"
    r"|set (it|model)|use (a|the)|convert|model\.\w+|expected"
)
# Above what this process has: a start that asks for more would ask for all of a machine's.
_MORE_BYTES = 3 << 30
_SAVED = {"embedder": damaged.save_embedder, "cross-encoder": damaged.save_cross_encoder}


@pytest.fixture(scope="module", autouse=True)
def own_cache_and_bounded_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads, limits = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_AS)
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLIS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes + _MORE_BYTES, limits[1]))
        yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(_SAVED))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _SAVED[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damaged.save_embedder(tmp_path_factory.mktemp("embedder"))


def ending(name: Path | str, **keys: Any) -> str:
    """ "" for a start that passed its parity; else the one line that refuses it."""
    try:
        started = start(name, "pytorch", **keys)  # type: ignore[arg-type]
    except StartError as error:
        return str(error)
    assert started.info.parity_min is not None
    assert started.info.parity_min > 0.999
    return ""


def fault_of(line: str) -> str:
    """What is wrong with a refusal."""
    if not line.isprintable():
        return "more than a line"
    if len(line) > _MOST_CHARACTERS:
        return "long"
    if "cannot be started with" in line:
        return "no sentence of its own"
    if re.search(r"alloc|MemoryError", line):
        return "refused only once memory was asked for"
    return "" if _REMEDY.search(line) else "no remedy"


def sweep(model: Path, place: Path, cases: Iterable[tuple[str, Damage]]) -> dict[str, str]:
    """Each case on a copy of its own; how each start ended. Fails if one ended badly."""
    endings, faults = {}, []
    for name, damage in cases:
        copy = shutil.copytree(model, place / "copy")
        damage(copy)
        endings[name] = line = ending(copy)
        if line and (fault := fault_of(line)):
            faults.append(f"{name}: {fault}: {line}")
        shutil.rmtree(copy)
    assert not faults, "\n".join(faults)
    return endings


def test_whatever_lies_in_the_place_of_a_file(model: Path, tmp_path: Path) -> None:
    endings = sweep(model, tmp_path, damaged.other_files(model))
    for what in ("fifo", "socket", "device", "folder", "dangling-link", "garbage", "cut", "nested", "empty"):
        for name in damaged.files_of(model):
            assert name in endings[f"{name} {what}"], f"{name} {what}: {endings[f'{name} {what}']}"


def test_weights_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    cases = [each for each in damaged.other_weights(model) if ALL or not each[0].startswith("2_Dense/")]
    endings = sweep(model, tmp_path, cases)
    for dtype in ("float16", "bfloat16", "float64"):
        assert endings[f"model.safetensors {dtype}"] == ""
    assert endings["two shards"] == ""
    assert "misses model-00002-of-00002.safetensors" in endings["one of two shards"]
    assert "outside of its folder" in endings["index outside"]
    assert "holds I8 integers" in endings["model.safetensors int8"]
    assert "NaN or infinity in its weights" in endings["model.safetensors one nan"]
    assert "other shapes than its config.json says" in endings["model.safetensors cut rows"]
    assert "gives every" in endings["model.safetensors all 0"]


def test_values_that_mean_something_else(model: Path, tmp_path: Path) -> None:
    cases = [each for number, each in enumerate(damaged.other_words(model)) if ALL or number < 7 or number % 7 == 0]
    endings = sweep(model, tmp_path, cases)
    assert "it is another model's tokenizer" in endings["one id above the table"]


def test_no_value_of_a_configuration_ends_in_a_traceback(model: Path, tmp_path: Path) -> None:
    cases = list(damaged.other_values(model))
    sweep(model, tmp_path, cases if ALL else cases[::97])


@pytest.mark.parametrize("number", [10**6, 10**9, 10**12, 10**400])
def test_a_configuration_that_asks_for_all_memory_is_refused_before_it_is_taken(
    model: Path, tmp_path: Path, number: int
) -> None:
    def large(*path: str, name: str = "config.json") -> tuple[str, Damage]:
        return f"{name} {path}", lambda copy: damaged.set_value(copy, name, path, number)

    keys = ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"]
    cases = [large(key) for key in (*keys, "num_labels", "num_attention_heads", "type_vocab_size")]
    if (model / "2_Dense").exists():
        cases += [large(key, name="2_Dense/config.json") for key in ("in_features", "out_features")]
        cases += [large("embedding_dimension", name="1_Pooling/config.json")]
    endings = sweep(model, tmp_path, cases)
    assert endings["config.json ('num_hidden_layers',)"]
    assert endings["config.json ('num_labels',)"]


def test_a_folder_that_lost_its_list_of_modules_is_not_served_by_another_pooling(
    embedder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(embedder, tmp_path / "copy")
    (copy / "modules.json").unlink()
    assert "no modules.json that says how its modules are used" in ending(copy)


def test_a_module_behind_a_link_is_part_of_the_model(embedder: Path, tmp_path: Path) -> None:
    """Else another Dense there would be answered from the first one's cache."""
    from ml_inference_server.backends.files.model_files import find_model

    copy = shutil.copytree(embedder, tmp_path / "copy")
    (copy / "2_Dense").rename(tmp_path / "elsewhere")
    (copy / "2_Dense").symlink_to(tmp_path / "elsewhere")
    before = find_model(str(copy)).model_sha256
    damaged.set_value(tmp_path, "elsewhere/config.json", ("activation_function",), "torch.nn.modules.linear.Identity")
    assert find_model(str(copy)).model_sha256 != before


# Mutations that nobody thought of.

_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from([10**12, -1, 0, 1e30])
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(
    max_examples=3000 if ALL else 12,
    deadline=None,
    derandomize=not ALL,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_no_mutation_of_the_configurations_ends_in_a_traceback(
    model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The catch-all sentence is allowed here; everything else that a refusal must be holds."""
    copy = shutil.copytree(model, tmp_path_factory.mktemp("mutated") / "copy")
    try:
        names = [name for name in damaged.files_of(model) if name.endswith(".json")]
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(names))
            content = json.loads((copy / name).read_text())
            places = list(damaged.places(content))
            if places:
                damaged.set_value(copy, name, data.draw(st.sampled_from(places)), data.draw(_VALUES))
        line = ending(copy)
        assert fault_of(line) in ("", "no sentence of its own") if line else True, line
    finally:
        shutil.rmtree(copy)


# Settings.

NAMES = [
    " ", "\t", ".", "..", "/", "//", "/dev/null", "/dev/zero", "/proc/self/mem", "~", "~nobody-of-this-name/x",
    "a/b/c", "a//b", "n" * 300, "a/" * 3000, "/" + "x" * 5000, "line\nbreak/x", "nul\0byte", "\x1b[31mred",
    "модель/имя", "🙂", "../../etc", "http://localhost/model", "file:///tmp", "-name", "--", "a b/c d", "%s%n",
    "{0}", "$HOME", "*", "sentence-transformers/",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=[repr(name[:12]) for name in NAMES])
def test_any_name_is_found_or_refused_in_one_line(name: str) -> None:
    line = ending(name)
    assert line
    assert line.isprintable()
    assert len(line) < 1200
    assert "cannot be started with" not in line


@pytest.mark.parametrize(
    "keys",
    [
        {"max_tokens": 131072},
        {"max_tokens": 65},
        {"max_tokens": 8},
        {"threads": 64},
        {"streams": 64},
        {"task": "cross_encoder"},
        {"task": "embedding"},
        {"device": "cuda"},
        {"device": "mps"},
        {"quantized": True, "quantization": "fp16"},
        {"quantized": True, "quantization": "bf16"},
        {"min_parity": 0.0},
        {"min_parity": 1.0},
        {"random_weights": True},
    ],
    ids=str,
)
def test_any_setting_starts_or_is_refused_in_one_line(embedder: Path, keys: dict[str, Any]) -> None:
    line = ending(embedder, **keys)
    assert not line or fault_of(line) == "", line


def test_a_process_of_the_engine_that_starts_again_refuses_in_one_line_too(embedder: Path, tmp_path: Path) -> None:
    """It loads what was resolved before; the files may have changed meanwhile."""
    copy = shutil.copytree(embedder, tmp_path / "copy")
    resolution = resolve(model_settings(copy, "pytorch"))
    damaged.set_value(copy, "2_Dense/config.json", ("module_input_name",), [])
    with pytest.raises(ModelError) as caught:
        load_resolved(resolution, lambda done, total: None)
    assert fault_of(str(caught.value)) == "", str(caught.value)


# The whole program.


def _ends(process: "subprocess.Popen[str]") -> tuple[int, list[str], str]:
    """(exit code, lines that begin with error:, stderr)."""
    stderr = process.communicate(timeout=170)[1]
    return process.returncode, [line for line in stderr.splitlines() if line.startswith("error: ")], stderr


def _begin(*options: str, **popen: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(arguments(*options), cwd=ROOT, stderr=subprocess.PIPE, text=True, **popen)


_WORST: dict[str, Damage] = {
    "fifo": lambda file: damaged.OTHER_FILES["fifo"](file),
    "nested": lambda file: damaged.OTHER_FILES["nested"](file),
    "layers": lambda file: damaged.set_value(file.parent, file.name, ("num_hidden_layers",), 10**9),
}
_MORE: dict[str, Damage] = {
    "device": lambda file: damaged.OTHER_FILES["device"](file),
    "width": lambda file: damaged.set_value(file.parent, file.name, ("hidden_size",), 10**12),
    "activation": lambda file: damaged.set_value(file.parent, file.name, ("hidden_act",), "no\nsuch"),
    "heads": lambda file: damaged.set_value(file.parent, file.name, ("num_attention_heads",), 0),
    "type": lambda file: damaged.set_value(file.parent, file.name, ("model_type",), "no-such-type"),
    "socket": lambda file: damaged.OTHER_FILES["socket"](file),
    "missing": lambda file: damaged.OTHER_FILES["missing"](file),
    "cut": lambda file: damaged.OTHER_FILES["cut"](file),
    "link": lambda file: damaged.OTHER_FILES["link-to-itself"](file),
}


@pytest.mark.slow
def test_the_program_ends_in_one_line_with_3(embedder: Path, tmp_path: Path) -> None:
    """All at once: each spends most of its time on imports."""
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for what, damage in (_WORST | (_MORE if ALL else {})).items():
            copy = shutil.copytree(embedder, tmp_path / what)
            damage(copy / "config.json")
            processes[what] = _begin("--model-name", str(copy))
        for what, process in processes.items():
            code, lines, stderr = _ends(process)
            assert (code, len(lines)) == (EXIT_MODEL, 1), f"{what}: {code} {stderr}"
            assert "Traceback" not in stderr, what
            assert fault_of(lines[0]) == "", lines[0]
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def test_settings_that_no_model_can_have_end_in_one_line_with_2() -> None:
    for setting in (
        "model.threads=-1",
        "model.threads=99999",
        "model.streams=many",
        "model.max_tokens=1",
        "model.name=",
    ):
        process = _begin("--set", setting)
        code, lines, stderr = _ends(process)
        assert (code, len(lines)) == (EXIT_CONFIG, 1), stderr
        assert "Traceback" not in stderr


_NOBODY = """
import os, sys
from ml_inference_server.backends import pytorch
from ml_inference_server.backends.model import loading
from ml_inference_server.backends.text import text_input
from ml_inference_server.backends.startup.start import start_backend
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError
os.environ.pop("HOME", None)
os.setgroups([]); os.setgid(54321); os.setuid(54321)
for name in sys.argv[1:]:
    try:
        start_backend(ModelSettings(name=name), lambda phase: None)
    except ModelError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_a_user_whom_nobody_knows_gets_one_line_for_any_name() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "MLIS_CACHE_DIR")}
    names = ["~/model", "nobody/no-such-model"]
    done = subprocess.run(
        [sys.executable, "-c", _NOBODY, *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        timeout=170,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), done.stderr
    assert "no home folder is known" in lines[0]
    assert "was not found" in lines[1]
