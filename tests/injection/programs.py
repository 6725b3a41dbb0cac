"""Parts of pyvmm that no guest on this machine's KVM drives, as programs to inject errors into.

`python -m tests.injection.programs NAME ERRNO` does one thing while its calls fail, and prints
which of the table's outcomes came of it, or what is wrong. More names and errnos go on with the
next of the environment's rules each.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvm_bindings import KvmError, fdops, mapped
from tests.injection import taps
from tests.injection.injecting import FIRST, SHORT, arm
from tests.injection.table import CALLER, DROPPED, EAGAIN, EINTR, ENDS_3, GUEST, RESET, SAME
from tests.support.back_end import BackEndDouble
from tests.support.consoles import Consoles
from tests.support.control import Server, line
from tests.support.virtio_driver import NEEDS_RESET
from tests.support.virtio_machine import VirtioMachine
from tests.support.vsock_guest import HOST_PORT, Guest, dial
from tests.unit.devices.process.test_console_process import ConsoleRig
from tests.unit.devices.process.test_vsock_process import VsockRig
from tests.unit.devices.test_virtio_net import HEADER, Network
from vmm.cli import ctl_saving
from vmm.control import saving
from vmm.control.memory_file.guest_file import GuestFile
from vmm.core import unix_listener
from vmm.core.errors import HostError, OutputError, UsageError
from vmm.core.ranges import Range
from vmm.core.saved import BadState
from vmm.devices.vhost_user.channel import BackEndError, Channel
from vmm.devices.vhost_user.device import VERSION_1, greet
from vmm.devices.vhost_user.messages import PROTOCOL_F_CONFIG, PROTOCOL_F_MQ
from vmm.devices.virtio.block import T_DISCARD, T_WRITE_ZEROES, VirtioBlock
from vmm.devices.virtio.block_file import open_disk
from vmm.devices.virtio.net import RX, TX, VirtioNet
from vmm.devices.virtio.net_backend import Tap
from vmm.devices.virtio.read_ahead import holes
from vmm.devices.virtio.vsock_packet import Op
from vmm.memory.backings.mapped import MappedBacking
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory
from vmm.snapshot.folder import SnapshotFolder, checksums, new_file, new_folder, packed

_SIZE = 1 << 16
_rule = 0
"""Which of the environment's rules is meant."""
_ARMED = ctypes.c_int.in_dll(ctypes.CDLL(None), "pyvmm_shim_armed")


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Within the block calls fail as the environment says (see shim.c)."""
    _ARMED.value = _rule + 2
    try:
        yield
    finally:
        _ARMED.value = 0


@contextlib.contextmanager
def failing_everywhere() -> Iterator[None]:
    """As `failing`, and in all processes that were started here."""
    counts = os.open(os.environ["PYVMM_INJECT_COUNTS"], os.O_WRONLY | os.O_CLOEXEC)
    try:
        arm(counts, FIRST + _rule)
        yield
    finally:
        arm(counts, 0)
        os.close(counts)


def _pattern(size: int) -> bytes:
    return bytes(range(1, 252)) * (size // 251) + bytes(range(1, 1 + size % 251))


# -- a disk ---------------------------------------------------------------------------------------


def _disk_request(folder: Path, kind: int) -> tuple[str, bytes]:
    """One request over sectors 8 to 15; what came of it, and what the disk holds there."""
    path = folder / "disk"
    path.write_bytes(_pattern(_SIZE))
    block = VirtioBlock(open_disk(str(path)), fdops.punch_hole)
    machine = VirtioMachine(block)
    machine.up()
    header = machine.place(struct.pack("<IIQ", kind, 0, 0))
    ranges = machine.place(struct.pack("<QII", 8, 8, 0))
    status = machine.blank(1)
    machine.give(0, header, ranges, status)
    with failing():
        machine.kick(0)
    said, errors = machine.text(status, 1)[0], block.statistics.errors
    stopped = machine.driver.status & NEEDS_RESET
    machine.close()
    content = path.read_bytes()
    assert content[: 8 * 512] + content[16 * 512 :] == (
        _pattern(_SIZE)[: 8 * 512] + _pattern(_SIZE)[16 * 512 :]
    ), "other sectors have changed"
    if stopped:
        return RESET, b""
    assert (said, errors) in ((0, 0), (1, 1)), f"status {said} with {errors} errors"
    return (GUEST if said else SAME), content[8 * 512 : 16 * 512]


def discard(folder: Path, error: int) -> str:
    said, content = _disk_request(folder, T_DISCARD)
    done = content == bytes(4096)
    assert said != SAME or done or error, "nothing was discarded"
    return said


def zeroes(folder: Path, error: int) -> str:
    said, content = _disk_request(folder, T_WRITE_ZEROES)
    assert said != SAME or content == bytes(4096), "the zeroes are not there"
    return said


def read_ahead(folder: Path, error: int) -> str:
    """Looks for the file's holes; without knowing, nothing is done about them."""
    path = folder / "disk"
    path.write_bytes(bytes(_SIZE))
    os.truncate(path, 64 * _SIZE)
    fd = os.open(path, os.O_RDONLY)
    with failing():
        found = holes(fd, 0, 64 * _SIZE)
    os.close(fd)
    assert found == [], "it guesses"
    return SAME


