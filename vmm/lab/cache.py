"""The lab's cache directory: entries appear whole or not at all, under a lock.

An entry is a file or a directory. It is built under another name and renamed into place, so
that an interrupted download or build never looks like a finished one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmm.core.errors import HostError


def default_directory() -> Path:
    """$PYVMM_LAB_CACHE, else pyvmm/lab in the user's cache directory (XDG base directories)."""
    given = os.environ.get("PYVMM_LAB_CACHE")
    if given:
        return Path(given).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pyvmm" / "lab"


@dataclass(frozen=True, slots=True)
class Cache:
    """A directory of named entries."""

    root: Path

    def __post_init__(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HostError(
                f"creating the lab's cache {self.root} failed: {error.strerror}; "
                "name another directory with --lab-cache DIR or PYVMM_LAB_CACHE"
            ) from error

    def path(self, name: str) -> Path:
        return self.root / name

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Held by one process at a time; the kernel drops it when the process ends."""
        with open(self.root / f".{name.replace('/', '-')}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def entry(self, name: str, build: Callable[[Path], None]) -> Path:
        """The entry `name`; `build(path)` makes it, at a temporary place, when it is absent."""
        final = self.root / name
        if final.exists():
            os.utime(final)  # prune() goes by the time of the last use
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        with self.lock(name):
            if final.exists():
                return final
            scratch = final.parent / f".new-{final.name}"
            remove_tree(scratch)  # of a process that was killed: it held this lock
            scratch.mkdir()
            try:
                build(scratch / "entry")
                os.rename(scratch / "entry", final)
            finally:
                remove_tree(scratch)
        return final

    def prune(self, prefix: str, keep: int) -> None:
        """Drops all but the `keep` newest entries, files, whose name begins with `prefix`."""
        for old in self._older(prefix, keep, Path.is_file):
            old.unlink(missing_ok=True)

    def prune_folders(self, prefix: str, keep: int) -> None:
        """The same of entries that are directories."""
        for old in self._older(prefix, keep, Path.is_dir):
            remove_tree(old)

    def _older(self, prefix: str, keep: int, is_kind: Callable[[Path], bool]) -> list[Path]:
        folder = (self.root / prefix).parent
        stem = (self.root / prefix).name
        found = [p for p in folder.glob(f"{stem}*") if is_kind(p)]
        found.sort(key=lambda p: p.stat().st_mtime_ns, reverse=True)
        return found[keep:]


def remove_tree(path: Path) -> None:
    """Removes a directory of ours, also one holding directories without write permission."""
    for folder, _, _ in os.walk(path):
        os.chmod(folder, 0o700)
    shutil.rmtree(path, ignore_errors=True)
