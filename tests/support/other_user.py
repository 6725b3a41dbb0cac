"""Commands that go on as another user, where Python or pyvmm lies in a folder that its owner alone
may enter, as under /root: they have a mount namespace of their own, in which everybody may."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# For each folder an empty one that everybody may enter is put over it, in which all folders that
# were there are bound again: the folder itself stays as it is, here and for everybody else.
_OPEN = """
set -e
hold=$1; shift
while [ "$1" != -- ]; do
    mount --bind "$1" "$hold"
    mount -t tmpfs -o mode=755 none "$1"
    for each in "$hold"/*/ "$hold"/.[!.]*/; do
        [ -d "$each" ] || continue
        there=$1/$(basename "$each")
        mkdir "$there"
        mount --bind "$each" "$there"
    done
    umount --lazy "$hold"
    shift
done
shift
exec "$@"
"""


def closed_folders() -> list[Path]:
    """Those on the way to Python, its packages and pyvmm that only their owner may enter, outer
    ones first."""
    ways = [Path(place).resolve() for place in (sys.prefix, sys.base_prefix, os.__file__, ROOT)]
    ways.append(Path(sys.executable).absolute())
    folders = {folder for way in ways for folder in (way, *way.parents) if folder.is_dir()}
    closed = [each for each in folders if not each.stat().st_mode & stat.S_IXOTH]
    return sorted(closed, key=lambda each: len(each.parts))


@contextmanager
def open_to_others() -> Iterator[list[str]]:
    """Words in front of a command, by which another user may run what it runs. Skips the test where
    that can't be had."""
    closed = closed_folders()
    if not closed:
        yield []
        return
    with tempfile.TemporaryDirectory() as hold:
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _OPEN, "sh", hold]
        words += [*map(str, closed), "--"]
        tried = _tried([*words, "true"])
        if tried:
            pytest.skip(
                f"another user may not enter {closed[0]}, and no mount namespace can be had "
                f"({tried}); install Python and pyvmm where everybody may read, or run as root"
            )
        yield words


def _tried(command: Sequence[str]) -> str:
    """Empty where it works, else what it says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return (done.stderr.strip() or f"status {done.returncode}") if done.returncode else ""
