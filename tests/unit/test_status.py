"""The error contract: every error has a status, its message is safe to send, and hints stand where waiting helps."""

import inspect
from types import ModuleType

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from ml_inference_server.server import status as table
from ml_inference_server.server.rpc import status
from ml_inference_server.utils import errors


def subclasses(module: ModuleType) -> list[type[errors.ServiceError]]:
    members = [member for _, member in inspect.getmembers(module, inspect.isclass)]
    return [member for member in members if issubclass(member, errors.ServiceError)]


def test_every_service_error_has_a_row() -> None:
    assert set(subclasses(errors)) == set(table.STATUS)


def test_unknown_is_never_sent() -> None:
    sent = {row.grpc for row in table.STATUS.values()}
    assert not {"UNKNOWN", "ABORTED", "DATA_LOSS", "OK"} & sent
    assert sent <= {code.name for code in grpc.StatusCode}


@pytest.mark.parametrize("error", [errors.Overloaded("full", retry_after_ms=180), errors.Unavailable("draining")])
def test_a_refusal_that_waiting_helps_carries_both_hints(error: errors.ServiceError) -> None:
    trailers = dict(status.trailing_metadata(error, "id-1"))
    assert trailers["grpc-retry-pushback-ms"] == str(error.retry_after_ms)
    details = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert details.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == error.retry_after_ms


def test_an_input_fault_names_its_fields_and_has_no_hint() -> None:
    error = errors.InvalidRequest("bad", violations=[(f"texts[{i}]", "text is empty") for i in range(20)])
    trailers = dict(status.trailing_metadata(error, "id-1"))
    assert "grpc-retry-pushback-ms" not in trailers
    details = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert details.details[0].Unpack(info)
    assert info.metadata["request_id"] == "id-1"
    assert details.details[1].Unpack(bad)
    assert [violation.field for violation in bad.field_violations] == [f"texts[{i}]" for i in range(16)]


def test_a_message_fits_a_header() -> None:
    assert status.status_text(errors.ServiceError("é\n\x00" + "x" * 10_000)) == "???" + "x" * 509
