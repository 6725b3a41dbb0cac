"""A real passt at the other end of --net: the socket's protocol as passt itself speaks it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.virtio_machine import VirtioMachine
from vmm.devices.virtio.net import HEADER_SIZE, RX, TX
from vmm.devices.virtio.net_backend import open_net

PASST = os.environ.get("PYVMM_PASST") or shutil.which("passt")
GUEST_MAC, GUEST, GATEWAY = bytes.fromhex("020000000001"), "192.0.2.2", "192.0.2.1"

pytestmark = pytest.mark.skipif(
    PASST is None, reason="passt is not installed; PYVMM_PASST=FILE names one"
)


@pytest.fixture
def passt() -> Iterator[Path]:
    """A passt that forwards nothing; the socket it listens on."""
    with tempfile.TemporaryDirectory(prefix="passt-") as folder:
        os.chmod(folder, 0o777)  # it gives root's privileges away before it makes its socket
        yield from _running(Path(folder) / "socket")


def _running(path: Path) -> Iterator[Path]:
    words = [
        str(PASST), "--foreground", "--stderr", "--socket", str(path), "--ipv4-only",
        "--address", GUEST, "--netmask", "24", "--gateway", GATEWAY,
        "--dns", GATEWAY, "--tcp-ports", "none", "--udp-ports", "none",
    ]  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        while (line := process.stderr.readline()) and b"You can now" not in line:
            pass  # it says so when it listens
        yield path
    finally:
        process.kill()
        process.communicate()


def test_passt_answers_a_guests_arp_request(passt: Path) -> None:
    device = open_net(f"passt={passt},mac=02:00:00:00:00:01")
    machine = VirtioMachine(device)
    try:
        machine.up()
        buffer = machine.blank(1526)
        machine.give(RX, buffer)
        machine.kick(RX)
        request = b"\xff" * 6 + GUEST_MAC + bytes.fromhex("0806 0001 0800 06 04 0001")
        request += GUEST_MAC + socket.inet_aton(GUEST) + bytes(6) + socket.inet_aton(GATEWAY)
        machine.give(TX, machine.place(bytes(HEADER_SIZE) + request))
        machine.kick(TX)

        assert machine.loop.wait(30), "passt has not answered"
        machine.settle()

        ((_, size),) = machine.queues[RX].collect()
        answer = machine.text(buffer, size)[HEADER_SIZE:]
        assert answer[:6] == GUEST_MAC
        assert answer[12:22] == bytes.fromhex("0806 0001 0800 06 04 0002")
        assert answer[28:32] == socket.inet_aton(GATEWAY)
    finally:
        machine.close()
