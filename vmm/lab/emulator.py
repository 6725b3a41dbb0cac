"""What every emulator is given to run a lab machine, and how it is started."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vmm.lab.booted import Plugging
from vmm.lab.cache import Cache
from vmm.lab.hosts import Host
from vmm.lab.packages import Bochs, Qemu
from vmm.lab.streams import Stream


@dataclass(frozen=True, slots=True)
class Assets:
    """Everything but the job, ready to boot."""

    host: Host
    emulator: Qemu | Bochs
    kernel: Path
    initramfs: Path
    root: Path
    project: Path
    inner_qemu: Path | None
    cache: Cache


@dataclass(slots=True)
class Launch:
    """An emulator's command line, and the streams that it connects the machine to."""

    command: list[str]
    streams: dict[str, Stream]  # by name: serial, and console or in, out, error
    complaint: Callable[[str], str | None]  # what is wrong, in its output
    environment: dict[str, str] = field(default_factory=dict)
    inherited: list[socket.socket] = field(default_factory=list)  # closed here once it runs
    plugging: Plugging | None = None  # what the machine gets once it has booted

    def close(self) -> None:
        """All of its sockets: those of the emulator's end, once it runs, are closed already."""
        for stream in self.streams.values():
            stream.socket.close()
        for theirs in self.inherited:
            theirs.close()
        if self.plugging is not None:
            self.plugging.close()
