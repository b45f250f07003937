"""The project's own operators in C++, built once for this machine: torch.ops.mlis."""

import logging
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from ml_inference_server.utils.cache import cached
from ml_inference_server.utils.cpu import cpu_flags
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "operators.cpp"
ARM = platform.machine() in ("arm64", "aarch64")
# Not every compiler for ARM knows -march=native. GCC moves loads ahead of the products there until sums no longer fit
# the registers, unless it is told not to; Clang does not, and takes no notice of the flag.
ON_ARM = ("-mcpu=native", "-fno-schedule-insns")
TARGET: tuple[str, ...] = ON_ARM if ARM else ("-march=native",)
"""For which processor the operators are built. Tests set another one, before the operators are loaded."""
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-DNDEBUG")
_LIMIT_S = 600


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use, or None; torch is not imported for the answer."""
    named = os.environ.get("CXX")
    if named:
        return shutil.which(named)
    return shutil.which("g++") or shutil.which("clang++")


@cache
def load_operators() -> bool:
    """Build (or read from the cache) and register the operators; whether they run in AMX tiles.

    ModelError if they cannot be built.
    """
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    found = compiler()
    if found is None:
        raise ModelError(no_compiler())
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    for_system = ["-fopenmp"] if sys.platform == "linux" else ["-undefined", "dynamic_lookup"]
    command = [found, *TARGET, *_FLAGS, *for_system]
    sources = sorted((*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")))
    key = {
        "sources": [file.read_text(encoding="utf-8") for file in sources],
        "torch": torch.__version__,
        "compiler": version[:1],
        "command": command,
        "flags": sorted(cpu_flags()),
    }

    def make(folder: Path) -> None:
        log.info("building the operators with %s (once; later starts read the cache)", found)
        includes = [part for path in include_paths() for part in ("-isystem", path)]
        libraries = [f"-L{path}" for path in library_paths()]
        built = subprocess.run(
            [*command, *includes, str(_SOURCE), *libraries, "-ltorch_cpu", "-lc10", "-o", str(folder / "operators.so")],
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT_S,
        )
        if built.returncode:
            error = next((line for line in built.stderr.splitlines() if "error" in line), built.stderr[-200:])
            raise ModelError(f"{found} cannot build the operators ({error.strip()}): set model.compile: false")

    torch.ops.load_library(str(cached("operators", key, make) / "operators.so"))

    @torch.library.register_fake("mlis::packed_attention")
    def _shape(q, k, v, starts, scale, causal):  # type: ignore[no-untyped-def]
        return torch.empty_like(q, memory_format=torch.contiguous_format)

    @torch.library.register_fake("mlis::encoder_layer")
    def _layer_shape(x, starts, matrices, biases, norms, heads, eps):  # type: ignore[no-untyped-def]
        return torch.empty_like(x)

    @torch.library.register_fake("mlis::int8_layer")
    def _int8_layer_shape(x, starts, matrices, scales, sums, biases, norms, heads, eps):  # type: ignore[no-untyped-def]
        return torch.empty_like(x)

    return bool(torch.ops.mlis.uses_amx())


def no_compiler() -> str:
    return (
        "model.compile needs a C++ compiler, and none was found (CXX, g++, clang++): install one ('apt install g++', "
        "'xcode-select --install'), or set model.compile: false"
    )
