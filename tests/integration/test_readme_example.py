"""The examples for callers are run as they stand in the documents."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.server_process import ROOT, server_process

EXAMPLES = {
    f"{document.stem} {number}": code
    for document in (ROOT / "README.md", ROOT / "ml_inference_server" / "docs" / "client.md")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.S))
}
PRINTED = {
    "README 0": r"\(2, 8\) float32\n1 -?\d+\.\d+\n",
    "README 1": r"\(1, 8\) tokenize_us: \d+\n(\w+: \d+\n)+\n",
    "client 0": r"\(2, 8\) \(1,\) 1 fake, fake fp32 on cpu.*\n",
    "client 1": r"1000\n",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        code = EXAMPLES[name].replace("localhost:50051", f"127.0.0.1:{server.ready()['grpc_port']}")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(PRINTED[name], done.stdout), done.stdout
