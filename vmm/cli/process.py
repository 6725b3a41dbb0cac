"""Whether the process is the command's own, so that it may give up its rights for good."""

from __future__ import annotations

import os
import sys


def is_ours() -> bool:
    """Whether what was started is `pyvmm` or `python -m vmm`, and not a program, a test for
    example, that calls the command's functions."""
    started = sys.modules.get("__main__")
    spec = getattr(started, "__spec__", None)
    if spec is not None:
        return bool(spec.name == "vmm.__main__")
    return os.path.basename(getattr(started, "__file__", None) or "") == "pyvmm"
