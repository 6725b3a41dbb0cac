"""C compilers of this machine, by the architecture they make code for."""

from __future__ import annotations

import shutil
import subprocess


def compiler_for(architecture: str) -> str | None:
    """The first C compiler that says it makes this architecture's code."""
    for name in ("cc", "gcc", f"{architecture}-linux-gnu-gcc"):
        path = shutil.which(name)
        if path is not None:
            command = [path, "-dumpmachine"]
            asked = subprocess.run(command, capture_output=True, text=True, check=True)
            if asked.stdout.startswith(f"{architecture}-"):
                return path
    return None
