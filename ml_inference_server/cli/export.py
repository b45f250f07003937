"""mlis export: a model as a folder that is served without the model's libraries."""

import argparse
import sys
import time
from pathlib import Path

from ml_inference_server.utils.config import load_settings
from ml_inference_server.utils.layers import Given
from ml_inference_server.utils.logging import set_up_logging

_EPILOG = """\
example:
  mlis export sentence-transformers/all-MiniLM-L6-v2 minilm --backend onnx
  mlis serve minilm

The folder can be copied to a machine that has only ml-inference-server[onnx] (or [openvino]). It appears once it has
been started as a server starts it, and its answers agree with sentence-transformers' in FP32.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes a model into a folder that can be served without torch and transformers."
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="Hugging Face name or local folder")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write; not there yet, or empty")
    parser.add_argument(
        "--backend", default="onnx", choices=("onnx", "openvino"), help="what will run it (default onnx)"
    )
    parser.add_argument(
        "--quantization",
        default="none",
        choices=("none", "int8", "bf16", "fp16"),
        help="the precision that it will run in; none (default) is FP32, bf16 and fp16 are OpenVINO's",
    )
    parser.add_argument(
        "--task",
        default="auto",
        choices=("auto", "embedding", "cross_encoder"),
        help="what the model does; auto (default) reads it from the model's files",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="cut texts here (default: the model's own limit)")
    parser.add_argument("--force", action="store_true", help="replace a former export in FOLDER")
    parser.add_argument("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))


def run(arguments: argparse.Namespace) -> int:
    set_up_logging(arguments.log_level, "text")
    quantized = arguments.quantization != "none"
    given = [
        Given("model.name", arguments.model, f"MODEL {arguments.model}"),
        Given("model.backend", arguments.backend, f"--backend {arguments.backend}"),
        Given("model.device", "cpu", "mlis export"),
        Given("model.quantized", quantized, f"--quantization {arguments.quantization}"),
        Given("model.quantization", arguments.quantization if quantized else None, "--quantization"),
        Given("model.task", arguments.task, f"--task {arguments.task}"),
        Given("model.max_tokens", arguments.max_tokens, f"--max-tokens {arguments.max_tokens}"),
    ]
    model = load_settings(overrides=given).model
    # Not before the arguments are known to be sound.
    from ml_inference_server.backends.startup.write_folder import STEPS, write_folder

    begin = time.monotonic()
    done = 0

    def step(text: str) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{STEPS}] {time.monotonic() - begin:5.1f} s  {text}", file=sys.stderr, flush=True)

    manifest = write_folder(model, arguments.folder, force=arguments.force, step=step)
    size_mb = sum(file.stat().st_size for file in arguments.folder.iterdir()) / 1e6
    parity = manifest.parity
    compared = "" if parity is None else f"parity to FP32: mean {parity.mean:.5f}, lowest {parity.least:.5f}"
    print(f"{arguments.folder}: {size_mb:.0f} MB after {time.monotonic() - begin:.0f} s; {compared}")
    print(f"serve it with: mlis serve {arguments.folder}")
    return 0
