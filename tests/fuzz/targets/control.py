"""What is said to a run: control socket, debugger, the loader's window, --exec's init."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from kvm_bindings import KvmError
from kvm_bindings.aarch64.registers import CORE_REGISTERS, SYSTEM_REGISTERS
from tests.fuzz.drawing import patched, patches
from tests.fuzz.targets.conversions import records
from tests.fuzz.targets.registry import target
from tests.support.control import FakeOperations
from tests.support.fake_memory import FakeMemory
from tests.support.virtio_machine import FakeLoop
from vmm.arch.aarch64.debug import Arm64Debug
from vmm.arch.debug import Abilities, GuestDebug
from vmm.arch.x86_64.debug import X86Debug
from vmm.boot.manifest import FilePart, Part
from vmm.control.control_socket import LONGEST_LINE, ROWS_AT_ONCE, ControlSocket
from vmm.control.gdb import packets
from vmm.control.gdb.session import Session
from vmm.control.gdb.target import Target
from vmm.core.event_loop import EventLoop
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.devices.load_window import PORT_DONE, PORT_FAILED, PORT_FILL, LoadWindow
from vmm.exits.outcome import POWEROFF, Outcome
from vmm.exits.vcpu_group import VcpuGroup
from vmm.machine.execution import Execution
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.debugging import DebugAccess
from vmm.memory.guest_memory import GuestMemory

# --- the control socket ---


class _Loop(FakeLoop):
    """`run` calls back what is ready until nothing is."""

    def run(self, taken: Callable[[], object]) -> None:
        """Serve, one at a time; between, the client takes what there is for it."""
        for _ in range(2000):
            taken()
            ready = self._poll(0)
            if not ready:
                return
            self.wanted[ready[0][0]][0]()
        raise AssertionError("the control socket never comes to rest")


def _lines() -> list[bytes]:
    def line(command: object, **more: object) -> bytes:
        return json.dumps({"command": command, **more}).encode() + b"\n"

    share = {"kind": "share", "gpa": "0x1000", "size": 8192}
    return [
        b"\0" + line("status") + line("dump-state"),
        b"\1" + line("pause") + line("resume") + line("quit"),
        b"\2" + line("convert", **share) + line("convert", kind="unshare", gpa=0, size="0x1000"),
        b"\3" + line("follow") + line("convert", **share) + line("follow"),
        b"\0[]\nnull\n{}\n9\n\xff\n" + line(["status"]) + line("convert", kind=1),
        b"\4" + line("convert", kind="share", gpa=-1, size=1.5)[:-1],
    ]


@cache
def _control() -> tuple[ControlSocket, _Loop]:
    """One for all inputs: nothing of a client stays when it has gone."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-"), "c")
    control, loop = ControlSocket(str(path)), _Loop()
    control.serve(cast(EventLoop, loop), cast(Any, FakeOperations()))
    path.unlink()
    path.parent.rmdir()
    return control, loop


