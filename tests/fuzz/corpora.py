"""The inputs that are kept for each target.

`corpus/NAME.txt` has those that somebody wrote, and each that once found a fault: one a line, in
hexadecimal, and behind a # what it is. `corpus/NAME.zip` has those that fuzzing found to reach
other code than the rest, minimised (`python -m tests.fuzz.hours --merge`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"
_LONG_AGO = (1980, 1, 1, 0, 0, 0)


def written(name: str) -> list[bytes]:
    """Those of NAME.txt."""
    path = FOLDER / f"{name}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    digits = [line.partition("#")[0].strip() for line in lines]
    return [bytes.fromhex(each) for each in digits if each]


def found(name: str) -> list[bytes]:
    """Those of NAME.zip."""
    path = FOLDER / f"{name}.zip"
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as archive:
        return [archive.read(each) for each in archive.namelist()]


def corpus(name: str) -> list[bytes]:
    """All of them."""
    return [*written(name), *found(name)]


def keep(name: str, inputs: Iterable[bytes]) -> int:
    """Make NAME.zip of these, the same bytes for the same inputs; how large it is."""
    path = FOLDER / f"{name}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for number, data in enumerate(sorted(set(inputs), key=lambda each: (len(each), each))):
            entry = zipfile.ZipInfo(f"{number}", _LONG_AGO)
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return path.stat().st_size
