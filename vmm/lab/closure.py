"""Shared-library closures: what a set of programs needs in order to run elsewhere."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from vmm.core.errors import HostError

_ELF_MAGIC = b"\x7fELF"
_LINE = re.compile(r"^\s*(?:(?P<name>\S+) => )?(?P<path>/\S+) \(0x[0-9a-f]+\)$")


def is_elf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == _ELF_MAGIC
    except OSError:
        return False


def libraries_of(files: Iterable[Path], lister: Sequence[str] = ("ldd",)) -> set[Path]:
    """The libraries, and the loader itself, that these ELF files need; missing ones left out.

    `lister` prints a file's libraries: ldd, or a loader of another C library with `--list`.
    A library that isn't found matters only if its user is ever imported: that one then says so.
    """
    found: set[Path] = set()
    for batch in _batches(sorted(files), 1 if lister[0] != "ldd" else 64):
        try:
            result = subprocess.run(
                [*lister, *map(str, batch)],
                capture_output=True,
                text=True,
                check=False,
                env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
            )
        except FileNotFoundError as error:
            raise HostError(f"{lister[0]} not found; the lab uses it to find libraries") from error
        found.update(parse_listing(result.stdout))
    return found


def parse_listing(text: str) -> set[Path]:
    """The paths in ldd's output; the vDSO and libraries that aren't found have none."""
    return {Path(m["path"]) for line in text.splitlines() if (m := _LINE.match(line))}


def _batches(files: list[Path], size: int) -> Iterable[list[Path]]:
    return (files[i : i + size] for i in range(0, len(files), size))


def place_in(root: Path, path: Path) -> Path:
    """Where a file goes below `root` so that its path stays good there.

    The directory is resolved, since /lib is usually a link to usr/lib; the name is not, since
    programs ask for it.
    """
    folder = path.parent.resolve()
    return root / folder.relative_to("/") / path.name
