"""Which addresses a port listens on."""

import socket

import pytest

from moetron.common.watch.listeners import reachable


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", False), ("0.0.0.0", True), ("::1", False), ("::", True), ("127.3.2.1", False)],
)
def test_reachable(address: str, expected: bool) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as server:
        port = server.getsockname()[1]
        assert reachable(port) is expected
    assert not reachable(port)
