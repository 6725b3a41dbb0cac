"""A folder in which the same thing is compiled again and again, from sources that change.

What changed is copied into it, and make compiles what depends on that. Whatever goes wrong in
between, the next build begins from nothing rather than with half of one.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vmm.core.errors import HostError, UsageError
from vmm.lab.cache import remove_tree

_FILES = "files"  # the names of the sources, which are no product of make's

_T = TypeVar("_T")


class MakeFailed(HostError):
    """make failed, and the user's sources are not to blame."""


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Such a folder, in whatever state an earlier build has left it. The caller holds its lock."""

    place: Path

    @property
    def goes_on(self) -> bool:
        """Whether a build goes on where an earlier one has ended."""
        return self._names.exists() and not self._unfinished.exists()

    def build(self, lay_out: Callable[[], None], compile_in: Callable[[], _T]) -> _T:
        """What `compile_in` gives, in a folder that `lay_out` fills where none is there yet.

        Where it raises MakeFailed after other builds, perhaps for what those left, it is tried
        once more from nothing.
        """
        goes_on = self.goes_on
        if not goes_on:
            self._begin(lay_out)
        try:
            return self._attempt(compile_in)
        except MakeFailed:
            if not goes_on:
                raise
        self._begin(lay_out)
        return self._attempt(compile_in)

    def note(self, names: list[str]) -> None:
        """These are the sources that are here."""
        self._names.write_text("".join(f"{name}\n" for name in sorted(names)))

    def take_over(self, wanted: Mapping[str, Path], sources: Path) -> None:
        """The files `wanted`, by their names below `sources`, in place of those that were noted,
        and only where their contents differ: make goes by times."""
        for name in set(self._names.read_text().splitlines()) - wanted.keys():
            (sources / name).unlink(missing_ok=True)
        self.note(list(wanted))
        for name, file in wanted.items():
            target = sources / name
            if _differs(target, file):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)  # perhaps a link to the cached tree's
                shutil.copy(file, target, follow_symlinks=False)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """For a run of make that leaves nothing half made when it is asked to end, as the kernel's:
        an interrupt loses what was being compiled, and the next build goes on."""
        try:
            yield
        except Exception:
            raise
        except BaseException:  # a signal's: make was told, and has ended
            self._unfinished.unlink(missing_ok=True)
            raise

    @property
    def _names(self) -> Path:
        return self.place / _FILES

    @property
    def _unfinished(self) -> Path:
        """There while files change and make runs: a process that ends in between leaves half a
        build."""
        return self.place / ".unfinished"

    def _begin(self, lay_out: Callable[[], None]) -> None:
        remove_tree(self.place)
        self.place.mkdir(parents=True)
        self._unfinished.touch()
        lay_out()

    def _attempt(self, compile_in: Callable[[], _T]) -> _T:
        self._unfinished.touch()
        try:
            made = compile_in()
        except (UsageError, MakeFailed):
            self._unfinished.unlink()  # make has ended by itself, and knows what it has
            raise
        self._unfinished.unlink()
        return made


def link_tree(tree: Path, into: Path) -> None:
    """A copy of a tree of the cache that is links to its files, which are never written to."""
    linked = subprocess.run(
        ["cp", "-al", str(tree), str(into)], capture_output=True, text=True, check=False
    )
    if linked.returncode:
        reason = (linked.stderr.splitlines() or ["no reason given"])[0]
        raise HostError(f"laying out {into} failed: {reason}; --lab-cache DIR names another place")


def _differs(target: Path, file: Path) -> bool:
    try:
        there = target.lstat()
    except FileNotFoundError:
        return True
    if file.is_symlink():
        return not target.is_symlink() or os.readlink(target) != os.readlink(file)
    mine = file.stat()
    if os.path.samestat(there, mine):
        return False
    return there.st_size != mine.st_size or not filecmp.cmp(target, file, shallow=False)
