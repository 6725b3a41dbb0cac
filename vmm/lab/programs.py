"""Programs of unpacked packages, run as they lie: by the loader of the C library beside them.

The libraries come from another release than the system's perhaps, so no other process may see
them. A chroot would do the same, but needs root, or user namespaces, which containers and some
distributions don't allow.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from vmm.core.errors import HostError
from vmm.lab.architecture import HERE


def libraries_of_tree(tree: Path) -> Path:
    return HERE.libraries(tree)


def unpacked_command(tree: Path, program: Path) -> list[str]:
    """The words that start a program of `tree`; its arguments follow."""
    libraries = libraries_of_tree(tree)
    loader = libraries / HERE.loader
    command = [str(loader), "--library-path", str(libraries)]
    # It may look for its own files by its name.
    return [*command, "--argv0", str(program), str(program)]


def run_unpacked(
    tree: Path, program: Path, arguments: list[str], statuses: tuple[int, ...] = (0,)
) -> None:
    """Runs it to its end; HostError with its words when its status is another than `statuses`."""
    result = subprocess.run(
        [*unpacked_command(tree, program), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode not in statuses:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise HostError(f"{program.name} failed: {reason}")
