"""What may still be opened by a path: what Python itself needs, to read."""

from __future__ import annotations

import os
import sys

from kvm_bindings import sandbox

READ = sandbox.READ_FILE | sandbox.READ_DIR
_SYSTEM = (
    "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime",
    "/usr/share/zoneinfo", "/proc/self", "/sys/devices/system/cpu",
)  # fmt: skip
"""Where the modules are that Python loads late, and what its time functions read."""


def readable() -> set[str]:
    """What Python may still load: its own library, the modules that are loaded (whose lines a
    traceback shows), the system's shared libraries; not the folder that pyvmm was started in."""
    here = os.path.realpath(os.getcwd()) if _has_folder() else None
    found = {os.path.dirname(os.path.dirname(os.path.realpath(__file__))), *_SYSTEM}
    for entry in sys.path:
        path = os.path.realpath(entry) if entry else here
        if path is not None and path != here:
            found.add(path)
    beneath = tuple(folder + "/" for folder in found)
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return found | {file for file in files if file and not file.startswith(beneath)}


def _has_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True
