"""Two long texts in a pair cost memory in proportion to them, also where the library's own code tokenises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from tests.parity.tiny_model import SHAPE, save

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import resource, sys
from sentence_transformers import SentenceTransformer
from ml_inference_server.backends.text.library_tokenizer import LibraryTokenizer, Way, input_module
module = input_module(SentenceTransformer(sys.argv[1], device="cpu")[0])
ways = {None: Way("", None, 0, module.max_seq_length)}
tokenizer = LibraryTokenizer(module, pad_id=0, prompts={}, ways=ways)
tokenizer.encode_pairs([("warm", "up")])
text = "query words here some passage text " * 1000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encoded = tokenizer.encode_pairs([(text, text)])[0]
print(encoded.length, encoded.truncated, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_long_pair_is_cut_before_the_librarys_own_code_joins_it(tmp_path: Path) -> None:
    folder = save(BertModel(BertConfig(num_hidden_layers=1, **SHAPE)), tmp_path)
    environment = os.environ | {"PYTHONPATH": ".", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    length, truncated, grown = done.stdout.split()
    assert (length, truncated) == ("48", "True")
    assert int(grown) / (1024 if sys.platform == "linux" else 1 << 20) < 64
