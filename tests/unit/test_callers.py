"""Who a request is counted for where there are no keys."""

import pytest

from ml_inference_server.server.calls import caller_at


@pytest.mark.parametrize(
    ("peer", "caller"),
    [
        ("ipv4:192.0.2.1:50000", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:50000", "2001:db8::1"),
        ("ipv6:[2001:db8::1]:50000", "2001:db8::1"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:50000", "192.0.2.1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:50000", "fe80::1"),
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("unix:/run/server.sock", "unix:/run/server.sock"),
        ("", ""),
    ],
)
def test_a_caller_is_an_address_without_its_port(peer: str, caller: str) -> None:
    assert caller_at(peer) == caller
