"""Programs of the host that call a device while the host has no memory for another connection."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.virtio_machine import VirtioMachine
from vmm.devices.virtio.balloon_control import open_balloon
from vmm.devices.virtio.console_backend import open_console
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.vsock import open_vsock

Make = Callable[[Path], VirtioDevice]
MAKERS: dict[str, Make] = {
    "balloon": lambda path: open_balloon(f"control={path}", 64 << 20),
    "console": lambda path: open_console([f"socket={path}"]),
    "vsock": lambda path: open_vsock(f"path={path}"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EMFILE, errno.ENFILE])
def test_caller_who_cannot_be_taken_does_not_keep_the_loop_busy(
    make: Make, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can be neither taken nor turned away stays, and is announced again and again."""
    accept, tries, lacking = socket.socket.accept, [False], True

    def accepting(self: socket.socket) -> object:
        if lacking:
            tries.append(False)
            raise OSError(error, os.strerror(error))
        caller = accept(self)
        tries.append(True)
        return caller

    monkeypatch.setattr(socket.socket, "accept", accepting)
    machine = VirtioMachine(make(tmp_path / "s"))
    machine.up()
    loop = machine.loop
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(tmp_path / "s"))
        loop.run_ready()

        assert not loop.run_ready()
        assert True not in tries
        tries.clear()
        loop.pass_time()
        loop.run_ready()
        assert tries, "it is tried again"
        lacking = False
        loop.pass_time()
        loop.run_ready()
    machine.close()

    assert True in tries
