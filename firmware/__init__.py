"""Guest payloads that ship with pyvmm: sources, and the images built from them.

The embedded payload runs when no kernel is given: it tries private memory, sharing and block
I/O from the guest's side, and says what it saw (each architecture's `start.S` has its steps).
The bench guest drives a disk as fast as it can (see `x86_64/bench/main.S` for what it is told and
what it answers); pyvmm starts it as a kernel, QEMU by its PVH note.
The loader fills the private memory of a strict guest from inside (`x86_64/loader/start.S`).
The init mounts a Linux guest's root disk, or runs one command in it (`init/init.c`).
"""

from __future__ import annotations

import os  # pathlib would be a part of a start that can be felt

LOAD_ADDRESS = 0x100000
"""Where in RAM the image's first byte lies, which is also where it is entered."""

MEMORY_END = 0x200000
"""The image, its stack and its variables stay below this place in RAM."""

MIN_RAM_BYTES = 16 << 20
"""The payload converts ranges at fixed places and needs RAM up to here."""


def payload_path(architecture: str = "x86_64") -> str:
    """Where the flat image of the embedded payload lies; raises LookupError if there is none."""
    return _path("embedded payload", architecture, "payload.bin")


def payload_bytes(architecture: str = "x86_64") -> bytes:
    """The flat image of the embedded payload; raises LookupError if there is none."""
    with open(payload_path(architecture), "rb") as file:
        return file.read()


def bench_path(architecture: str = "x86_64") -> str:
    """Where the ELF of the bench guest lies; raises LookupError if there is none."""
    return _path("bench guest", architecture, os.path.join("bench", "bench.elf"))


def loader_path(architecture: str = "x86_64") -> str:
    """Where the flat image of the strict guest's loader lies; raises LookupError if there is
    none."""
    return _path("loader", architecture, os.path.join("loader", "loader.bin"))


def init_path(architecture: str = "x86_64") -> str:
    """Where the init of guests that pyvmm makes an initramfs for lies (a static ELF); raises
    LookupError if there is none."""
    return _path("init", architecture, "init.elf")


def _path(what: str, architecture: str, name: str) -> str:
    path = os.path.join(os.path.dirname(os.path.realpath(__file__)), architecture, name)
    if not os.path.isfile(path):
        raise LookupError(f"no {what} for {architecture}: {path} does not exist")
    return path
