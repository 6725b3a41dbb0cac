"""The C code that reads what a guest wrote, fuzzed as C: AddressSanitizer and UBSan see what Python
never would. Its targets beside those of Python:

`rings-c`: native/rings.c on kvm_bindings/virtqueue.c. Coverage-guided where there is a clang with
libFuzzer (Debian: clang and libclang-rt-VERSION-dev); elsewhere native/replay.c and any compiler.
"""

from __future__ import annotations

import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "native"
BINDINGS = Path(__file__).parents[2] / "kvm_bindings"
SANITIZE = ["-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
            "-fno-sanitize-recover=undefined"]  # fmt: skip
_CLANGS = ["clang", *(f"clang-{version}" for version in range(25, 13, -1))]


class Native(NamedTuple):
    """One of them, as hours and libfuzzer want it."""

    name: str
    source: str
    longest: int
    runs: int

    def seeds(self) -> Iterator[bytes]:
        """Real rings."""
        return _rings()


NATIVE = {each.name: each for each in [Native("rings-c", "rings.c", 6144, 2000)]}


def compile_with(
    compiler: str, source: str, output: Path, *words: str, bindings: Path = BINDINGS
) -> None:
    """A program of native/`source` and `words`, with what is in `bindings`. Raises
    CalledProcessError, with what the compiler says."""
    options = ["-O1", "-Wall", "-Wextra", *SANITIZE, f"-I{bindings}", *words]
    command = [compiler, *options, "-o", str(output), str(FOLDER / source)]
    subprocess.run(command, check=True, capture_output=True, text=True)


@functools.cache
def clang() -> str | None:
    """A clang that has libFuzzer and the sanitizers; None: there is none."""
    for name in filter(shutil.which, _CLANGS):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            program = Path(scratch, "one.c")
            program.write_text(
                "int LLVMFuzzerTestOneInput(const char *data, long size)\n"
                "{ return size < 0 && data; }\n"
            )
            words = ["-fsanitize=fuzzer,address,undefined", "-o", f"{scratch}/one", str(program)]
            if not subprocess.run([name, *words], capture_output=True, check=False).returncode:
                return name
    return None


@functools.cache
def _built() -> tempfile.TemporaryDirectory[str]:
    """A folder of programs; it goes with the process."""
    return tempfile.TemporaryDirectory(prefix="fuzz-")


def build(name: str) -> Path:
    """The target as a libFuzzer program, which whoever calls this from now on has, too. ValueError:
    there is no clang that can."""
    program = Path(_built().name, name)
    if not program.exists():
        compiler = clang()
        if compiler is None:
            raise ValueError(f"{name} needs a clang with libFuzzer, and there is none")
        compile_with(compiler, NATIVE[name].source, program, "-fsanitize=fuzzer")
    return program


def become(name: str, words: Sequence[str]) -> None:
    """Be libFuzzer's loop for the target that was built: this process is another one then."""
    program = Path(_built().name, name)
    os.execv(program, list(words))


def _rings() -> Iterator[bytes]:
    """What Linux' virtio_blk leaves: reads and writes of 4 KiB, as chains and as indirect tables,
    where the ring has wrapped and where it has not. And data that ends beyond all memory."""
    for first in (0, 0xFFFF):
        for is_indirect in (False, True):
            yield _ring(first, 1 << 20, is_indirect, [0, 1])
    yield _ring(0, 1 << 20, False, [0, 0])
    yield _ring(0, (1 << 64) - 8192, False, [0, 1])


def _ring(first: int, base: int, is_indirect: bool, kinds: Sequence[int]) -> bytes:
    """Requests one behind the other, in a queue of 16 that has come to number `first`."""
    size, entries, rows, tables, headers = 16, [0] * 16, b"", b"", b""
    for number, kind in enumerate(kinds):
        at = 0 if is_indirect else 3 * number
        chain = struct.pack("<QIHH", base, 16, 1, at + 1)
        data = base + 4096 + 8192 * number
        chain += struct.pack("<QIHH", data % (1 << 64), 4096, 1 if kind else 3, at + 2)
        chain += struct.pack("<QIHH", base + 16, 1, 2, 0)
        if is_indirect:
            rows += struct.pack("<QIHH", base + 48 * number, len(chain), 4, 0)
            tables += chain
        else:
            rows += chain
        entries[(first + number) % size] = number if is_indirect else at
        headers += struct.pack("<IIQ", kind, 0, 8 + 8 * number)
    ring = struct.pack(f"<{size}H", *entries) + rows.ljust(16 * size, b"\0")
    numbers = struct.pack("<BHHHIIB", 4, len(kinds), first, 2048, 1 << 24, 1 << 12, 0)
    disk = struct.pack("<BHI", 1, 512, 1 << 20)  # may be written to, cost of a request, and of all
    return numbers + ring + tables + disk + headers
