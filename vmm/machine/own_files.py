"""What a run reads must not be what it writes: a report in a disk's place would be its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from vmm.core.errors import UsageError
from vmm.core.suboptions import Suboptions
from vmm.machine.config import VHOST_USER, MachineConfig


def refuse_overwriting(config: MachineConfig) -> None:
    """Raise UsageError where an output's file is one that the run reads, or another output's."""
    seen: dict[tuple[int, int] | str, str] = {}
    for name, path in _read(config):
        seen.setdefault(_identity(path), name)
    for name, path in _written(config):
        other = seen.setdefault(_identity(path), name)
        if other is not name:
            raise UsageError(f"{name} is also {other}, and would replace it; give another path")


def _identity(path: str) -> tuple[int, int] | str:
    """The same for the same file, whatever path leads there."""
    with suppress(OSError, ValueError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return os.path.realpath(path)


def _read(config: MachineConfig) -> Iterator[tuple[str, str]]:
    for option, path in (("--kernel", config.kernel), ("--initrd", config.initrd)):
        if path is not None:
            yield f"{option} {path}", path
    for spec in config.disks:
        if spec.startswith(VHOST_USER):
            continue
        with suppress(UsageError):  # whoever opens it says what is wrong
            path = Suboptions("--disk", spec, "").first("file")
            yield f"--disk {path}", path
    for spec, _ in config.policies:
        place, _, name = spec.rpartition(":")
        if name and place.endswith(".py"):
            yield f"--policy {spec}", place


def _written(config: MachineConfig) -> Iterator[tuple[str, str]]:
    report = config.report
    if report is not None and report != "-" and not _is_device(report):
        yield f"--report {report}", report
    for spec in config.consoles:
        with suppress(UsageError):
            path = Suboptions("--console", spec, "").take("file")
            if path is not None and not _is_device(path):
                yield f"--console {spec}", path


def _is_device(path: str) -> bool:
    """Devices, terminals and pipes are written to, not replaced: many may write to one."""
    with suppress(OSError, ValueError):
        return os.path.exists(path) and not os.path.isfile(path)
    return False
