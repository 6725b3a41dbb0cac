"""Kernel modules out of an unpacked package: found by name, in the order of their dependencies.

Packages carry no modules.dep (it is made on installation), so the dependencies are read from
each module's own .modinfo.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from vmm.core.errors import UsageError

_PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    ".ko": bytes,
    ".ko.xz": lzma.decompress,
    ".ko.gz": gzip.decompress,
    ".ko.bz2": bz2.decompress,
}


class ModuleTree:
    """The modules below a directory, normally lib/modules/RELEASE; None for a kernel without any.

    Those in `instead` are taken in place of the ones of the same name.
    """

    def __init__(self, root: Path | None, instead: Path | None = None) -> None:
        self._files: dict[str, Path] = {}
        for folder in filter(None, (instead, root)):
            for path in folder.rglob("*.ko*"):
                stem, _, _ = path.name.partition(".ko")
                self._files.setdefault(_canonical(stem), path)

    def __contains__(self, name: str) -> bool:
        return _canonical(name) in self._files

    def in_order(self, names: Iterable[str]) -> list[tuple[str, bytes]]:
        """(name, unpacked module) for each name that is a module here, its dependencies first.

        Names that are not here are passed over: they are built into that kernel.
        """
        done: dict[str, bytes] = {}
        for name in names:
            self._collect(_canonical(name), done)
        return list(done.items())

    def _collect(self, name: str, done: dict[str, bytes]) -> None:
        path = self._files.get(name)
        if path is None or name in done:
            return
        content = self._unpacked(path)
        for needed in dependencies(content):
            self._collect(_canonical(needed), done)
        done[name] = content

    def _unpacked(self, path: Path) -> bytes:
        suffix = path.name[path.name.index(".ko") :]
        unpack = _PACKINGS.get(suffix)
        if unpack is None:
            raise UsageError(
                f"kernel module {path}: packing {suffix!r} is not known; "
                f"unpack the modules, known are {' '.join(_PACKINGS)}"
            )
        try:
            return unpack(path.read_bytes())
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise UsageError(
                f"kernel module {path} cannot be unpacked: {error}; get a fresh copy"
            ) from error


def _canonical(name: str) -> str:
    """The kernel takes '-' and '_' in module names for the same."""
    return name.replace("-", "_")


def dependencies(module: bytes) -> list[str]:
    """The modules that must be loaded before this one: `depends=` of its .modinfo strings."""
    at = module.find(b"\0depends=")
    if at < 0:
        return []
    value = module[at + 9 :].partition(b"\0")[0]
    return [name.decode("ascii", "replace") for name in value.split(b",") if name]


def without_signature(module: bytes) -> bytes:
    """The module less the signature behind it (scripts/sign-file.c of Linux: trailer, magic).

    Checking it means hashing megabytes under emulation; the kernel loads it all the same.
    """
    magic = b"~Module signature appended~\n"
    if not module.endswith(magic):
        return module
    end = len(module) - len(magic)
    length = int.from_bytes(module[end - 4 : end], "big")
    start = end - 12 - length
    return module[:start] if start > 0 else module
