"""Listening sockets of this host, from Linux's /proc."""

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

_LISTENS = "0A"


def reachable(port: int) -> bool:
    """Return whether a socket listens at ``port`` on other addresses than loopback ones.

    False where there is no /proc.
    """
    return any(found == port and not address.is_loopback for address, found in _listeners())


def _listeners() -> Iterator[tuple[IPv4Address | IPv6Address, int]]:
    """Yield the addresses and ports of this network namespace."""
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        try:
            lines = Path("/proc/net", name).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for _, local, _, state, *_ in map(str.split, lines):
            if state == _LISTENS:
                address, _, port = local.partition(":")
                yield _address(address, family), int(port, 16)


def _address(text: str, family: socket.AddressFamily) -> IPv4Address | IPv6Address:
    """Return an address that Linux prints as 32-bit words in the host's order."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    packed = b"".join(socket.htonl(word).to_bytes(4, "big") for word in words)
    found = ip_address(socket.inet_ntop(family, packed))
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found
