"""Who asks something of a run while its calls fail: a reader of its memory file, a debugger, who
saves it. Each does the same every time, whatever comes of it, and then the guest goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import json
import os
import shutil
import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.injection import injecting
from tests.injection.injecting import NOTHING, Begin, Process, until
from tests.support import guests
from tests.support.gdb_client import GdbClient
from vmm.cli import ctl_saving
from vmm.control.memory_file.place import unmount
from vmm.core.errors import OutputError

_UP_TO_THE_LOOP = b"\x90" + guests.say(b"ready\r\n")
_LOOP = guests.STATUS + bytes.fromhex("eca801") + b"\x74\xf7"
"""in al, dx; test al, 1; jz back to the first: waits for a byte."""
GUEST = (
    _UP_TO_THE_LOOP
    + _LOOP
    + guests.say(b"done\r\n")
    + bytes.fromhex("66ba0406 66b80034 66ef")  # mov dx, 0x604; mov ax, 0x3400; out dx, ax: off
    + guests.SPIN
)
Answers = tuple[str, ...]


class Asker(ABC):
    """Options of the run, and what is asked of it, in rounds."""

    has_rounds = True
    """Whether it can be asked again after something has failed."""
    at_once = False
    """Whether calls fail from the command's first on, not only while it is asked."""
    ready = "stdout", b"ready"
    """Where it says that it can be asked."""

    def __init__(self, folder: Path, rounds: int = 0) -> None:
        """`rounds`: so many, in each of which one fault is meant; 0: one round with all."""
        self.answers: list[Answers] = []
        """What came of each question, for each round."""
        self._folder = folder
        self._rounds = rounds
        self._heard: list[str] = []

    def options(self) -> list[str]:
        kernel = self._folder / "kernel"
        kernel.write_bytes(guests.kernel(GUEST))
        return ["--kernel", str(kernel)]

    def __call__(self, process: Process, begin: Begin) -> tuple[bytes, bytes]:
        said, is_up = self.wait(process)
        for number in range(max(self._rounds, 1) if is_up else 0):
            if not self.at_once:
                begin(NOTHING)
            self.prepare()
            if not self.at_once:
                begin(number if self._rounds else None)
            self.ask()
            self.answers.append(tuple(self._heard))
            self._heard = []
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"x")  # what the guest waits for
        return said

    def wait(self, process: Process) -> tuple[tuple[bytes, bytes], bool]:
        """Until it can be asked, or has ended: what is read meanwhile of its output and its stderr,
        and whether it can."""
        stream, text = self.ready
        said = until(getattr(process, stream), text)
        is_up = text in said
        return ((said, b"") if stream == "stdout" else (b"", b"" if is_up else said)), is_up

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Before each round, while nothing fails."""

    @abstractmethod
    def ask(self) -> None:
        """One round of questions, whose answers `_try` notes."""

    def leftovers(self) -> list[str]:
        """What shouldn't be there any more once the run has ended."""
        return []

    def _try(self, question: str, ask: Callable[[], object]) -> None:
        try:
            answer = ask()
        except OSError as error:
            answer = errno.errorcode[error.errno or 0]
        self._heard.append(f"{question}: {answer}")


class Reader(Asker):
    """Of `--memory-file`: all that its files can be asked for."""

    has_rounds = False

    def options(self) -> list[str]:
        return [*super().options(), "--memory-file", str(self._folder / "memory")]

    def ask(self) -> None:
        self._use("memory", os.O_RDWR, self._memory)
        self._use("states", os.O_RDONLY, self._states)
        self._try("list", lambda: sorted(os.listdir(self._folder / "memory")))

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
        try:
            os.lstat(folder)
        except FileNotFoundError:
            return []
        except OSError:
            unmount(str(folder))
            return [f"{folder} is still mounted"]
        return [f"{folder} is still there"]


