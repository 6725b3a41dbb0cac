"""What a run whose devices other processes serve (vhost-user) has to look at, and to report."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from vmm.core.errors import OutputError, UsageError
from vmm.core.lean_typing import TYPE_CHECKING, cast
from vmm.devices.vhost_user.device import VhostUserDevice
from vmm.devices.vhost_user.opening import connect
from vmm.machine.config import VHOST_USER

if TYPE_CHECKING:
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.machine.config import MachineConfig
    from vmm.machine.guest_vm import GuestVm
    from vmm.machine.report_keys import BackEndUse


def require_fitting(config: MachineConfig, vm: GuestVm, is_watched: bool) -> None:
    """Raises UsageError where the shared side is no file of its own, to be mapped and punched.

    `is_watched`: a policy wants to be asked about each access (`on_io`).
    """
    spec = next((f"--fs {each}" for each in config.file_systems), None)
    option = spec or next(f"--disk {d}" for d in config.disks if d.startswith(VHOST_USER))
    memory = vm.memory
    if not memory.told:
        raise UsageError(
            f"{option}: under scheme {vm.scheme.name} private and shared pages are one file, which "
            "a back end would have whole; use --disk FILE, or run without --private-mem"
        )
    if memory.in_place:
        raise UsageError(
            f"{option}: {memory.shared.name} has private and shared pages in one file, which a "
            "back end would have whole; use --private-mem=guest_memfd-plain, or --disk FILE"
        )
    if is_watched:
        raise UsageError(
            f"{option}: a policy asks about each access of a device (on_io), and a back end's are "
            "seen by nobody; use --disk FILE, or run without that policy"
        )


class Spares:
    """Sockets for a back end's successors, made before the sandbox, which connects nobody any more.

    The process outside connects them: a socket is one thing, whichever process has it open.
    """

    MOST = 16
    """How often a device's back end may be another one in the course of a run."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._sockets = [
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            for _ in range(self.MOST)
        ]
        self._taken = 0
        self.through: Callable[[bytes], None] = self.connect
        """What has `connect` done in the process outside; raises OutputError."""

    @property
    def fds(self) -> list[int]:
        """For the process outside."""
        return [each.fileno() for each in self._sockets]

    def connect(self, message: bytes) -> None:
        """In the process outside: connect the socket whose number is the message, and let go of
        it there. Raises OutputError."""
        try:
            connect(self._path, self._sockets[message[0]]).close()
        except OSError as error:
            raise OutputError(str(error.strerror)) from error

    def take(self) -> socket.socket:
        """Another connection. Raises OutputError."""
        if self._taken == self.MOST:
            raise OutputError(f"{self.MOST} back ends have been lost, which is all a run can take")
        self.through(bytes((self._taken,)))
        self._taken += 1
        return self._sockets[self._taken - 1]

    def close(self) -> None:
        """Let go of those that weren't needed."""
        for each in self._sockets[self._taken :]:
            each.close()


def spare(devices: Mapping[str, VirtioDevice]) -> list[Spares]:
    """Have all back ends' successors connected from outside of the sandbox."""
    made = []
    for device in devices.values():
        if isinstance(device, VhostUserDevice):
            spares = Spares(device.path)
            device.reconnect = spares.take
            made.append(spares)
    return made


def described(devices: Mapping[str, VirtioDevice]) -> dict[str, BackEndUse]:
    """For the report: what each back end was given."""
    return {
        name: cast("BackEndUse", device.as_dict())
        for name, device in devices.items()
        if isinstance(device, VhostUserDevice)
    }
