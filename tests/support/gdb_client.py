"""A debugger's end of gdb's remote protocol, as small as tests need it; and real gdb."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

SECONDS = 20


def framed(data: bytes) -> bytes:
    return b"$" + data + b"#%02x" % (sum(data) & 0xFF)


class GdbClient:
    """One connection. Packets are acknowledged until `no_acks`."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(SECONDS)
        self._rest = b""
        self._acks = True

    @classmethod
    def at(cls, path: Path | str) -> GdbClient:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(SECONDS)
        connection.connect(str(path))
        return cls(connection)

    def no_acks(self) -> None:
        assert self.ask(b"QStartNoAckMode") == b"OK"
        self._acks = False

    def raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def send(self, data: bytes) -> None:
        self.raw(framed(data))

    def ask(self, data: bytes) -> bytes:
        """Send a packet; the answer's data."""
        self.send(data)
        return self.reply()

    def reply(self) -> bytes:
        """The next packet; acknowledgements before it are left out."""
        while True:
            start = self._rest.find(b"$")
            end = self._rest.find(b"#", start) if start >= 0 else -1
            if end >= 0 and len(self._rest) >= end + 3:
                data, digits = self._rest[start + 1 : end], self._rest[end + 1 : end + 3]
                self._rest = self._rest[end + 3 :]
                assert int(digits, 16) == sum(data) & 0xFF
                if self._acks:
                    with contextlib.suppress(BrokenPipeError):  # that was the last answer
                        self.raw(b"+")
                return data
            got = self._socket.recv(1 << 16)
            if not got:
                raise EOFError(f"hung up after {self._rest!r}")
            self._rest += got

    def byte(self) -> bytes:
        """The next byte, whatever it is; empty at the end."""
        if not self._rest:
            try:
                self._rest = self._socket.recv(1 << 16)
            except ConnectionResetError:
                return b""
        first, self._rest = self._rest[:1], self._rest[1:]
        return first

    def registers(self, names: Sequence[str]) -> dict[str, int]:
        """The first registers of the `g` packet, of 64 bits each."""
        data = bytes.fromhex(self.ask(b"g").decode())
        return {
            name: int.from_bytes(data[8 * n : 8 * n + 8], "little") for n, name in enumerate(names)
        }

    def monitor(self, words: str) -> str:
        return bytes.fromhex(self.ask(b"qRcmd," + words.encode().hex().encode()).decode()).decode()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    *(f"r{number}" for number in range(8, 16)), "rip",
)  # fmt: skip


def gdb(where: str, *commands: str, seconds: float = 40) -> str:
    """What real gdb prints for these commands after it has attached; an error doesn't end it."""
    import pytest  # not in the lab, where the client alone is used

    program = shutil.which("gdb")
    if program is None:
        pytest.skip("no gdb: install Debian's package gdb")
    words = [program, "-nx", "-batch"]
    for each in (
        "set pagination off", "set confirm off", "set architecture i386:x86-64",
        f"target remote {where}", *commands,
    ):  # fmt: skip
        words += ["-ex", each]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        check=False,
        text=True,
    )
    return done.stdout
