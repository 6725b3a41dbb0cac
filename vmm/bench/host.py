"""Facts about the machine that numbers mean nothing without."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any


def host_facts(qemu: list[str] | None, disk_directory: str) -> dict[str, Any]:
    """JSON-ready; `load` is the one-minute load average when the run began."""
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "processor": _first(r"^model name\s*:\s*(.*)$", "/proc/cpuinfo"),
        "cpus": os.cpu_count(),
        "memory_mib": int(_first(r"^MemTotal:\s+(\d+)", "/proc/meminfo") or 0) // 1024,
        "hypervisor": bool(_first(r"^flags\s*:.*\b(hypervisor)\b", "/proc/cpuinfo")),
        "kvm": Path("/dev/kvm").exists(),
        "qemu": qemu is not None,
        "file_system": _file_system(disk_directory),
        "load": os.getloadavg()[0],
    }


def _first(pattern: str, path: str) -> str | None:
    try:
        match = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return match[1].strip() if match else None


def _file_system(directory: str) -> str | None:
    """The type of the file system that the directory is on: the longest mount point that fits."""
    path = os.path.realpath(directory)
    best, kind = "", None
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, where, what, *_ = line.split()
        inside = path == where or path.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= len(best):
            best, kind = where, what
    return kind