# -- guest memory ---------------------------------------------------------------------------------


class _Readable(MappedBacking):
    """A memfd that is accessed as guest_memfd-mmap is."""

    name = "readable"
    is_guest_memfd = False
    traits = MemfdBacking.traits

    def __init__(self) -> None:
        fd = os.memfd_create("readable")
        os.ftruncate(fd, _SIZE)
        super().__init__(fd, _SIZE)

    def resident_bytes(self, offset: int = 0, size: int = 0) -> int:
        return os.fstat(self.fd).st_blocks * 512


def readable(folder: Path, error: int) -> str:
    """Writes and reads through /proc/self/mem."""
    backing, data = _Readable(), _pattern(10_000)
    try:
        with failing():
            backing.pwrite(data, 100)
            back = backing.pread(len(data), 100)
    except OSError as refused:
        assert refused.errno == error
        return CALLER
    assert back == data
    return SAME


def readable_disk(folder: Path, error: int) -> str:
    """A disk's transfers with that mapping as the buffer."""
    backing, data, file = _Readable(), _pattern(10_000), folder / "file"
    file.write_bytes(data)
    fd = os.open(file, os.O_RDWR)
    try:
        with failing():
            assert backing.transfer_in(fd, 0, 4096, len(data)) == len(data)
            assert backing.transfer_out(4096, len(data), fd, 5000) == len(data)
    except OSError as refused:
        assert refused.errno == error
        return CALLER
    assert file.read_bytes() == data[:5000] + data
    return SAME


def process_vm(folder: Path, error: int) -> str:
    """Writes and reads a protected guest's way."""
    backing, data = _Readable(), _pattern(10_000)
    pieces = [backing.hva + 10, 4000, backing.hva + 8192, 6000]
    try:
        with failing():
            written = mapped.write_mapped(pieces, data)
            back, true = mapped.read_mapped(pieces, len(data))
    except KvmError as refused:
        assert refused.errno == error
        return CALLER
    if (written, true) != (len(data), len(data)):
        both = min(written, true)
        assert back[:both] == data[:both]
        return CALLER  # short: the next byte is out of reach
    assert back == data
    return SAME


def memory_file(folder: Path, error: int) -> str:
    memory = GuestMemory([Range(0, _SIZE)], MemfdBacking(_SIZE))
    file, data = GuestFile(memory), _pattern(10_000)
    back = bytearray(len(data))
    try:
        with failing():
            assert file.write(memoryview(data), 300, None) == len(data)
            assert file.read_into(memoryview(back), 300, None) == len(data)
    except OSError as refused:
        assert refused.errno == error
        assert file.counts["bytes_read"] == 0
        return CALLER
    assert back == data
    assert (file.counts["bytes_written"], file.counts["bytes_read"]) == (len(data), len(data))
    return SAME


# -- who connects ---------------------------------------------------------------------------------


def control(folder: Path, error: int) -> str:
    unix_listener.AGAIN_SECONDS = 0.01
    server = Server(folder / "control")
    try:
        with failing(), socket.socket(socket.AF_UNIX) as caller:
            caller.setblocking(True)
            caller.connect(str(server.path))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                caller.sendmsg([line("status")])
            answered = _line_of(caller)
        assert server.ask(line("status"))[0]["ok"], "the next caller isn't served"
    finally:
        server.stop()
    return SAME if answered else CALLER


def _line_of(caller: socket.socket) -> bool:
    """Whether a whole line comes; False where the other side hangs up."""
    data = b""
    try:
        while not data.endswith(b"\n"):
            piece = os.read(caller.fileno(), 4096)
            if not piece:
                return False
            data += piece
    except ConnectionResetError:
        return False
    return True


# -- devices --------------------------------------------------------------------------------------