@target("control-socket", _lines)
def control_socket(data: bytes) -> None:
    """A byte for how it comes in pieces and what conversions answer, then a client's bytes: an
    answer for each line, in their order, and only commands that make sense are carried out."""
    control, loop = _control()
    operations = FakeOperations()
    how = data[0] if data else 0
    operations.answer = (0, -errno.EPERM, -errno.EBUSY, -9999)[how >> 3 & 3]
    operations.pages = [[4096 * n, 4096, "private"] for n in range(how * ROWS_AT_ONCE // 64)]
    control._operations = cast(Any, operations)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    said = bytearray()

    def taken() -> None:
        while True:
            try:
                piece = ours.recv(1 << 20)
            except (BlockingIOError, ConnectionError):
                return
            if not piece:
                return
            said.extend(piece)

    step = (1, 7, 64, 1 << 16)[how & 3]
    sent = data[1:]
    try:
        control._take(theirs)
        for at in range(0, len(sent), step):
            try:
                ours.send(sent[at : at + step])
            except (BrokenPipeError, ConnectionError):
                break
            loop.run(taken)
        ours.shutdown(socket.SHUT_WR)
        loop.run(taken)
    finally:
        ours.close()
        loop.run(lambda: None)
        for client in list(control._clients):
            client.leave_if_gone()
    assert not control._clients, "a client that has gone is kept"
    answers = [json.loads(line) for line in said.splitlines()]
    lines = sent.split(b"\n")
    expected = len(lines) if lines[-1] else len(lines) - 1
    replies = [answer for answer in answers if "ok" in answer]
    assert len(replies) == expected, (len(replies), expected)
    assert all(reply["ok"] or isinstance(reply["error"], str) for reply in replies)
    assert all(len(json.dumps(reply)) < 4 * LONGEST_LINE for reply in replies if not reply["ok"])
    for call in operations.calls:
        if isinstance(call, tuple):
            _, gpa, size = call
            assert 0 <= gpa < 1 << 64 and 0 < size < 1 << 64 and not (gpa | size) % PAGE_SIZE
        else:
            assert call in ("pause", "resume", "quit")


# --- gdb's packets, and a session ---


def _frames() -> list[bytes]:
    words = b"+".join(packets.framed(word) for word in (b"qSupported:a+", b"g", b"m0,10"))
    return [
        b"\1" + words + b"\x03", b"\3--$m#00$#", b"\2$X0,3:}\x03}]a#zz" + packets.framed(b"}]"),
        b"\5noise$a#", b"\1" + packets.framed(packets.escaped(bytes(range(256)))),
    ]  # fmt: skip


@target("gdb-packets", _frames)
def gdb_packets(data: bytes) -> None:
    """A byte for how it comes in pieces, then bytes: the same packets in any pieces, nothing kept
    without bound, and what is escaped is what was before."""
    step = 1 + (data[0] if data else 0) % 64
    stream = data[1:]
    found = []
    for size in (step, max(len(stream), 1)):
        parser = packets.Parser()
        taken: list[object] = []
        for at in range(0, len(stream), size):
            parser.feed(stream[at : at + size])
            for each in parser.take():
                taken.append((each.data, each.intact) if isinstance(each, packets.Packet) else each)
            assert parser.waiting <= packets.LONGEST + 4
        found.append((taken, parser.waiting))
    assert found[0] == found[1]
    assert packets.unescaped(packets.escaped(stream)) == stream
    parser = packets.Parser()
    parser.feed(packets.framed(packets.escaped(stream)))
    (whole,) = parser.take()
    assert isinstance(whole, packets.Packet) and whole.intact
    assert packets.unescaped(whole.data) == stream


_RAM_PAGES = 16
_TABLES = 0x4000
"""Where the vCPU's page tables are: four pages, then what they map."""


class _Vcpu:
    """What X86Debug uses of a vCPU; registers take any value that fits them."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.regs = dict.fromkeys(
            ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11",
             "r12", "r13", "r14", "r15", "rip", "rflags"), 0)  # fmt: skip
        segment = {"selector": 0, "base": 0, "dpl": 0}
        self.sregs: dict[str, Any] = {
            name: dict(segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
        }
        self.sregs |= {name: {"base": 0, "limit": 0} for name in ("gdt", "idt")}
        self.sregs |= {"cr0": 1 << 31 | 1, "cr2": 0, "cr3": _TABLES, "cr4": 0x20, "cr8": 0,
                       "efer": 0x500, "apic_base": 0}  # fmt: skip
        self.fpu = bytes(416)

    def get_regs(self) -> dict[str, int]:
        return dict(self.regs)

    def get_sregs(self) -> dict[str, Any]:
        return self.sregs

    def get_fpu(self) -> bytes:
        return self.fpu

    def set_regs(self, values: Mapping[str, int]) -> None:
        assert all(0 <= value < 1 << 64 for value in values.values())
        self.regs = dict(values)

    def set_fpu(self, data: bytes) -> None:
        assert len(data) == len(self.fpu)
        self.fpu = data

    def update_sregs(self, values: Mapping[str, Any]) -> None:
        if values.get("efer", 0) & 2:
            raise KvmError("KVM_SET_SREGS", errno.EINVAL)
        for name, value in values.items():
            if isinstance(value, dict):
                self.sregs[name].update(value)
            else:
                self.sregs[name] = value

    def set_guest_debug(self, control: int, registers: tuple[int, ...]) -> None:
        assert len(registers) == 8 and all(0 <= value < 1 << 64 for value in registers)


class _Group:
    """vCPUs that stand still whenever they are told to."""

    def __init__(self) -> None:
        self.frozen = True
        self.runners: list[int] = [0, 1]

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self, staying: object) -> None:
        self.frozen = False

    def is_still(self, runner: int) -> bool:
        return self.frozen

    def wait_until_still(self, seconds: float) -> bool:
        return True


def _tables() -> bytes:
    """Page tables that map the first GiB, and the first 8 pages once more at the top."""
    memory = bytearray(_RAM_PAGES * PAGE_SIZE)
    for number, entry in (
        (_TABLES // 8, _TABLES + 0x1007), (_TABLES // 8 + 511, _TABLES + 0x1007),
        (_TABLES // 8 + 512, 0x87), (_TABLES // 8 + 512 + 510, _TABLES + 0x2007),
        (_TABLES // 8 + 1024, _TABLES + 0x3007),
    ):  # fmt: skip
        struct.pack_into("<Q", memory, 8 * number, entry)
    for page in range(8):
        struct.pack_into("<Q", memory, _TABLES + 0x3000 + 8 * page, page * PAGE_SIZE | 7)
    return bytes(memory)


_MEMORY = _tables()
_SECRET = b"PRIVATE!"


def _sessions() -> list[bytes]:
    top = 0xFFFF_FF80_0000_0000

    def session(*words: bytes, patch: bytes = b"") -> bytes:
        return bytes([len(patch)]) + patch + b"\0".join(words)

    return [
        session(b"qSupported:error-message+", b"?", b"qC", b"g", b"p10", b"P10=efbeadde00000000",
                b"qXfer:features:read:target.xml:0,ffb", b"vCont?", b"Hg2", b"T1", b"qfThreadInfo"),
        session(b"m%x,20" % top, b"m1000,2000", b"M1000,3:aabbcc", b"X2000,2:}\x03a", b"m0,9000"),
        session(b"Z0,1000,1", b"m1000,4", b"M0fff,3:010203", b"z0,1000,1", b"Z1,1000,1", b"Z2,8,8",
                b"Z4,10,4", b"z2,8,8", b"s", b"!stop", b"vCont;s:1;c", b"!stop", b"D"),
        session(b"Z0,1000,1", b"Z0,%x,1" % (top + 0x2000), b"c", b"!stop", b"D"),
        session(b"qqemu.PhyMemMode", b"Qqemu.PhyMemMode:1", b"m8000,10", b"mf000,10", b"k", b"D;1"),
        session(*(b"qRcmd," + word.hex().encode() for word in (
            b"why", b"can", b"translate 0x1000", b"states 0", b"states 0x8000 99999", b"help",
            b"physical on"))),
        session(b"G" + b"00" * 300, b"!fault", b"m0,8", patch=patches(
            _MEMORY, _MEMORY[:_TABLES] + b"\xff" * 8 + _MEMORY[_TABLES + 8 :])),
    ]  # fmt: skip


class _ArmVcpu:
    """What Arm64Debug uses of a vCPU, with the MMU on and tables for both halves."""

    def __init__(self, index: int) -> None:
        self.index = index
        system = {"SCTLR_EL1": 1, "TTBR0_EL1": _TABLES, "TTBR1_EL1": _TABLES,
                  "TCR_EL1": 25 | 25 << 16 | 0b10 << 30}  # fmt: skip
        self.registers = {SYSTEM_REGISTERS[name]: value for name, value in system.items()}

    def get_one_reg(self, register: int) -> int:
        return self.registers.get(register, 0)

    def set_one_reg(self, register: int, value: int) -> None:
        assert 0 <= value < 1 << 128
        if register == CORE_REGISTERS["pstate"] and value & 0xF not in (0, 4, 5):
            raise KvmError("KVM_SET_ONE_REG", errno.EINVAL)
        self.registers[register] = value

    def set_guest_debug(self, control: int, breakpoints: Any, watchpoints: Any) -> None:
        assert (len(breakpoints), len(watchpoints)) == (2, 2)
        for pair in (*breakpoints, *watchpoints):
            assert all(0 <= value < 1 << 64 for value in pair)


def _arm64_sessions() -> list[bytes]:
    gib = 1 << 30
    patch = patches(_MEMORY, _MEMORY[:_TABLES] + struct.pack("<Q", gib | 0x401)
                    + _MEMORY[_TABLES + 8 :])  # fmt: skip
    return [
        *_sessions(),
        b"\0" + b"\0".join((
            b"P1f=00" + b"00" * 7, b"Z0,1004,4", b"M1003,3:010203", b"m1000,10", b"z0,1004,4",
            b"Z1,1002,4", b"Z3,8,8", b"P20=0010000000000000", b"s", b"!stop", b"g", b"D")),
        bytes([len(patch)]) + patch + b"\0".join((b"m0,8", b"m%x,8" % gib, b"P21=10000000", b"s")),
    ]  # fmt: skip


@target("gdb-session-arm64", _arm64_sessions, longest=700)
def gdb_session_arm64(data: bytes) -> None:
    """As gdb-session, with a guest of the other architecture."""
    debugged = Arm64Debug(Abilities(*[True] * 8), 2, 2)
    _gdb_session(data, debugged, [_ArmVcpu(0), _ArmVcpu(1)])


@target("gdb-session", _sessions, longest=700)
def gdb_session(data: bytes) -> None:
    _gdb_session(data, X86Debug(Abilities(*[True] * 8), 0), [_Vcpu(0), _Vcpu(1)])


def _gdb_session(data: bytes, debugged: GuestDebug, vcpus: Sequence[object]) -> None:
    """The length of patches and the patches of guest memory (and so of page tables), then packets
    divided by NUL bytes. Private pages are neither read nor written, answers fit their packet, and
    a breakpoint that goes leaves the bytes that were there."""
    size = data[0] if data else 0
    content = patched(_MEMORY, data[1 : 1 + size])
    private = Range(8 * PAGE_SIZE, 4 * PAGE_SIZE)
    secret = _SECRET * (private.size // len(_SECRET))
    shared_side = MemfdBacking(_RAM_PAGES * PAGE_SIZE)
    private_side = MemfdBacking(_RAM_PAGES * PAGE_SIZE)
    memory = GuestMemory((Range(0, _RAM_PAGES * PAGE_SIZE),), shared_side, private_side, [private])
    quits: list[None] = []
    access = DebugAccess(memory, caches_code=debugged.caches_code)
    guest = Target(debugged, vcpus, cast(VcpuGroup, _Group()), access)
    try:
        shared_side.pwrite(content, 0)
        shared_side.pwrite(secret, private.start)
        private_side.pwrite(secret, private.start)
        session = Session(guest, lambda: quits.append(None))
        writes = False
        for word in data[1 + size :].split(b"\0")[:40]:
            if word == b"!stop":
                guest.freeze()
                session.running = False
                continue
            writes |= word[:1] in (b"M", b"X")
            answer = session.answer(word)
            if answer is None:
                continue
            assert len(answer) <= packets.LONGEST, len(answer)
            assert b"$" not in answer and b"#" not in answer
            assert _SECRET.hex().encode() not in answer, "private memory was told"
            if session.detached:
                break
        if not session.detached:
            guest.let_go()
        for side in (shared_side, private_side):
            assert side.pread(private.size, private.start) == secret, "private memory was written"
        if not writes:
            found = shared_side.pread(private.start, 0)
            assert found == content[: private.start], "a breakpoint is left"
    finally:
        guest.close()
        memory.close()


# --- the loader's window of a strict guest ---

_WINDOW, _WINDOW_SIZE = 0x4000, 0x1000
_PORTS = (PORT_FILL, PORT_FILL, PORT_DONE, PORT_FAILED)


def _window_seeds() -> list[bytes]:
    def ask(which: int, value: int, size: int = 2) -> bytes:
        return struct.pack("<BBI", which, size, value)

    return [
        b"".join(ask(0, n) for n in range(5)) + ask(2, 0),
        ask(0, 9), ask(3, 1), ask(3, 0xFFFF_0001), ask(3, 0xFFFF_0002) + ask(0, 0), ask(0, 0, 0),
        ask(8, 0) + ask(0, 1), ask(4, 0) + ask(0, 3),
    ]  # fmt: skip


@target("load-window", _window_seeds)
def load_window(data: bytes) -> None:
    """Records of 6 bytes: port, size, value. The window gets the chunk that was asked for and
    nothing else is written; after the end nothing happens any more."""
    fd = os.memfd_create("image")
    memory = FakeMemory(1 << 16)
    ended: list[str] = []
    try:
        os.write(fd, b"head" + b"f" * _WINDOW_SIZE + b"tail")
        file = FilePart(fd, 4, "vmlinuz")
        parts = [Part("bytes", 0x10_0000, _WINDOW_SIZE + 3, b"b" * _WINDOW_SIZE + b"end"),
                 Part("kernel", 0x20_0000, _WINDOW_SIZE + 4, file)]  # fmt: skip
        chunks = [b"b" * _WINDOW_SIZE, b"end", b"f" * _WINDOW_SIZE, b"tail"]
        window = LoadWindow(memory, lambda: ended.append("loaded"), ended.append)
        window.open(_WINDOW, _WINDOW_SIZE, parts)
        expected = bytearray(memory.size)
        for which, size, value in records(data, "<BBI"):
            was_open, width = window.is_open, (1, 2, 4)[size % 3]
            if which & 4:
                memory.private = [Range(_WINDOW, PAGE_SIZE)] if which & 8 else []
            offset = _PORTS[which % 4]
            before = len(ended)
            window.write(offset, width, value & (1 << 8 * width) - 1)
            if was_open and width == 4 and offset == PORT_FILL and value < 4 and not memory.private:
                expected[_WINDOW : _WINDOW + len(chunks[value])] = chunks[value]
                assert window.is_open
            elif was_open and width == 4:
                assert not window.is_open, "the loader is wrong, and may go on"
            assert memory.peek(memory.size, 0) == expected
            assert len(ended) == before + (was_open and not window.is_open)
            assert all(word.isprintable() for word in ended)
    finally:
        os.close(fd)
        memory.close()


# --- the init's protocol of --exec ---


def _inits() -> list[bytes]:
    def op(port: int, text: bytes) -> bytes:
        return bytes([port, len(text)]) + text

    return [
        op(1, b"out\n") + op(2, b"err") + op(0, b"ended 3 4 3 0\n") + op(3, b""),
        op(0, b"failed no such file\n"), op(0, b"ended 0 0 0 0\nended 1 0 0 0\n"),
        op(0, b"ended 1 9 0 0\n") + op(1, b"123456789"), op(0, b"x" * 200) * 4 + op(0, b"\n"),
        op(0, b"ended -1 a 0 99999999999999999999\n"),
    ]  # fmt: skip


@target("exec-init", _inits)
def exec_init(data: bytes) -> None:
    """Records: a stream (0: the protocol's), a length, bytes. The command's status is passed on
    only once all that it wrote is out; what the guest says is kept within bounds."""
    outcomes: list[Outcome] = []
    files = [os.memfd_create(name) for name in ("in", "out", "err")]
    execution = Execution("true", None, (files[0], files[1], files[2]))
    written = [0, 0]
    try:
        execution.connect(outcomes.append)
        at = 0
        while at + 2 <= len(data):
            which, size = data[at] % 3, data[at + 1]
            piece = data[at + 2 : at + 2 + size]
            at += 2 + size
            if which:
                execution._outputs[which - 1].write(piece)
                written[which - 1] += len(piece)
            else:
                execution._command.write(piece)
                assert len(execution._command._line) <= 512
            if execution._acknowledged:
                assert execution._ended is not None
                told = execution._ended[1:3]
                assert all(b.taken >= n for b, n in zip(execution._outputs, told, strict=False))
        for index in range(2):
            assert os.fstat(files[1 + index]).st_size == written[index]
        final = execution.outcome(Outcome(POWEROFF, "off"))
        assert final.command_status is None or 0 <= final.command_status <= 255
        assert (final.command_status is not None) <= execution._acknowledged
        assert final.reason.isprintable() and len(final.reason) < 1000
        assert len(execution._command._waiting) < 4096
    finally:
        execution.close()
        for fd in files:
            os.close(fd)
