"""The chart of the README: what was measured, as multiples of one server."""

import json
from pathlib import Path
from typing import Any

import pytest

import ml_inference_server
from ml_inference_server.benchmark.studies.peers import Peers, bars, main
from ml_inference_server.utils.errors import ConfigError

STORED = Path(ml_inference_server.__file__).parent / "docs" / "peers.json"
MEASURED: dict[str, Any] = {
    "date": "d", "machine": "m", "load": "l", "baseline": "slow",
    "servers": [
        {"name": "quick", "precision": "INT8", "is_own": True, "texts_per_s": {"queries": [30.0, 10.0, 20.0]}},
        {"name": "slow", "precision": "FP32", "texts_per_s": {"queries": [4.0, 6.0, 5.0]}},
    ],
}  # fmt: skip


def test_bars_are_medians_as_multiples_of_the_baselines() -> None:
    quick, slow = bars(Peers.model_validate(MEASURED))["queries"]
    assert (quick.label, quick.value, quick.low, quick.high, quick.stands_out) == ("quick, INT8", 4, 2, 6, True)
    assert (slow.value, slow.low, slow.high, slow.stands_out) == (1, 0.8, 1.2, False)


def test_it_is_drawn_beside_its_file(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    file.write_text(json.dumps(MEASURED))
    assert main([str(file)]) == 0
    assert "quick, INT8" in file.with_suffix(".svg").read_text(encoding="utf-8")
    file.write_text(json.dumps(MEASURED | {"baseline": "none"}))
    with pytest.raises(ConfigError, match="no server is called 'none'"):
        main([str(file)])


def test_what_the_readme_shows_is_what_is_stored() -> None:
    stored = Peers.model_validate_json(STORED.read_text(encoding="utf-8"))
    drawn = STORED.with_suffix(".svg").read_text(encoding="utf-8")
    for group in bars(stored).values():
        for bar in group:
            assert bar.label in drawn
            assert f"{bar.value:.1f}x" in drawn
