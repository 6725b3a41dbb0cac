"""Rule 1: nobody dereferences guest memory.

KVM's mappings of both backings are made inaccessible; then every verb, loading, conversions and
a disk are exercised in full. A dereference by any code would kill the test run, as a child
process proves; source is checked for the means to do it.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm_bindings import fdops
from tests.support.memory import guest_memory, page, pages, pattern
from vmm.conversion.scheme import CbitScheme
from vmm.conversion.transaction import Converter
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE
from vmm.devices.virtio.block import T_IN, T_OUT, VirtioBlock
from vmm.devices.virtio.block_file import open_disk
from vmm.devices.virtio.queue import DESC_NEXT, DESC_WRITE, SplitQueue
from vmm.memory.guest_memory import GuestMemory, LaunchMemory, PageState
from vmm.policy import Policy

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def revoked() -> Iterator[GuestMemory]:
    """64 pages, the upper half private, whose mappings nobody can touch any more."""
    with guest_memory(pages(32, 32)) as memory:
        assert memory.private is not None
        for backing in (memory.shared, memory.private):
            fdops.protect(backing.hva, backing.size, fdops.PROT_NONE)
        yield memory


DEREFERENCE = """
import ctypes, sys
from kvm_bindings import fdops
from vmm.memory.backing import MemfdBacking
backing = MemfdBacking(4096)
backing.pwrite(b"x", 0)
assert ctypes.string_at(backing.hva, 1) == b"x"  # works while the mapping can be touched
if sys.argv[1] == "revoke":
    fdops.protect(backing.hva, 4096, fdops.PROT_NONE)
