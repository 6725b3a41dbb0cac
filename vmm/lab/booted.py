"""Lab machines that have booted, kept: the next run begins where they stand, not at their kernel.

A machine boots with its root image and nothing that is a run's own. When its initramfs is ready it
waits for a word of ours. There QEMU writes its state to the cache (a migration to a file), once for
each kernel, initramfs, root image, number of processors and size of memory. Drives and channels of
the run are plugged in afterwards, whether the machine has just booted or was taken from the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from vmm.core.errors import HostError
from vmm.lab.cache import Cache
from vmm.lab.qmp import Qmp

_KEPT = 8  # some 200 MiB each
_PREFIX = "images/booted-"
# A file takes what it is given: no reason to write it slowly, as to a network.
_NO_LIMIT = 1 << 40
_EVENTS = {"capabilities": [{"capability": "events", "state": True}]}


def saved_state(cache: Cache, command: Sequence[str], files: Sequence[Path]) -> SavedState:
    """Where the machine that `command` boots is kept: while these `files` are as they are now."""
    text = " ".join(command)
    for file in files:
        status = file.stat()
        text += f" {file} {status.st_size} {status.st_mtime_ns}"
    return SavedState(cache, f"{_PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:16]}")


class SavedState:
    """One entry of the cache: a booted machine's state, there or not yet."""

    def __init__(self, cache: Cache, name: str) -> None:
        self._cache = cache
        self._name = name

    @property
    def path(self) -> Path:
        return self._cache.path(self._name)

    @property
    def exists(self) -> bool:
        return self.path.exists()

    def load(self, monitor: Qmp) -> None:
        """For a QEMU that waits for a state (-incoming defer); HostError when it can't be had."""
        if self.exists:
            os.utime(self.path)  # the cache drops what was not used for longest
        monitor.do("migrate-set-capabilities", _EVENTS)
        monitor.do("migrate-incoming", _file(self.path))
        _await_end(monitor)

    def write(self, monitor: Qmp) -> None:
        """Has QEMU, which is stopped, write its state; what another run has left is as good."""
        # A QEMU that can't (before 8.2, it knows no files) boots anew each time.
        with contextlib.suppress(HostError):
            self._cache.entry(self._name, lambda path: _save(monitor, path))
            self._cache.prune(_PREFIX, keep=_KEPT)

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


class Plugging:
    """Gives a machine that is ready the drives and channels of its run."""

    def __init__(
        self,
        monitor: socket.socket,
        saved: SavedState,
        nodes: Sequence[dict[str, object]],
        devices: Sequence[dict[str, object]],
        restores: bool,
    ) -> None:
        self.restores = restores  # from a saved state: the machine is ready from the start
        self.saved = saved
        self._monitor = Qmp(monitor)
        self._nodes, self._devices = nodes, devices

    def close(self) -> None:
        self._monitor.close()

    def restore(self) -> None:
        """Raises HostError when QEMU can't go on from the saved state."""
        self.saved.load(self._monitor)

    def plug(self) -> None:
        """To be called once, when the machine is ready. Raises HostError with QEMU's reason."""
        self._monitor.do("stop")
        if not self.restores:
            self.saved.write(self._monitor)
        for node in self._nodes:
            self._monitor.do("blockdev-add", node)
        # While it stands, so that Linux finds all of them at once.
        for device in self._devices:
            self._monitor.do("device_add", device)
        self._monitor.do("cont")


def _save(monitor: Qmp, path: Path) -> None:
    monitor.do("migrate-set-capabilities", _EVENTS)
    monitor.do("migrate-set-parameters", {"max-bandwidth": _NO_LIMIT})
    monitor.do("migrate", _file(path))
    _await_end(monitor)


def _file(path: Path) -> dict[str, object]:
    """Where a state goes to or comes from (MigrationChannel in qapi/migration.json of QEMU)."""
    address = {"transport": "file", "filename": str(path), "offset": 0}
    return {"channels": [{"channel-type": "main", "addr": address}]}


def _await_end(monitor: Qmp) -> None:
    end = monitor.await_event("MIGRATION", status=("completed", "failed", "cancelled"))
    if end["status"] != "completed":
        raise HostError(f"QEMU's migration of the booted machine ended with {end['status']}")