def _frames(
    machine: VirtioMachine, device: VirtioNet, arrive: Callable[[], None], front: bytes = b""
) -> str | None:
    """A frame from the guest, and one for it; what came of the second, None where it came."""
    machine.up()
    buffer = machine.blank(200)
    machine.give(RX, buffer)
    machine.kick(RX)
    machine.give(TX, machine.place(HEADER + front + b"from the guest"))
    with failing():
        machine.kick(TX)
        arrive()
    machine.loop.pass_time()  # a host without memory is tried again in a moment
    machine.settle()
    if machine.driver.status & NEEDS_RESET:
        return RESET
    assert len(machine.queues[TX].collect()) == 1, "its buffer was not given back"
    came = machine.queues[RX].collect()
    return None if came and b"for the guest" in machine.text(buffer, 200) else DROPPED


def net(folder: Path, error: int) -> str:
    network = Network()
    said = _frames(network.machine, network.device, lambda: network.arrive(b"for the guest"))
    sent = network.sent()
    network.close()
    if said is None:
        assert network.device.statistics.bytes_read == len(b"for the guest")
    if sent != [b"from the guest"]:
        said = said or DROPPED
        assert network.device.statistics.errors
    return said or SAME


def tap(folder: Path, error: int) -> str:
    """The tap's end is a socket that keeps frames apart, as a tap does."""
    ours, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    outside.setblocking(False)
    backend = Tap.__new__(Tap)
    backend.fd = ours.detach()
    backend.features = 0  # TUNSETOFFLOAD is for taps alone
    backend.set_offloads = lambda features: None  # type: ignore[method-assign]
    device = VirtioNet(backend, bytes(6))
    machine = VirtioMachine(device)

    def arrive() -> None:
        outside.sendmsg([HEADER + b"for the guest"])
        machine.settle()

    said = _frames(machine, device, arrive)
    try:
        sent = outside.recvmsg(200)[0][len(HEADER) :]
    except BlockingIOError:
        sent = b""
    machine.close()
    outside.close()
    if sent != b"from the guest":
        assert device.statistics.errors
        said = said or DROPPED
    return said or SAME


def tap_start(folder: Path, error: int) -> str:
    """An interface that can't be had."""
    taps.enter()
    try:
        with failing():
            taps.Tap(taps.NAME).close()
    except HostError as refused:
        assert taps.NAME in str(refused) and os.strerror(error) in str(refused)
        return ENDS_3
    return SAME


def tap_offloads(folder: Path, error: int) -> str:
    """Offloads that were agreed on, and that the interface then doesn't take."""
    taps.enter()
    machine = VirtioMachine(VirtioNet(taps.Tap(taps.NAME), bytes(6)))
    with failing():
        machine.up()
    stopped = machine.driver.status & NEEDS_RESET
    machine.close()
    return RESET if stopped else SAME


def real_tap(folder: Path, error: int) -> str:
    taps.enter()
    device = VirtioNet(taps.Tap(taps.NAME), bytes(6))
    machine = VirtioMachine(device)
    network = taps.Network()

    def arrive() -> None:
        network.send(b"for the guest")
        machine.settle()

    said = _frames(machine, device, arrive, taps.FRAME)
    came = network.came()
    network.close()
    machine.close()
    if came != [b"from the guest"]:
        assert device.statistics.errors
        said = said or DROPPED
    return said or SAME


def tap_deleted(folder: Path, error: int) -> str:
    """The interface goes away under way: nothing is injected, the kernel says EBADFD."""
    taps.enter()
    device = VirtioNet(taps.Tap(taps.NAME), bytes(6))
    machine = VirtioMachine(device)
    said = _frames(machine, device, taps.delete, taps.FRAME)
    assert not device.config()[6], "the link is up"
    assert not machine.loop.run_ready(), "it is waited for still"
    machine.close()
    return said or SAME


def vsock_call(folder: Path, error: int) -> str:
    """The guest connects to a program of the host."""
    guest = Guest(folder / "v")
    guest.up()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder / 'v'}_{HOST_PORT}")
        listener.listen()
        with failing():
            guest.say(Op.REQUEST)
        answer = guest.ops()
        stopped = guest.machine.driver.status & NEEDS_RESET
        guest.machine.close()
    if stopped:
        return RESET
    return {Op.RST: GUEST, Op.RESPONSE: SAME}[Op(answer[0])]


