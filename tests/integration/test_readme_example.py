"""The examples for callers are run as they stand in the documents."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.server_process import ROOT, server_process

DOCUMENTS = ("client.md", "options.md")
EXAMPLES = {
    f"{document.stem} {number}": code
    for document in (ROOT / "README.md", *(ROOT / "ml_inference_server" / "docs" / name for name in DOCUMENTS))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.S))
}
PRINTED = {
    "README 0": r"\(2, 8\) float32\n1 -?\d+\.\d+\n",
    "README 1": r"\(1, 8\) tokenize_us: \d+\n(\w+: \d+\n)+\n",
    "client 0": r"\(2, 8\) \(1,\) 1 fake, fake fp32 on cpu.*\n",
    "client 1": r"1000\n",
    "options 0": r"16\n",
}
# What each curl of the documents must have in its answer.
CURLED = {
    "README": ['"object":"list"', '"relevance_score"', "[[", '"EMBEDDING"'],
    "http": ['"object":"list"', '"int8"', '"relevance_score"', "[[", '"index"', '"EMBEDDING"'],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        code = EXAMPLES[name].replace("localhost:50051", f"127.0.0.1:{server.ready()['grpc_port']}")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(PRINTED[name], done.stdout), done.stdout


@pytest.mark.parametrize("name", CURLED)
def test_every_curl_gets_its_answer(name: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is missing: apt-get install curl")
    document = ROOT / "README.md" if name == "README" else ROOT / "ml_inference_server" / "docs" / f"{name}.md"
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.S)
    commands = [block for block in blocks if "curl " in block and "localhost:8080" in block]
    with server_process(tmp_path) as server:
        script = "\n".join(commands).replace("localhost:8080", f"127.0.0.1:{server.ready()['http_port']}")
        script = re.sub(r"^curl", "echo; curl --fail-with-body --max-time 30", script, flags=re.M)
        done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [line for line in done.stdout.splitlines() if line]
    assert len(answers) == len(CURLED[name]), answers
    for answer, expected in zip(answers, CURLED[name], strict=True):
        assert expected in answer
