"""What the door costs is measured against servers that are started with it and without."""

from pathlib import Path

import pytest

from ml_inference_server.benchmark.studies.door_cost import main
from ml_inference_server.utils.errors import EXIT_CONFIG
from tests.integration.tls_kit import Authority

SHORT = ["--blocks", "1", "--rounds", "1", "--seconds", "0.1", "--in-flight", "2"]


@pytest.mark.slow
def test_each_way_is_measured_and_tls_with_its_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("127.0.0.1")
    main([*SHORT, "--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--tls-ca", str(authority.file)])
    printed = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["door", "---", "off (control)", "keys", "keys and limits", "TLS", "TLS, keys and limits"]
    assert "TLS was not measured" not in printed


def test_a_certificate_without_its_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--tls-cert", "server.crt"]) == EXIT_CONFIG
    assert "--tls-cert and --tls-key go together" in capsys.readouterr().err
