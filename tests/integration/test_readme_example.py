"""The example that the README gives to callers is run as it stands there."""

import subprocess
import sys
from pathlib import Path

from tests.integration.server_process import ROOT, server_process


def test_the_readme_example_runs(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    with server_process(tmp_path) as server:
        example = example.replace("localhost:50051", f"127.0.0.1:{server.ready()['grpc_port']}")
        done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(2, 8)")