def vsock(folder: Path, error: int) -> str:
    """Data both ways on a connection that a program of the host has made."""
    guest = Guest(folder / "v")
    guest.up()
    with dial(folder / "v") as client:
        client.setblocking(True)
        port = guest.called_by(client)
        client.setblocking(False)
        client.sendmsg([b"to the guest"])
        with failing():
            guest.machine.settle()
            guest.say(Op.RW, b"from the guest", host_port=port)
            guest.machine.settle()
        guest.machine.settle()
        heard = guest.heard()
        stopped = guest.machine.driver.status & NEEDS_RESET
        try:
            taken = client.recvmsg(100)[0]
        except OSError:
            taken = b""
        guest.machine.close()
    if stopped:
        return RESET
    if any(header.op == Op.RST for header, _ in heard):
        return GUEST
    assert b"".join(data for _, data in heard) == b"to the guest"
    assert taken == b"from the guest"
    return SAME


def console_file(folder: Path, error: int) -> str:
    """Output to a FIFO, which can be full."""
    path = folder / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    consoles = Consoles(f"file={path}")
    consoles.up()
    consoles.open(0)
    machine = consoles.machine
    machine.give(1, machine.place(b"some output"))
    with failing():
        machine.kick(1)
    machine.settle()
    stopped = machine.driver.status & NEEDS_RESET
    assert len(machine.queues[1].collect()) == 1, "its buffer was not given back"
    statistics = machine.device.statistics
    machine.close()
    came = os.readv(reader, [data := bytearray(100)])
    if stopped:
        return RESET
    if data[:came] == b"some output":
        return SAME
    assert statistics.errors or statistics.bytes_written in (0, came)
    return DROPPED


def console_pty(folder: Path, error: int) -> str:
    """Input from a terminal."""
    consoles = Consoles("pty")
    consoles.up()
    consoles.open(0)
    machine = consoles.machine
    buffer = machine.blank(100)
    machine.give(0, buffer)
    machine.kick(0)
    slave = machine.device._ports[0].backend._slave  # type: ignore[attr-defined]
    os.writev(slave, [b"typed"])
    with failing():
        machine.settle()
    machine.settle()
    more = machine.blank(100)
    machine.give(0, more)
    machine.kick(0)
    sizes = [size for _, size in machine.queues[0].collect()]
    came = machine.text(buffer, sizes[0]) + (machine.text(more, sizes[1]) if sizes[1:] else b"")
    stopped = machine.driver.status & NEEDS_RESET
    machine.close()
    if stopped:
        return RESET
    return SAME if came == b"typed" else DROPPED


# -- back ends of vhost-user, snapshots -----------------------------------------------------------


def vhost_user(folder: Path, error: int) -> str:
    """The greeting; the back end, which is in this process, hears and answers by other calls."""
    double = _BackEnd()
    link = Channel(double.connect())
    link.begin(10)
    try:
        with failing():
            found = greet(link, PROTOCOL_F_MQ, PROTOCOL_F_CONFIG)
    except BackEndError:
        return CALLER
    finally:
        link.close()
        double.end()
    assert found.features & VERSION_1
    return SAME


class _BackEnd(BackEndDouble):
    """Whose calls are none of those that fail."""

    def connect(self) -> socket.socket:
        self.socket = _Other(fileno=self.socket.detach())
        return super().connect()


class _Other(socket.socket):
    def recv(self, size: int, flags: int = 0) -> bytes:
        return os.read(self.fileno(), size)

    def recvmsg(self, size: int, room: int = 0, flags: int = 0) -> Any:
        return super().recvmsg(size, room, flags | socket.MSG_WAITALL)

    def sendall(self, data: Any, flags: int = 0) -> None:
        os.write(self.fileno(), data)


def snapshot(folder: Path, error: int) -> str:
    """Memory and state into a new folder, and back."""
    size = 300_000
    backing, data, place = MemfdBacking(1 << 20), _pattern(size), folder / "snapshot"
    backing.pwrite(data, 0)
    try:
        with failing(), new_folder(str(place)) as making:
            fd = new_file(making, "memory")
            for part in (Range(0, 10_000), Range(10_000, size - 10_000)):
                saving._move(backing, part, fd, 0)
            sums = checksums(fd, [[0, size]])
            os.close(fd)
            fd = new_file(making, "state")
            ctl_saving._write(fd, packed({"memory": sums}), 0)
            os.close(fd)
    except (OSError, UsageError) as refused:
        assert isinstance(refused, UsageError) or refused.errno == error
        assert os.listdir(folder) == [], "something was left behind"
        return CALLER
    assert (place / "memory").read_bytes() == data
    return SAME