class Debugger(Asker):
    """Reads and writes registers, steps, sets a breakpoint, goes on, and detaches."""

    ready = "stderr", b"waits for a debugger"
    _at = b"%x,1" % (guests.BASE + len(_UP_TO_THE_LOOP + guests.STATUS) + 1)
    _packets = (
        b"g",
        b"P3=4100000000000000",  # rbx: KVM_SET_REGS
        b"P38=a01f0000",  # mxcsr: KVM_SET_FPU
        b"P3c=0010000000000000",  # cr2: KVM_SET_SREGS
        b"p3",
        b"vCont;s:1",
        b"Z1," + _at,
        b"vCont;c",
        b"p10",  # where it is
        b"D",
    )

    def options(self) -> list[str]:
        return [*super().options(), "--gdb", str(self._folder / "gdb")]

    def prepare(self) -> None:
        """Where each round begins: at the breakpoint, with other registers."""
        self._gdb = GdbClient.at(self._folder / "gdb")
        for packet in (b"Z1," + self._at, b"vCont;c", b"z1," + self._at):
            assert not self._gdb.ask(packet).startswith(b"E")
        for packet in (b"P3=4200000000000000", b"P38=801f0000", b"P3c=0020000000000000"):
            assert self._gdb.ask(packet) == b"OK"

    def ask(self) -> None:
        with contextlib.suppress(EOFError), self._gdb:
            for packet in self._packets:
                self._try(packet.decode(), partial(self._asked, packet))

    def _asked(self, packet: bytes) -> str:
        answer = self._gdb.ask(packet)
        if answer.startswith(b"E"):
            return "error"
        return "all of them" if packet == b"g" else answer.decode()


class Saver(Asker):
    """Has a snapshot and a core file made of it, over and over."""

    def options(self) -> list[str]:
        (self._folder / "saved").mkdir(exist_ok=True)
        return [*super().options(), "--control", str(self._folder / "control")]

    def save(self, path: Path) -> dict[str, Any]:
        return ctl_saving.snapshot(self._ask, str(path), with_private=False, then_quit=False)

    def ask(self) -> None:
        place = self._folder / "saved"
        ways: dict[str, Callable[[], dict[str, Any]]] = {
            "snapshot": partial(self.save, place / "snapshot"),
            "dump": partial(ctl_saving.dump, self._ask, str(place / "core")),
        }
        for name, make in ways.items():
            self._try(name, partial(_made, make))
            self._try("left", lambda: sorted(os.listdir(place)))
            for root, _, files in os.walk(place, topdown=False):
                for file in files:
                    os.unlink(os.path.join(root, file))
                if root != str(place):
                    os.rmdir(root)
        self._try("status", lambda: self._ask({"command": "status"}, [])["state"])

    def quit(self) -> None:
        self._ask({"command": "quit"}, [])

    def _ask(self, request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._folder / "control"))
            ctl_saving.send_files(connection, json.dumps(request).encode() + b"\n", files)
            answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
        return answer


def _made(make: Callable[[], dict[str, Any]]) -> str:
    try:
        return "made" if ctl_saving.carried_out(make)["ok"] else "error"
    except OutputError:
        return "error"


class _Once(Saver):
    """Makes a snapshot that stays."""

    def ask(self) -> None:
        self.save(self._folder / "snapshot")


@functools.cache
def snapshot() -> Path:
    """A snapshot of the guest, which waits for a byte; made once for all."""
    folder = Path(tempfile.mkdtemp(prefix="pyvmm-"))
    atexit.register(shutil.rmtree, folder)
    saver = _Once(folder)
    ended = injecting.run(injecting.pyvmm(*saver.options(), *MEMORY), meanwhile=saver)
    assert ended.status == 0, ended
    return folder / "snapshot"


class _StartedReader(Reader):
    at_once = True


class _StartedDebugger(Debugger):
    at_once, has_rounds = True, False


class _StartedSaver(Saver):
    at_once, has_rounds = True, False


MEMORY = ("--mem", "16M")
ASKERS: dict[str, type[Asker]] = {
    "memory file": Reader,
    "gdb": Debugger,
    "saving": Saver,
    "memory file, from the start": _StartedReader,
    "gdb, from the start": _StartedDebugger,
    "saving, from the start": _StartedSaver,
}