assert backing.pread(1, 0) == b"x"               # goes on working: no dereference
ctypes.string_at(backing.hva, 1)                 # what the rule forbids
"""


@pytest.mark.parametrize(("mode", "expected"), [("keep", 0), ("revoke", -signal.SIGSEGV)])
def test_dereference_of_a_revoked_mapping_kills_the_process(mode: str, expected: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", DEREFERENCE, mode], cwd=ROOT, timeout=60, check=False
    )

    assert child.returncode == expected


def test_every_host_verb_works_without_the_mapping(revoked: GuestMemory) -> None:
    data = pattern(page(20))
    fd = os.memfd_create("file")
    pieces = [bytearray(100), bytearray(page(20) - 100)]

    revoked.pwrite(data, 5)
    revoked.preadv(pieces, 5)
    moved_out = revoked.transfer_out(5, len(data), fd, 0)
    revoked.pwritev([bytes(50), bytes(page(20) - 50)], 5)
    moved_in = revoked.transfer_in(fd, 0, 5, len(data))

    assert (moved_out, moved_in) == (len(data), len(data))
    assert revoked.pread(len(data), 5) == b"".join(pieces) == data
    os.close(fd)


def test_loading_works_without_the_mapping(revoked: GuestMemory) -> None:
    launch = LaunchMemory(revoked)
    data = pattern(page(40))
    fd = os.memfd_create("image")
    os.pwrite(fd, data, 0)

    launch.pwrite(data, page(20))
    moved = launch.transfer_in(fd, 0, page(20), len(data))

    os.close(fd)
    assert moved == len(data)
    assert revoked.private is not None
    assert revoked.private.pread(page(28), page(32)) == data[page(12) :]


def test_conversions_work_without_the_mapping(revoked: GuestMemory) -> None:
    LaunchMemory(revoked).pwrite(pattern(page(64)), 0)
    converter = Converter(revoked, CbitScheme(38), Policy())

    answers = [
        converter.convert(ConversionRequest(kind, page(16), 32, 0, "test"))
        for kind in (Kind.SHARE, Kind.UNSHARE, Kind.SHARE)
    ]

    assert answers == [0, 0, 0]
    assert revoked.bytes_in(PageState.SHARED) == page(48)
    assert revoked.residency().shared_bytes == page(16)
    assert revoked.residency().private_bytes == page(16)


DESC, AVAIL, USED, HEADER, STATUS, DATA = 0, page(1), page(2), page(3), page(3) + 64, page(8)
_DESCRIPTOR = struct.Struct("<QIHH")


def block_request(
    memory: GuestMemory, block: VirtioBlock, kind: int, sector: int, size: int
) -> int:
    """One request by the ring, as a driver would put it; the status byte."""
    device_writes = DESC_WRITE if kind == T_IN else 0
    queue = SplitQueue(memory, 4, DESC, AVAIL, USED)
    block.activate(memory, {0: queue}, block.features)
    memory.pwrite(struct.pack("<IIQ", kind, 0, sector), HEADER)
    memory.pwrite(
        _DESCRIPTOR.pack(HEADER, 16, DESC_NEXT, 1)
        + _DESCRIPTOR.pack(DATA, size, DESC_NEXT | device_writes, 2)
        + _DESCRIPTOR.pack(STATUS, 1, DESC_WRITE, 0),
        DESC,
    )
    memory.pwrite(b"\xff", STATUS)
    memory.pwrite(struct.pack("<HHH", 0, 1, 0), AVAIL)
    assert block.process(0) is True
    return memory.pread(1, STATUS)[0]


@pytest.mark.parametrize("size", [PAGE_SIZE, 24 * PAGE_SIZE], ids=["buffered", "spliced"])
def test_disk_requests_work_without_the_mapping(
    revoked: GuestMemory, tmp_path: Path, size: int
) -> None:
    image = tmp_path / "disk"
    image.write_bytes(pattern(1 << 20))
    disk = open_disk(str(image))
    block = VirtioBlock(disk, fdops.punch_hole)

    read = block_request(revoked, block, T_IN, 3, size)
    content = revoked.pread(size, DATA)
    written = block_request(revoked, block, T_OUT, 100, size)

    disk.close()
    assert (read, written) == (0, 0)
    assert content == pattern(1 << 20)[3 * 512 : 3 * 512 + size]
    assert image.read_bytes()[100 * 512 : 100 * 512 + size] == content


# The source holds no means to dereference an address either.

FORBIDDEN_MODULES = {"mmap", "ctypes", "cffi", "_cffi_backend", "kvm_bindings._kvm"}
FORBIDDEN_NAMES = {
    "from_buffer",
    "from_buffer_copy",
    "from_address",
    "memmove",
    "string_at",
    "unpack_from_address",
    "ffi",
}
# The vCPU's kvm_run page and the CPUID buffer are no guest memory.
BINDINGS_WITH_POINTERS = {"system.py", "vcpu.py"}
POINTER_CALLS = {"cast", "buffer", "from_buffer", "memmove", "string", "unpack"}


def ways_to_dereference(source: str) -> list[str]:
    """Names of modules and functions in `source` that can turn an address into bytes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in (str(node.module), *names) if name in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_NAMES:
            found.append(node.attr)
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(node.id)
    return found


def test_program_has_no_means_to_dereference_an_address() -> None:
    found = {
        str(path.relative_to(ROOT)): ways
        for path in sorted((ROOT / "vmm").rglob("*.py"))
        if (ways := ways_to_dereference(path.read_text()))
    }

    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import mmap",
        "def late():\n    import ctypes",
        "from mmap import mmap",
        "from kvm_bindings import _kvm",
        "from kvm_bindings._kvm import ffi",
        "ffi.from_buffer(address)",
        "x = something.memmove(a, b, 1)",
    ],
)
def test_means_to_dereference_made_up_is_found(source: str) -> None:
    assert ways_to_dereference(source)


def test_bindings_point_at_nothing_but_kvms_own_structures() -> None:
    users = set()
    for path in sorted((ROOT / "kvm_bindings").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in POINTER_CALLS
                and isinstance(node.value, ast.Name)
                and node.value.id == "ffi"
            ):
                users.add(path.name)

    assert users <= BINDINGS_WITH_POINTERS


def test_c_code_hands_addresses_to_system_calls_only() -> None:
    source = (ROOT / "kvm_bindings" / "bindings.c").read_text()
    code = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)

    assert not re.search(r"\bmem(cpy|move|set|cmp)\b|\bstr\w*\(", code)
    assert not re.search(r"->|\[\s*\w+\s*\]", code)
    assert not re.search(r"(?:=|return|\()\s*\*\s*\w", code), "a pointer is dereferenced"
