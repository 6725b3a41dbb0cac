"""Who asks something of a run while its calls fail: a reader of its memory file, a debugger.

Each does the same every time, whatever comes of it, and then lets the guest go on to its end.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.injection.injecting import Process, until
from tests.support import guests
from tests.support.gdb_client import GdbClient

GUEST = (
    b"\x90\x90\x90\x90"  # for a debugger to step over
    + guests.say(b"ready\r\n")
    + guests.STATUS
    + bytes.fromhex("eca80174fb")  # in al, dx; test al, 1; jz back: wait for a byte
    + guests.say(b"done\r\n")
    + bytes.fromhex("66ba0406 66b80034 66ef")  # mov dx, 0x604; mov ax, 0x3400; out dx, ax: off
    + guests.SPIN
)
Answers = list[str]


class Asker:
    """Options of the run, and what is asked of it; `answers` say what came of each question."""

    def __init__(self, folder: Path) -> None:
        self.answers: Answers = []
        self._folder = folder

    def options(self) -> list[str]:
        kernel = self._folder / "kernel"
        kernel.write_bytes(guests.kernel(GUEST))
        return ["--kernel", str(kernel)]

    def __call__(self, process: Process, begin: Callable[[], None]) -> tuple[bytes, bytes]:
        raise NotImplementedError

    def leftovers(self) -> list[str]:
        """What shouldn't be there any more once the run has ended."""
        return []

    def _try(self, question: str, ask: Callable[[], object]) -> None:
        try:
            answer = ask()
        except OSError as error:
            answer = errno.errorcode[error.errno or 0]
        self.answers.append(f"{question}: {answer}")


class Reader(Asker):
    """Of `--memory-file`: all that its files can be asked for."""

    def options(self) -> list[str]:
        return [*super().options(), "--memory-file", str(self._folder / "memory")]

    def __call__(self, process: Process, begin: Callable[[], None]) -> tuple[bytes, bytes]:
        said = until(process.stdout, b"ready")
        begin()
        self._use("memory", os.O_RDWR, self._memory)
        self._use("states", os.O_RDONLY, self._states)
        self._try("list", lambda: sorted(os.listdir(self._folder / "memory")))
        _type(process)
        return said, b""

    def _use(self, name: str, flags: int, use: Callable[[int], None]) -> None:
        def open_and_use() -> str:
            fd = os.open(self._folder / "memory" / name, flags)
            try:
                use(fd)
            finally:
                with contextlib.suppress(OSError):  # nobody may be there any more
                    os.close(fd)
            return "done"

        self._try(name, open_and_use)

    def _memory(self, fd: int) -> None:
        self._try("small", lambda: len(os.pread(fd, 512, guests.BASE)))
        self._try("large", lambda: len(os.pread(fd, 1 << 20, 0)))
        self._try("write", lambda: os.pwrite(fd, b"written", 0x1000))
        self._try("back", lambda: os.pread(fd, 7, 0x1000))
        self._try("hole", lambda: os.lseek(fd, 0, os.SEEK_HOLE))
        self._try("size", lambda: os.fstat(fd).st_size)

    def _states(self, fd: int) -> None:
        self._try("text", lambda: os.pread(fd, 4096, 0))

    def leftovers(self) -> list[str]:
        folder = self._folder / "memory"
        return [f"{folder} is still there"] if os.path.lexists(folder) else []


class Debugger(Asker):
    """Reads and writes registers, steps, sets a breakpoint, goes on, and detaches."""

    def options(self) -> list[str]:
        return [*super().options(), "--gdb", str(self._folder / "gdb")]

    def __call__(self, process: Process, begin: Callable[[], None]) -> tuple[bytes, bytes]:
        said = until(process.stderr, b"waits for a debugger")
        if b"waits for a debugger" not in said:
            return b"", said
        with contextlib.suppress(OSError, EOFError), GdbClient.at(self._folder / "gdb") as gdb:
            assert gdb.ask(b"vCont;s:1").startswith(b"T05")  # until when it may not stand yet
            begin()
            for packet in _PACKETS:
                self._try(packet.decode(), partial(_asked, gdb, packet))
        _type(process)
        return b"", b""


_AT = b"%x,1" % (guests.BASE + 3)
_PACKETS = (
    b"g",
    b"P0=4100000000000000",  # rax: KVM_SET_REGS
    b"P38=a01f0000",  # a register of the FPU's: KVM_SET_FPU
    b"P3c=0010000000000000",  # cr2: KVM_SET_SREGS
    b"g",
    b"vCont;s:1",
    b"Z1," + _AT,
    b"vCont;c",
    b"p10",  # where it is
    b"D",
)


def _asked(gdb: GdbClient, packet: bytes) -> str:
    answer = gdb.ask(packet)
    return "error" if answer.startswith(b"E") else answer.decode()


def _type(process: Process) -> None:
    """What the guest waits for."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"x")


ASKERS: dict[str, type[Asker]] = {"memory file": Reader, "gdb": Debugger}
