"""The kernels of INT8 without padding against plain C++, built for this machine and for ARM, which QEMU imitates.

int8_kernels.cpp has the checks. QEMU tells nothing of speed.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from ml_inference_server.backends.compiled import native
from ml_inference_server.utils.cpu import cpu_flags, has_int8_vectors

_HERE = Path(__file__).parent
_KERNELS = Path(native.__file__).parent
_CROSS = "aarch64-linux-gnu-g++"
_QEMU = ("qemu-aarch64", "qemu-aarch64-static")
_ARM = {"NEON dotprod": "-march=armv8.2-a+dotprod", "NEON i8mm": "-march=armv8.6-a+i8mm", "none": "-march=armv8-a"}

_PLAIN = {"plain VNNI": "plain_dpbusd.h", "plain tiles": "plain_tiles.h"}

# Clang warns of a flag that only GCC needs, and GCC 12 of its own headers for AVX-512.
_WARNINGS = ("-Wall", "-Werror", "-Wno-ignored-optimization-argument", "-Wno-uninitialized", "-Wno-maybe-uninitialized")

# How the kernels are built here: for this machine, as x86 with VNNI or AMX would compute them, and for ARM.
BUILDS = ("this machine", "plain VNNI", "plain tiles", "NEON dotprod", "NEON i8mm")


class Program(NamedTuple):
    path: Path
    runner: tuple[str, ...]


@cache
def run(program: Program, *arguments: str) -> tuple[int, str]:
    """(exit code, what it printed)."""
    command = [*program.runner, str(program.path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr


def cross_compiler() -> str:
    found = shutil.which(_CROSS)
    if found is None:
        pytest.skip(f"no {_CROSS} (apt install g++-aarch64-linux-gnu)")
    return found


def emulator() -> str:
    found = next((each for each in map(shutil.which, _QEMU) if each), None)
    if found is None:
        pytest.skip("no qemu-aarch64 (apt install qemu-user)")
    return found


def build(name: str, folder: Path) -> Program:
    """Skips where it cannot be built or run here."""
    runner: tuple[str, ...] = ()
    if name in _ARM:
        compiler = cross_compiler()
        runner = (emulator(), "-cpu", "max")
        flags = [_ARM[name], *native.ON_ARM[1:], "-static"]
    else:
        own = native.compiler()
        if own is None or not has_int8_vectors():
            pytest.skip("no C++ compiler, or a processor without INT8 instructions")
        compiler = own
        flags = list(native.TARGET)
        if name in _PLAIN:
            if not {"avx2", "fma"} <= cpu_flags():
                pytest.skip("no AVX2")
            flags = ["-march=x86-64-v3", "-include", str(_HERE / _PLAIN[name])]
    path = folder / name.replace(" ", "_")
    command = [compiler, *flags, "-O3", "-std=c++20", "-Wextra", *_WARNINGS, f"-I{_KERNELS}"]
    subprocess.run([*command, _HERE / "int8_kernels.cpp", "-o", path], check=True, timeout=120)
    return Program(path, runner)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Program]:
    """Each is built once."""
    built: dict[str, Program] = {}

    def get(name: str) -> Program:
        if name not in built:
            built[name] = build(name, tmp_path_factory.mktemp("kernels"))
        return built[name]

    return get


@pytest.mark.parametrize("name", BUILDS)
def test_kernels_do_what_plain_code_does(name: str, program: Callable[[str], Program]) -> None:
    code, printed = run(program(name))
    assert code == 0, printed
    assert printed.count(": ok") > 100
    if name in _ARM:
        assert f"built for {name}, 255 steps" in printed
    if name == "plain tiles":
        assert "built for AMX, 255 steps" in printed


@pytest.mark.parametrize("name", BUILDS)
def test_every_check_can_fail(name: str, program: Callable[[str], Program]) -> None:
    code, printed = run(program(name), "broken")
    assert code == 1
    assert ": ok" not in printed
    assert printed.count(": FAILED") > 100


def test_bytes_sums_and_what_is_made_of_them_are_equal_to_the_last_bit_on_x86_and_arm(
    program: Callable[[str], Program],
) -> None:
    """Wherever the inputs have 255 steps; attention and normalisation add up in the order of their lanes."""
    bits = {}
    for name in BUILDS:
        printed = run(program(name))[1]
        found = re.search(r"built for .*, (\d+) steps\nbits (\w+)", printed)
        assert found, printed
        if found[1] == "255":
            bits[name] = found[2]
    assert {"NEON dotprod", "NEON i8mm"} <= set(bits)
    assert len(set(bits.values())) == 1, bits


def test_arm_without_products_of_bytes_has_no_int8(program: Callable[[str], Program]) -> None:
    assert run(program("none")) == (0, "built without INT8\n")


@pytest.mark.parametrize("name", ["NEON i8mm", "none"])
def test_all_operators_compile_for_arm(name: str) -> None:
    """Against torch's headers, which are the same for all processors."""
    compile_operators(cross_compiler(), _ARM[name], *native.ON_ARM[1:], "-fsyntax-only")


@pytest.mark.parametrize("target", ["sapphirerapids", "x86-64-v4"])
def test_all_operators_compile_for_processors_with_more_than_this_one(target: str) -> None:
    """AMX, and AVX-512 without it; the assembler sees AMX's instructions, too."""
    found = native.compiler()
    if found is None or native.ARM:
        pytest.skip("no C++ compiler for x86")
    compile_operators(found, f"-march={target}", "-O1", "-c", "-fPIC", "-o", os.devnull)


def compile_operators(compiler: str, *flags: str) -> None:
    from torch.utils.cpp_extension import include_paths

    includes = [part for path in include_paths() for part in ("-isystem", path)]
    command = [compiler, *flags, "-fopenmp", "-std=c++20", *_WARNINGS, *includes, str(_KERNELS / "operators.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr
