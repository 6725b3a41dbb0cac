"""The server that guests exchange bytes with, and whose network is left alone."""

from __future__ import annotations

import socket

import pytest

from vmm.bench import network
from vmm.core.errors import HostError


def answer(port: int, given: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as link:
        link.sendall(given)
        link.shutdown(socket.SHUT_WR)
        received = bytearray()
        while data := link.recv(1 << 20):
            received += data
    return bytes(received)


def test_one_port_gives_and_one_counts() -> None:
    with network.serving("127.0.0.1") as peer:
        assert answer(peer.gives, b"") == bytes(network.TRANSFER)
        assert answer(peer.takes, b"x" * 300_001) == b"300001\n"
        assert answer(peer.takes, b"") == b"0\n"


def test_no_interface_is_made_outside_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYVMM_LAB_DISKS", raising=False)
    monkeypatch.setattr(network, "Tap", None)

    with pytest.raises(HostError, match="in the lab only"), network.peer():
        pass
