"""What is said by processes that pyvmm doesn't believe, and by files that take their place: a
device's process, a back end of vhost-user, a snapshot."""

from __future__ import annotations

import hashlib
import json
import os
import select
import socket
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kvm_bindings import KvmError
from tests.fuzz.attacked import _surprised
from tests.fuzz.drawing import Choices, recorded
from tests.fuzz.storm import Guest
from tests.fuzz.targets.registry import scratch_folder, target
from tests.support.back_end import FEATURES, disk_config, reply
from tests.support.device_process import READY, SECTORS, ByHand, DiskRig
from tests.support.virtio_machine import MEMORY, VirtioMachine
from vmm.core import thread_signals
from vmm.core.disk_image import SECTOR
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.core.saved import BadState, restored
from vmm.devices.process import protocol
from vmm.devices.process.protocol import HEAD, words
from vmm.devices.vhost_user import messages
from vmm.devices.vhost_user.block import VhostUserBlock
from vmm.devices.vhost_user.channel import BackEndError, Channel
from vmm.devices.vhost_user.device import Wires
from vmm.devices.vhost_user.messages import PROTOCOL_F_CONFIG, PROTOCOL_F_MQ, Region
from vmm.devices.virtio.block import T_FLUSH, T_IN, T_OUT
from vmm.snapshot.folder import MAGIC, VERSION, packed, unpacked

CANARY = b"\xc5CANARY!"
_STEPS = 40
_MOST_ACCESSES = 3 * protocol.MOST_PIECES + 64
"""Of guest memory, for one message."""

# --- a device's process ---