def dump(folder: Path, error: int) -> str:
    """A core file, whose memory the running pyvmm has written."""
    note = b"VMCOREINFO\0" + _pattern(5000)

    def ask(request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        os.writev(files[0], [bytes(4096), note])
        return {"ok": True, "pages": [[0, 8192, "shared"]], "vcpus": [], "offset": 4096, "alias": 0}

    try:
        with failing():
            ctl_saving.carried_out(lambda: ctl_saving.dump(ask, str(folder / "core")))
    except OutputError as refused:
        assert os.strerror(error) in str(refused)
        assert os.listdir(folder) == [], "something was left behind"
        return CALLER
    content = (folder / "core").read_bytes()
    assert content.startswith(b"\x7fELF") and content.endswith(note)
    return SAME


def restore(folder: Path, error: int) -> str:
    """The state and memory of a snapshot are read."""
    place = folder / "snapshot"
    data = _pattern(8192)
    with new_folder(str(place)) as making:
        fd = new_file(making, "memory")
        os.pwrite(fd, data, 0)
        (Path(making) / "state").write_bytes(packed({"memory": checksums(fd, [[0, 8192]])}))
        os.close(fd)
    try:
        with failing():
            saved = SnapshotFolder(str(place))
            found = list(saved.contents(saved.state, "memory"))
    except (OSError, BadState):
        return CALLER
    assert [piece for _, piece in found] == [data]
    return SAME


# -- vsock and consoles in processes of their own -------------------------------------------------


def dialed(folder: Path, error: int) -> str:
    """The guest connects to a program of the host: the spawner does, and hands it over."""
    rig = VsockRig(folder / "v")
    rig.up()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder / 'v'}_{HOST_PORT}")
        listener.listen()
        with failing_everywhere():
            rig.say(Op.REQUEST)
            answer = rig.hears_op()
    rig.close()
    return {Op.RST: GUEST, Op.RESPONSE: SAME}[Op(answer)]


def called(folder: Path, error: int) -> str:
    """A program of the host connects to a guest whose vsock has a process."""
    unix_listener.AGAIN_SECONDS = 0.01
    rig = VsockRig(folder / "v")
    rig.up()
    with dial(folder / "v") as client, dial(folder / "v") as other:
        with failing_everywhere():
            with contextlib.suppress(BrokenPipeError):
                client.send(b"CONNECT 1234\n")
            while not (came := rig.heard()) and not _ready(client.fileno(), rig.machine):
                rig.machine.settle()
        rig.called(other)  # who comes next is served
        said = SAME if came else CALLER
        assert came or not _line_of(client)
    rig.close()
    return said


def _ready(fd: int, machine: VirtioMachine) -> bool:
    """Wait until that fd, or one of the machine's, can be read; whether it is that one."""
    ready, _, _ = select.select([fd, *machine.loop.wanted], [], [], 10)
    assert ready, "nothing comes"
    return fd in ready


def console_process(folder: Path, error: int) -> str:
    path = folder / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    rig = ConsoleRig(f"file={path}")
    rig.up()
    rig.open(0)
    rig.machine.give(1, rig.machine.place(b"some output"))
    with failing_everywhere():
        rig.machine.kick(1)
        rig.answered(1)
        while error in (EINTR, EAGAIN, SHORT) and not _ready(reader, rig.machine):
            rig.machine.settle()  # its process isn't done yet
    rig.close()
    came = os.readv(reader, [data := bytearray(100)])
    return SAME if data[:came] == b"some output" else DROPPED


PROGRAMS: dict[str, Callable[[Path, int], str]] = {
    "discard": discard,
    "zeroes": zeroes,
    "read-ahead": read_ahead,
    "readable": readable,
    "readable-disk": readable_disk,
    "process-vm": process_vm,
    "memory-file": memory_file,
    "control": control,
    "net": net,
    "tap": tap,
    "real-tap": real_tap,
    "tap-start": tap_start,
    "tap-offloads": tap_offloads,
    "tap-deleted": tap_deleted,
    "vsock-call": vsock_call,
    "vsock": vsock,
    "console-file": console_file,
    "console-pty": console_pty,
    "vhost-user": vhost_user,
    "snapshot": snapshot,
    "dialed": dialed,
    "called": called,
    "console-process": console_process,
    "dump": dump,
    "restore": restore,
}


def main(*words: str) -> None:
    """NAME ERRNO, and so on: for each a line."""
    global _rule
    for name, error in zip(words[::2], words[1::2], strict=True):
        with tempfile.TemporaryDirectory(prefix="pyvmm-") as folder:
            try:
                said = PROGRAMS[name](Path(folder), int(error))
            except Exception as wrong:
                traceback.print_exc()
                said = f"wrong: {wrong!r}".replace("\n", " ")
        print(said, flush=True)
        _rule += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
