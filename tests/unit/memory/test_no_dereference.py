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
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from kvm_bindings import fdops
from tests.support.disk_machine import BAR, DiskMachine, every_kind_of_request_works
from tests.support.fake_memory import FakeMemory
from tests.support.memory import guest_memory, page, pages, pattern
from tests.support.virtio_driver import VirtioPciDriver
from vmm.conversion.schemes.cbit import CbitScheme
from vmm.conversion.transaction import Converter
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE
from vmm.devices.bus import PortBus
from vmm.devices.pci import PciBus, host_bridge
from vmm.devices.virtio.block import (
    VirtioBlock,
)
from vmm.devices.virtio.block_file import open_disk
from vmm.devices.virtio.pci_transport import VirtioPciTransport
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
from vmm.memory.backings.memfd import MemfdBacking
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


class GuestSide:
    """Guest memory as the driver of tests/support writes and reads it, on the shared side."""

    def __init__(self, memory: GuestMemory) -> None:
        self._shared = memory.shared

    def poke(self, data: bytes, gpa: int) -> None:
        self._shared.pwrite(data, gpa)

    def peek(self, size: int, gpa: int) -> bytes:
        return self._shared.pread(size, gpa)


@pytest.fixture
def disk_machine(revoked: GuestMemory, tmp_path: Path) -> Iterator[DiskMachine]:
    """A virtio-blk disk of 1 MiB whose guest memory nobody can touch."""
    path = tmp_path / "disk"
    path.write_bytes(pattern(1 << 20))
    disk = open_disk(f"{path},serial=R1")
    ports = PortBus()
    pci = PciBus(ports)
    block = VirtioBlock(disk, fdops.punch_hole)
    transport = VirtioPciTransport(block, revoked, lambda: None, bar_base=BAR, interrupt_line=5)
    pci.add(0, host_bridge())
    pci.add(1, transport.function)
    guest = cast(FakeMemory, GuestSide(revoked))
    driver = VirtioPciDriver(pci, ports, guest, 1)
    made = DiskMachine(guest, ports, pci, block, transport, driver, path)
    yield made
    disk.close()


@pytest.mark.parametrize("size", [PAGE_SIZE, 16 * PAGE_SIZE], ids=["buffered", "spliced"])
def test_disk_requests_of_every_kind_work_without_the_mapping(
    disk_machine: DiskMachine, size: int
) -> None:
    every_kind_of_request_works(disk_machine, size)


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
BINDINGS_WITH_POINTERS = {
    "system.py", "vcpu.py", "x86_64/system.py", "x86_64/vcpu.py", "x86_64/vm.py",
    "aarch64/vcpu.py", "datapath.py", "mapped.py", "virtqueue.py",
}  # fmt: skip
"""The last three: their callers' buffers, and their own."""
POINTER_CALLS = {"cast", "buffer", "from_buffer", "memmove", "string", "unpack"}

LIBFUSE = {
    "vmm/control/memory_file/libfuse.py": ["ctypes", "from_buffer", "from_address"],
    "vmm/control/memory_file/place.py": ["ctypes"],
}
"""Its own buffers, which it hands to its callbacks, and umount2(2): no guest memory."""


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

    assert found == LIBFUSE


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
    for path in sorted((ROOT / "kvm_bindings").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in POINTER_CALLS
                and isinstance(node.value, ast.Name)
                and node.value.id == "ffi"
            ):
                users.add(path.relative_to(ROOT / "kvm_bindings").as_posix())

    assert users <= BINDINGS_WITH_POINTERS


def _code(name: str) -> str:
    source = (ROOT / "kvm_bindings" / name).read_text()
    return re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)


def test_chains_are_followed_in_copies_only() -> None:
    """No system call, and no address that comes out of a number."""
    code = _code("virtqueue.c")

    called = set(re.findall(r"\b([a-z_]\w*)\(", code)) - {"for", "while", "if", "switch"}
    ours = {name for name in called if name.startswith("pyvmm_")}
    assert called - ours == {"memcpy", "memset", "descriptor_at", "head_at"}
    assert not re.search(r"uintptr_t|\*\)\s*\(?u?int64", code)


def test_protected_memory_is_reached_by_copying_system_calls_only() -> None:
    code = _code("mapped.c")

    called = set(re.findall(r"\b([a-z_]\w*)\(", code)) - {"for", "while", "if", "switch"}
    ours = {name for name in called if name.startswith("pyvmm_")}
    assert called - ours - {"nanoseconds"} == {
        *("getpid", "process_vm_readv", "process_vm_writev", "pread", "pwrite"),
        *("fcntl", "fstat", "fstatfs"),
    }
    # Guest memory is the local side; the other one is pinned, which destroys a private page.
    for arguments in re.findall(r"process_vm_\w+\((.*?), 0\)", code):
        assert re.fullmatch(r"getpid\(\), &?local, \w+, &(remote|own), 1", arguments), arguments


@pytest.mark.parametrize("name", ["observed_memory.py", "backings/protected_memfd.py"])
def test_protected_memory_knows_no_call_that_destroys_pages(name: str) -> None:
    source = (ROOT / "vmm" / "memory" / name).read_text()
    forbidden = ("splice", "sendfile", "/proc/self/mem", "punch_hole", "copy_file_range", "fork")

    tree = ast.parse(source)
    words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value
    }

    assert not [word for word in forbidden if word in words]


def test_c_code_hands_addresses_to_system_calls_only() -> None:
    code = _code("bindings.c")

    assert not re.search(r"\bmem(cpy|move|set|cmp)\b|\bstr\w*\(", code)
    assert not re.search(r"->|\[\s*\w+\s*\]", code)
    assert not re.search(r"(?:=|return|\()\s*\*\s*\w", code), "a pointer is dereferenced"
