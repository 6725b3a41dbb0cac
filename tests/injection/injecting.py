"""A command whose calls into the C library fail as a test wants it.

Two ways in. `Fault`s are carried out by a library that is preloaded (shim.c): the only way to a
call that moves less than it was asked for, and to one ioctl among others. strace(1) injects behind
the C library, at the kernel's door.
"""

from __future__ import annotations

import atexit
import errno
import functools
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Protocol

from tests.injection.warm import Forked, Warm
from vmm.core.lean_typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).with_name("shim.c")
SECONDS = 40
"""After so long a run counts as hanging."""
SHORT = 0
"""In the place of an errno: the call moves half of the bytes."""
FOR_EVER = 1 << 40
_PYVMM = [sys.executable, "-m", "vmm"]
_COUNTS = 4096
_MOST_RULES = 128


class Fault(NamedTuple):
    """Which calls fail, and how."""

    call: str
    """As strace names it; splice is `splice-in` (from a file) or `splice-out`."""
    on: str = "*"
    """Part of what /proc/self/fd says of the descriptor."""
    error: int = errno.EIO
    first: int = 1
    last: int = 1
    request: int = 0
    """An ioctl's number, where only that one is meant."""


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    """-9: it hung, and was killed."""
    output: str
    errors: str
    seen: int
    """How many calls were such as the first fault names."""
    injected: int
    """How often the first fault was carried out."""
    each: tuple[int, ...] = ()
    """The same for all of them."""


@functools.cache
def shim() -> str:
    """The compiled library's path."""
    folder = tempfile.mkdtemp(prefix="pyvmm-shim-")
    path = os.path.join(folder, "shim.so")
    compiler = shutil.which("cc") or "gcc"
    command = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", path, str(SHIM)]
    subprocess.run([*command, "-ldl"], check=True, timeout=60)
    return path


Process = subprocess.Popen[bytes] | Forked


NOTHING = -2
Begin = Callable[[int | None], None]
"""Has a fault begin, by its place, and others not any more; None: all of them, NOTHING: none."""


class Meanwhile(Protocol):
    """Does something to a run that has been started."""

    at_once: bool
    """Whether all faults are in force before it is called."""

    def __call__(self, process: Process, begin: Begin) -> tuple[bytes, bytes]:
        """What it has read of its output and its stderr."""
        ...


def until(stream: IO[bytes] | None, text: bytes) -> bytes:
    """All lines up to the one with `text`, or to the end."""
    assert stream is not None
    lines = b""
    while (line := stream.readline()) and text not in line:
        lines += line
    return lines + line


def run(
    words: Sequence[str],
    *faults: Fault,
    environment: dict[str, str] | None = None,
    meanwhile: Meanwhile | None = None,
    typed: bytes = b"",
) -> Ended:
    """Run `words` with these faults; never for longer than SECONDS. `typed` is its input."""
    more = dict(environment or {})
    with tempfile.NamedTemporaryFile(prefix="pyvmm-counts-") as file:
        file.truncate(_COUNTS)
        if meanwhile is not None and not meanwhile.at_once:
            arm(file.fileno(), FIRST + NOTHING)
        if faults:
            more |= {
                "LD_PRELOAD": shim(),
                "PYVMM_INJECT_COUNTS": file.name,
                "PYVMM_INJECT": "|".join(
                    f"{each.call},{each.on},{each.request},{each.first},{each.last},{each.error}"
                    for each in faults
                ),
            }

        def begin(fault: int | None) -> None:
            arm(file.fileno(), _ALL if fault is None else FIRST + fault)

        asking = None if meanwhile is None else functools.partial(meanwhile, begin=begin)
        status, output, errors = _ended(words, more, asking, typed)
        with mmap.mmap(file.fileno(), _COUNTS, access=mmap.ACCESS_READ) as counts:
            numbers = struct.unpack_from(f"={2 * max(len(faults), 1)}Q", counts)
    return Ended(status, output, errors, numbers[0], numbers[1], numbers[1::2])


_ALL, FIRST = 2, 3


def arm(counts: int, which: int) -> None:
    """See shim.c."""
    os.pwrite(counts, struct.pack("=Q", which), 8 * 2 * _MOST_RULES)


def _ended(
    words: Sequence[str],
    environment: dict[str, str],
    meanwhile: Callable[[Process], tuple[bytes, bytes]] | None = None,
    typed: bytes = b"",
) -> tuple[int, str, str]:
    process: Process
    if list(words[: len(_PYVMM)]) == _PYVMM:
        process = _warm().start(words[len(_PYVMM) :], environment)
    else:
        process = subprocess.Popen(
            words, cwd=ROOT, env=os.environ | environment, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    try:
        if typed:
            assert process.stdin is not None
            process.stdin.write(typed)
        before = (b"", b"") if meanwhile is None else meanwhile(process)
        after = process.communicate()
    finally:
        watchdog.cancel()
        process.kill()  # if it hasn't ended
        process.wait()
    output, errors = (
        (first + rest).decode(errors="replace").replace("\r\n", "\n")
        for first, rest in zip(before, after, strict=True)
    )
    assert process.returncode is not None
    return process.returncode, output, errors


@functools.cache
def _warm() -> Warm:
    made = Warm(shim(), str(ROOT))
    atexit.register(made.close)
    return made


def cool_down() -> None:
    """End the process that commands are forked from; the next one starts another."""
    if _warm.cache_info().currsize:
        atexit.unregister(_warm().close)
        _warm().close()
        _warm.cache_clear()


def run_under_strace(
    words: Sequence[str], call: str, error: int, match: str, first: int, last: int
) -> Ended:
    """Run `words` with calls that fail behind the C library; `match` is a whole path, or `*`.
    `first` and `last` count each thread's calls apart."""
    when = f"{first}+" if last == FOR_EVER else f"{first}..{last}"
    name = "EOPNOTSUPP" if error == errno.EOPNOTSUPP else errno.errorcode[error]
    inject = f"inject={call}:error={name}:when={when}"
    with tempfile.NamedTemporaryFile(prefix="pyvmm-strace-") as log:
        # By a filter: a call that is stopped at its entry becomes number -1, which a sandbox sees.
        tracer = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", log.name]
        tracer += ["-e", f"trace={call}", "-e", inject]
        if match != "*":
            tracer += ["-P", match]
        status, output, errors = _ended([*tracer, *words], {})
        lines = Path(log.name).read_text(errors="replace")
    return Ended(status, output, errors, lines.count(f"{call}("), lines.count("(INJECTED)"))


def programs(*each: tuple[str, Fault]) -> Ended:
    """Some of tests.injection.programs, one after the other in one process, whose calls fail as
    they say when it arms the library."""
    words = [sys.executable, "-m", "tests.injection.programs"]
    for name, fault in each:
        words += [name, str(fault.error)]
    faults = [fault for _, fault in each]
    return run(words, *faults, environment={"PYVMM_INJECT_WAITS": "1", "PYTHONPATH": str(ROOT)})


def pyvmm(*options: str) -> list[str]:
    return [*_PYVMM, *options]
