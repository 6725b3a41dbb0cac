"""What may still be opened by a path: what Python itself needs, to read."""

from __future__ import annotations

import os
import sys

from kvm_bindings import sandbox
from kvm_bindings.sandbox import __file__ as _BINDINGS

READ = sandbox.READ_FILE | sandbox.READ_DIR
_SYSTEM = (
    "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime",
    "/usr/share/zoneinfo", "/proc/self", "/sys/devices/system/cpu",
)  # fmt: skip
"""Where the modules are that Python loads late, and what its time functions read."""


def readable() -> set[str]:
    """What Python may still load: its own library, the modules that are loaded (whose lines a
    traceback shows), the system's shared libraries; not the folder that pyvmm was started in."""
    here = _identity(os.curdir)
    found = {*_SYSTEM, os.path.dirname(os.path.dirname(__file__)), os.path.dirname(_BINDINGS)}
    # Not realpath: a rule is about the folder that a path leads to.
    found.update(path for path in sys.path if path and _identity(path) not in (None, here))
    beneath = tuple(folder + "/" for folder in found)
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return found | {file for file in files if file and not file.startswith(beneath)}


def _identity(path: str) -> tuple[int, int] | None:
    """Which folder it leads to; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
