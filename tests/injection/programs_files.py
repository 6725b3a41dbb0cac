"""Programs to inject errors into: disks, guest memory, snapshots."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvm_bindings import KvmError, fdops, mapped
from tests.injection.arming import SIZE, failing, pattern
from tests.injection.row import (
    CALLER,
    GUEST,
    RESET,
    SAME,
)
from tests.support.virtio_driver import NEEDS_RESET
from tests.support.virtio_machine import VirtioMachine
from vmm.cli import ctl_saving
from vmm.control import saving
from vmm.control.memory_file.guest_file import GuestFile
from vmm.core.errors import OutputError, UsageError
from vmm.core.ranges import Range
from vmm.core.saved import BadState
from vmm.devices.virtio.block import T_DISCARD, T_WRITE_ZEROES, VirtioBlock
from vmm.devices.virtio.block_file import ReadAhead, open_disk
from vmm.devices.virtio.read_ahead import holes
from vmm.memory.backings.mapped import MappedBacking
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory
from vmm.snapshot.folder import SnapshotFolder, checksums, new_file, new_folder, packed

# -- a disk ---------------------------------------------------------------------------------------


def _disk_request(folder: Path, kind: int) -> tuple[str, bytes]:
    """One request over sectors 8 to 15; what came of it, and what the disk holds there."""
    path = folder / "disk"
    path.write_bytes(pattern(SIZE))
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
        pattern(SIZE)[: 8 * 512] + pattern(SIZE)[16 * 512 :]
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
    path.write_bytes(bytes(SIZE))
    os.truncate(path, 64 * SIZE)
    fd = os.open(path, os.O_RDONLY)
    with failing():
        found = holes(fd, 0, 64 * SIZE)
    os.close(fd)
    assert found == [] or not error, "it guesses"
    return SAME


def advice(folder: Path, error: int) -> str:
    """Looks ahead of a disk's reads, and drops what was read ahead."""
    path = folder / "disk"
    path.touch()
    os.truncate(path, 64 * SIZE)
    fd = os.open(path, os.O_RDONLY)
    ahead = ReadAhead(fd)
    with failing():
        ahead.look(0)
    os.close(fd)
    return SAME


# -- guest memory ---------------------------------------------------------------------------------


class _Readable(MappedBacking):
    """A memfd that is accessed as guest_memfd-mmap is."""

    name = "readable"
    is_guest_memfd = False
    traits = MemfdBacking.traits

    def __init__(self) -> None:
        fd = os.memfd_create("readable")
        os.ftruncate(fd, SIZE)
        super().__init__(fd, SIZE)

    def resident_bytes(self, offset: int = 0, size: int = 0) -> int:
        return os.fstat(self.fd).st_blocks * 512


def readable(folder: Path, error: int) -> str:
    """Writes and reads through /proc/self/mem."""
    backing, data = _Readable(), pattern(10_000)
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
    backing, data, file = _Readable(), pattern(10_000), folder / "file"
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
    backing, data = _Readable(), pattern(10_000)
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
    memory = GuestMemory([Range(0, SIZE)], MemfdBacking(SIZE))
    file, data = GuestFile(memory), pattern(10_000)
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


def snapshot(folder: Path, error: int) -> str:
    """Memory and state into a new folder, and back."""
    size = 300_000
    backing, data, place = MemfdBacking(1 << 20), pattern(size), folder / "snapshot"
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
    note = b"VMCOREINFO\0" + pattern(5000)

    def ask(request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        os.writev(files[0], [bytes(4096), note])
        return {"ok": True, "pages": [[0, 8192, "shared"]], "vcpus": [], "offset": 4096, "alias": 0}

    try:
        with failing():
            ctl_saving.carried_out(lambda: ctl_saving.dump(ask, str(folder / "core")))
    except (OutputError, UsageError) as refused:
        assert os.strerror(error) in str(refused)
        assert os.listdir(folder) == [], "something was left behind"
        return CALLER
    content = (folder / "core").read_bytes()
    assert content.startswith(b"\x7fELF") and content.endswith(note)
    return SAME


def restore(folder: Path, error: int) -> str:
    """The state and memory of a snapshot are read."""
    place = folder / "snapshot"
    data = pattern(8192)
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