class _Process(DiskRig):
    """A disk whose process says what the input has it say."""

    def __init__(self, folder: Path, batching: bool) -> None:
        super().__init__(folder, ByHand(), batching=batching)
        self.generation = 0
        self.private = Range(MEMORY // 2, 16 * PAGE_SIZE)
        self.secret = CANARY * (self.private.size // len(CANARY))
        self.memory.poke(self.secret, self.private.start)
        self.memory.private = [self.private]
        self.machine.transport._unexpected = _surprised  # type: ignore[method-assign]

    def drain(self) -> None:
        """Take what the process is told."""
        assert isinstance(self.processes, ByHand)
        far = self.processes.far
        while far is not None and select.select([far], [], [], 0)[0]:
            packet = far.recv(protocol.LONGEST + 1)
            if not packet:
                return
            assert HEAD.size <= len(packet) <= protocol.LONGEST
            _, _, _, self.generation = HEAD.unpack_from(packet)
            assert CANARY not in packet, "private memory was told"

    def tell(self, packet: bytes) -> None:
        assert isinstance(self.processes, ByHand)
        if self.processes.far is not None:
            self.memory.calls.clear()
            try:
                self.raw(packet)
            except OSError:
                return  # too long for the socket, or ended meanwhile
            assert sum(self.memory.calls.values()) <= _MOST_ACCESSES
        self.drain()

    def begin(self) -> None:
        """The process has taken up what it was told."""
        self.drain()
        self.tell(HEAD.pack(protocol.DONE, 0, 0, self.generation))

    def check(self) -> None:
        assert self.memory.peek(self.private.size, self.private.start) == self.secret
        content = self.disk()
        assert CANARY not in content
        assert os.fstat(self.fd).st_size == SECTORS * SECTOR, "the disk has grown"
        assert len(self.device._kicked | self.device._again) <= 1


_SAYS = (
    protocol.READ, protocol.READ, protocol.WRITE, protocol.WRITE, protocol.MOVE_IN,
    protocol.MOVE_OUT, protocol.MOVE_OUT, protocol.TURN, protocol.TURN, protocol.DONE,
    protocol.CONFIG, protocol.STOPPED, protocol.ANSWER, 99, protocol.RETURN, protocol.RETURN,
)  # fmt: skip


def _place(choices: Choices) -> int:
    return int(choices.choice((
        0x1000, 0x8000, MEMORY // 2 - 8, MEMORY // 2, MEMORY - 16, MEMORY, (1 << 64) - 8,
        choices.getrandbits(20),
    )))  # fmt: skip


def _size(choices: Choices) -> int:
    usual, edges = (512, 8, 16, 1), (0, 4096, 65536, 65537, 1 << 20, (1 << 64) - 1)
    return int(choices.choice(usual if choices.random() < 0.85 else edges))


def _body(choices: Choices, what: int) -> bytes:
    """Mostly what belongs to a message of that kind."""
    if choices.random() < 0.15:
        return choices.randbytes(choices.choice((0, 1, 7, 8, 24, 4096)))
    count = choices.choice((1, 1, 2, 3, 40))
    if what == protocol.READ:
        return words([n for _ in range(count) for n in (_place(choices), _size(choices))])
    if what in (protocol.MOVE_IN, protocol.MOVE_OUT):
        moves: list[int] = []
        for _ in range(count):
            disk = choices.choice((0, 0, 512, 1024, SECTORS * SECTOR - 512, SECTORS * SECTOR))
            ends = (disk, _place(choices))
            moves += [*(ends if what == protocol.MOVE_IN else ends[::-1]), _size(choices)]
        return words(moves)
    if what == protocol.RETURN:
        numbers = [choices.choice((0, 1, 2, 16, 0xFFFF)) for _ in range(3)]
        looks = choices.choice((0, 1, protocol.MOST_LOOKS, protocol.MOST_LOOKS + 1))
        queue = choices.choice((*(0,) * 8, 1))
        counts = _body(choices, protocol.TURN).ljust(protocol.COUNTS.size)
        number = choices.choice((0, 1, 255))
        head = protocol.RETURNED.pack(queue, *numbers, looks, number, counts)
        return head + _body(choices, protocol.WRITE)
    if what == protocol.WRITE:
        sizes = [choices.choice((1, 8, 16)) for _ in range(count)]
        pieces = [n for size in sizes for n in (_place(choices), size)]
        moves = [0, _place(choices), 512] if choices.random() < 0.3 else []
        then = [_place(choices), 8] if choices.random() < 0.3 else []
        head = protocol.WRITE_HEAD.pack(len(moves) // 3, len(pieces) // 2, len(then) // 2)
        return head + words(moves + pieces + then) + choices.randbytes(sum(sizes))
    if what == protocol.TURN:
        return protocol.COUNTS.pack(*(choices.getrandbits(8) for _ in range(5)))
    return choices.randbytes(choices.choice((60, 60, 0, 300)))


def _talk(choices: Choices) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with scratch_folder() as folder:
        rig = _Process(Path(folder), choices.random() < 0.5)
        try:
            if choices.random() < 0.9:
                rig.tell(READY)
                rig.machine.up()
                rig.begin()
            for _ in range(_STEPS):
                if choices.spent:
                    break
                _step(rig, choices)
                rig.check()
            rig.machine.settle()
        finally:
            rig.close()
            os.close(rig.fd) if _is_open(rig.fd) else None
    assert len(os.listdir("/proc/self/fd")) <= before, "a file stays open"


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _step(rig: _Process, choices: Choices) -> None:
    assert isinstance(rig.processes, ByHand)
    if rig.processes.far is None and choices.random() < 0.6:
        rig.device.restart()
        rig.tell(READY)
        rig.begin()
    kind = choices.randrange(10)
    if kind == 0 and rig.machine.queues:
        if rig.machine._next < MEMORY // 2 - 8192:
            request = choices.choice((T_IN, T_OUT, T_FLUSH))
            data = rig.machine.blank(512) if request == T_IN else rig.machine.place(bytes(512))
            rig.request(request, choices.randrange(SECTORS + 2), *[data][: request != T_FLUSH])
        rig.serve()
    elif kind == 1:
        rig.machine.driver.status = 0
        rig.machine._next = 0x40000
        if choices.random() < 0.8:
            rig.machine.up()
        if choices.random() < 0.8:
            rig.begin()
    elif kind == 2 and choices.random() < 0.3:
        rig.processes.end(0)
        rig.machine.settle()
    elif kind == 3 and choices.random() < 0.3:
        rig.device.restart()
        rig.tell(READY)
    elif kind == 4 and rig.timers:
        rig.timers.pop(choices.randrange(len(rig.timers)))[1]()
    else:
        what = choices.choice(_SAYS)
        stale = 0 if choices.random() < 0.9 else choices.choice((1, -1))
        flags, queue = choices.choice((0, 1, 2, 3, 255)), choices.choice((*(0,) * 8, 1, 0xFFFF))
        generation = (rig.generation + stale) & 0xFFFF_FFFF
        rig.tell(HEAD.pack(what, flags, queue, generation) + _body(choices, what))
    rig.machine.settle()
    rig.drain()


def _talks() -> list[bytes]:
    return [recorded(_talk, seed, first=b"\0\0", most=900) for seed in range(10)]


@target("device-process", _talks, longest=1024, runs=20)
def device_process(data: bytes) -> None:
    """A disk's process says anything, lives and dies, while the guest uses and resets the disk. It
    never has private memory or more than the disk, and an ended process costs the guest errors."""
    _talk(Choices(data))


# --- a back end of vhost-user ---

_USER = 1 << 40


def _at_once(channel: Channel, patience: float = 0) -> None:
    """Nothing is waited for: what isn't there yet never comes."""
    channel._deadline = 0.0


class _BackEnds:
    """Connections whose other ends have said already what they will say."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self.ends: list[socket.socket] = []

    def connect(self) -> socket.socket:
        choices = self._choices
        if choices.random() < 0.05:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.ends.append(theirs)
        features = FEATURES if choices.random() < 0.9 else choices.getrandbits(64)
        protocols = PROTOCOL_F_MQ | PROTOCOL_F_CONFIG
        number = messages.U64.pack
        config = messages.config_request(60)[:12]
        sectors = 2048 if choices.random() < 0.9 else choices.getrandbits(64)
        for request, payload in (
            (messages.GET_FEATURES, number(features)),
            (messages.GET_PROTOCOL_FEATURES, number(protocols)),
            (messages.GET_QUEUE_NUM, number(choices.choice((4, 4, 4, 1, 0)))),
            (messages.GET_CONFIG, config + disk_config(sectors)),
        ):
            self.say(request, payload)
        return ours

    def say(self, request: int, payload: bytes) -> None:
        """An answer, now and then a wrong one."""
        choices = self._choices
        kind = 0 if choices.random() < 0.9 else choices.randrange(5)
        data = reply(request, payload)
        if kind == 1:
            data = choices.randbytes(len(data))
        elif kind == 2:
            data = data[: choices.randrange(len(data))]
        elif kind == 3:
            data = struct.pack("=III", request, choices.getrandbits(32), choices.getrandbits(32))
        elif kind == 4:
            data += data
        try:
            self.ends[-1].send(data)
        except OSError:
            return

    def hear(self) -> None:
        """What the last of them was sent, descriptors included."""
        if not self.ends or self.ends[-1].fileno() < 0:
            return
        try:
            while True:
                data, fds, _, _ = socket.recv_fds(self.ends[-1], 1 << 16, 64)
                for fd in fds:
                    os.close(fd)
                if not data:
                    return
        except OSError:
            return

    def close(self) -> None:
        for end in self.ends:
            end.close()


def _serve_elsewhere(choices: Choices) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        stack.enter_context(patch.object(Channel, "begin", _at_once))
        # What a restart does on a thread of its own is done on this one.
        stack.enter_context(patch.object(thread_signals, "leave_signals_to_the_main_thread"))
        back_ends = _BackEnds(choices)
        stack.callback(back_ends.close)
        try:
            device = VhostUserBlock("blk0", "/nowhere", back_ends.connect, 1)
        except BackEndError as error:
            assert str(error).isprintable()
        else:
            _use(choices, device, back_ends, stack)
    assert len(os.listdir("/proc/self/fd")) <= before, "a file stays open"


def _use(choices: Choices, device: VhostUserBlock, back_ends: _BackEnds, stack: ExitStack) -> None:
    machine = VirtioMachine(device)
    machine.transport._unexpected = _surprised  # type: ignore[method-assign]
    private = Range(MEMORY // 2, 16 * PAGE_SIZE)
    secret = CANARY * (private.size // len(CANARY))
    machine.memory.poke(secret, private.start)
    machine.memory.private = [private]
    kick, call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    for fd in (kick, call):
        stack.callback(os.close, fd)
    stack.callback(machine.close)
    regions = [Region(0, MEMORY, _USER, 0)]
    wires = Wires(machine.memory._fd, regions, [kick], [call], lambda: None, lambda: None)
    device.wire(wires)
    device.start()
    for _ in range(_STEPS):
        if choices.spent:
            break
        kind = choices.randrange(9)
        if kind == 0:
            _offer(machine, choices)
            os.eventfd_write(kick, 1)
        elif kind == 1:
            back_ends.say(messages.GET_VRING_BASE, messages.vring_state(0, choices.getrandbits(16)))
            machine.driver.status = 0
            machine._next = 0x40000
            if choices.random() < 0.8:
                machine.up(features=None)
        elif kind == 2 and machine.queues:
            # The back end's own writes: the used ring is shared memory.
            used = machine.queues[0].used
            data = struct.pack("<HH", 0, choices.randrange(20))
            data += struct.pack("<II", choices.randrange(20), choices.getrandbits(32))
            machine.memory.poke(data, used)
            os.eventfd_write(call, 1)
        elif kind == 3 and machine.queues:
            # The guest's, at a moment that is as bad as any.
            machine.memory.poke(choices.randbytes(4), machine.queues[0].avail)
            if choices.random() < 0.3:
                machine.memory.private = [private, Range(machine.queues[0].used & -4096, 4096)]
        elif kind == 4 and choices.random() < 0.4:
            back_ends.ends[-1].close()  # there is one: the device was greeted
        elif kind == 5 and device._back_end is None:
            machine.memory.private = [private]
            device._restarting = True
            device._restart()
        elif kind == 6:
            back_ends.say(choices.choice((messages.GET_VRING_BASE, 77)), choices.randbytes(8))
        back_ends.hear()
        machine.settle()
        assert machine.memory.peek(private.size, private.start) == secret
        told = json.dumps(device.as_dict())
        assert len(told) < 4096
    lost = device._back_end is None and bool(machine.queues)
    assert lost or machine.transport is not None


def _offer(machine: VirtioMachine, choices: Choices) -> None:
    if not machine.queues or machine._next > MEMORY // 2 - 8192:
        return
    header = machine.place(struct.pack("<IIQ", choices.choice((T_IN, T_OUT)), 0, 0))
    pieces = [header, machine.blank(512), machine.blank(1)][: choices.choice((3, 3, 3, 1))]
    machine.give(0, *pieces)


def _conversations() -> list[bytes]:
    good = b"\xff\0\0\0" + bytes(4)  # all that is said at first is right
    whole = [recorded(_serve_elsewhere, seed, first=good) for seed in range(8)]
    return [*whole, *(recorded(_serve_elsewhere, seed) for seed in range(4))]


@target("vhost-user", _conversations, runs=60)
def vhost_user(data: bytes) -> None:
    """A back end answers right and wrong, ends, is followed by others, and writes to the rings that
    it shares with the guest: it costs the guest errors, and pyvmm nothing."""
    _serve_elsewhere(Choices(data))


# --- a snapshot ---


def _guest(stack: ExitStack, folder: str) -> Guest:
    return Guest(Choices(b""), Path(folder), stack)


def _states() -> list[bytes]:
    """Of a machine that was just made, and of ones that were in use."""
    made = []
    for seed in range(3):
        with scratch_folder() as folder, ExitStack() as stack:
            guest = _guest(stack, folder)
            guest.rng = Choices(bytes((seed * n) & 0xFF for n in range(400)))
            for _ in range(seed * 60):
                guest.access()
            made.append(b"\0" + json.dumps(guest.wired.state(1.0), separators=(",", ":")).encode())
    whole = packed({"a": 1})
    return [*made, b"\1" + whole, b"\1" + whole[:-1], b"\1" + whole.replace(b" 1 ", b" 2 ", 1)]


@target("snapshot", _states, longest=8192, runs=20)
def snapshot(data: bytes) -> None:
    """0 and the JSON of a board with its devices, whose checksum is made right, or 1 and a whole
    file: it is refused with a line, or the machine goes on and can be saved again as it is."""
    try:
        if data[:1] == b"\1":
            state = unpacked(data[1:], "state")
            state.names()
            return
        text = data[1:]
        line = f"{MAGIC} {VERSION} {hashlib.sha256(text).hexdigest()} {len(text)}\n".encode()
        saved = unpacked(line + text, "state")
    except BadState as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    with scratch_folder() as folder, ExitStack() as stack:
        guest = _guest(stack, folder)
        try:
            restored(saved, guest.wired.restore)
            guest.wired.resume()
        except (BadState, KvmError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            return
        guest.rng = Choices(text[::-1][:200])
        now = guest.wired.state(1.0)
        assert _timeless(_again(now)) == _timeless(now)
        for _ in range(20):
            guest.access()


def _timeless(state: dict[str, Any]) -> dict[str, Any]:
    """Without what goes on by itself: the power management timer, and the generation of each
    configuration, which a restore makes another one."""
    found: dict[str, Any] = json.loads(json.dumps(state))
    del found["board"]["pm"]["timer_ns"]
    for device in found["virtio"]:
        del device["transport"]["generation"]
    return found


def _again(state: dict[str, Any]) -> dict[str, Any]:
    """A state, restored in another machine and saved there."""
    with scratch_folder() as folder, ExitStack() as stack:
        guest = _guest(stack, folder)
        restored(unpacked(packed(state), "again"), guest.wired.restore)
        guest.wired.resume()
        found: dict[str, Any] = json.loads(json.dumps(guest.wired.state(1.0)))
        return found
