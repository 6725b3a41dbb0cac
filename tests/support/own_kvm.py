"""What the lab's experimental KVM does, tried by system calls: one line of JSON, a word for each.

Run as a program in the lab, `python3 -m tests.support.own_kvm`. "as expected", or what came
instead.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import struct
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

from kvm_bindings import GuestMemfd, PagesInUse, Vm, fdops, ioctls
from kvm_bindings.exits import IoExit
from kvm_bindings.x86_64 import System
from tests.support.private_code import CODE, EXPECTED, in_private_memory
from vmm.arch.x86_64.micro_guest import AREA_GPA, DONE_PORT, MicroGuest
from vmm.arch.x86_64.page_tables import payload_tables
from vmm.conversion.holders import holders
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.host.probes.micro_guest import AREA_SIZE, mapped, memory_file

MMAP, INIT_SHARED = ioctls.GUEST_MEMFD_FLAG_MMAP, ioctls.GUEST_MEMFD_FLAG_INIT_SHARED
PRIVATE = ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE
SW_PROTECTED = 1
_SET2 = 0xC080AED2  # _IOWR(0xAE, 0xd2, 128 bytes)
Check = Callable[[System, ExitStack], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def equal(found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"{found!r}, not {expected!r}")


def refused(attempt: Callable[[], object]) -> str:
    try:
        result = attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return f"{result!r}"


def gmem_on(
    system: System, opened: ExitStack, flags: int, vm_type: int = SW_PROTECTED
) -> tuple[Vm, GuestMemfd]:
    vm = opened.enter_context(system.create_vm(vm_type))
    return vm, opened.enter_context(vm.create_guest_memfd(AREA_SIZE, flags))


# -- own reads ------------------------------------------------------------------------------------


@check
def instructions_in_inaccessible_memory(system: System, opened: ExitStack) -> None:
    for name, code in CODE.items():
        equal(in_private_memory(system, code, attributes=False), EXPECTED[name])


def inaccessible_area(
    system: System, opened: ExitStack, code: bytes, **registers: int
) -> MicroGuest:
    start = {"rdi": AREA_GPA, **registers}
    guest = opened.enter_context(MicroGuest(system, code, "kernel", registers=start, seconds=30.0))
    gmem = opened.enter_context(guest.vm.create_guest_memfd(AREA_SIZE, MMAP))
    hva = mapped(opened, gmem.fd, AREA_SIZE)
    guest.vm.set_user_memory_region2(1, AREA_GPA, AREA_SIZE, hva, gmem.fd, 0)
    return guest


@check
def page_tables_in_inaccessible_memory(system: System, opened: ExitStack) -> None:
    # rep movsb; mov eax, AREA_GPA; mov cr3, rax; xor eax, eax; cpuid; mov eax, ebx; out
    code = b"\xf3\xa4\xb8" + AREA_GPA.to_bytes(4, "little") + b"\x0f\x22\xd8"
    code += b"\x31\xc0\x0f\xa2\x89\xd8\xe7" + bytes([DONE_PORT])
    top = payload_tables([Range(0, AREA_GPA + AREA_SIZE)], 0).cr3
    guest = inaccessible_area(system, opened, code, rcx=PAGE_SIZE, rsi=top)
    equal(guest.word(guest.run()), int.from_bytes(b"Auth", "little"))


@check
def string_io_from_and_to_inaccessible_memory(system: System, opened: ExitStack) -> None:
    # mov byte [rdi], 0x5a; mov rsi, rdi; mov edx, port; mov ecx, 1; rep outsb;
    # mov ecx, 1; rep insb; mov al, [rdi-1]; out port, al
    code = b"\xc6\x07\x5a\x48\x89\xfe\xba" + DONE_PORT.to_bytes(4, "little")
    code += b"\xb9\x01\x00\x00\x00\xf3\x6e\xb9\x01\x00\x00\x00\xf3\x6c\x8a\x47\xff\xe6"
    guest = inaccessible_area(system, opened, code + bytes([DONE_PORT]))
    told = guest.run()
    assert isinstance(told, IoExit), told
    equal(told.data, b"\x5a")
    asked = guest.run()
    assert isinstance(asked, IoExit), asked
    guest.vcpu.answer_io(b"\x77")
    equal(guest.word(guest.run()), 0x77)


# -- in-place conversion --------------------------------------------------------------------------


def set2(gmem: GuestMemfd, *words: int) -> tuple[str, int]:
    """The ioctl itself: what it said, and error_offset."""
    argument = bytearray(struct.pack("=16Q", *words, *[0] * (16 - len(words))))
    try:
        fcntl.ioctl(gmem.fd, _SET2, argument)
    except OSError as error:
        return errno.errorcode[error.errno or 0], struct.unpack("=16Q", argument)[4]
    return "ok", struct.unpack("=16Q", argument)[4]


@check
def arguments_of_conversions(system: System, opened: ExitStack) -> None:
    vm, gmem = gmem_on(system, opened, MMAP | INIT_SHARED)
    wrong = [
        (0, 0, PRIVATE),
        (1, PAGE_SIZE, PRIVATE),
        (0, PAGE_SIZE + 1, PRIVATE),
        (0, PAGE_SIZE, PRIVATE | 1),
        (0, PAGE_SIZE, PRIVATE, 1),
        (0, PAGE_SIZE, PRIVATE, 0, 0, 1),
        (AREA_SIZE, PAGE_SIZE, PRIVATE),
        (0, AREA_SIZE + PAGE_SIZE, PRIVATE),
        (PAGE_SIZE, (1 << 64) - PAGE_SIZE, PRIVATE),
    ]
    for words in wrong:
        equal((words, set2(gmem, *words)), (words, ("EINVAL", 0)))
    equal(set2(gmem, 0, AREA_SIZE, PRIVATE), ("ok", 0))
    equal(refused(lambda: vm.set_memory_attributes(0, PAGE_SIZE, PRIVATE)), "ENOTTY")
    equal(vm.check_extension(ioctls.KVM_CAP_MEMORY_ATTRIBUTES), 0)
    _, plain = gmem_on(system, opened, MMAP | INIT_SHARED, vm_type=0)
    equal(set2(plain, 0, PAGE_SIZE, PRIVATE), ("EINVAL", 0))
    equal(set2(plain, 0, PAGE_SIZE, 0), ("EINVAL", 0))


@check
def host_faults_obey_and_contents_stay(system: System, opened: ExitStack) -> None:
    _, gmem = gmem_on(system, opened, MMAP | INIT_SHARED)
    hva = mapped(opened, gmem.fd, AREA_SIZE)
    scratch = memory_file(opened, PAGE_SIZE)
    os.pwrite(scratch, b"shared at first", 0)
    fdops.pread_to_address(scratch, hva, 15, 0)
    gmem.set_memory_attributes2(0, PAGE_SIZE, PRIVATE)
    equal(refused(lambda: fdops.pwrite_from_address(scratch, hva, 15, 0)), "EFAULT")
    fdops.pread_to_address(scratch, hva + PAGE_SIZE, 15, 0)
    gmem.set_memory_attributes2(0, PAGE_SIZE, 0)
    os.pwrite(scratch, bytes(15), 0)
    fdops.pwrite_from_address(scratch, hva, 15, 0)
    equal(os.pread(scratch, 15, 0), b"shared at first")


@check
def every_second_page_and_back(system: System, opened: ExitStack) -> None:
    _, gmem = gmem_on(system, opened, MMAP | INIT_SHARED)
    pages = range(0, AREA_SIZE, 2 * PAGE_SIZE)
    for offset in pages:
        gmem.set_memory_attributes2(offset, PAGE_SIZE, PRIVATE)
    for offset in pages:
        equal(refused(partial(os.pread, gmem.fd, 1, offset)), "EACCES")
        equal(os.pread(gmem.fd, 1, offset + PAGE_SIZE), b"\0")
    gmem.set_memory_attributes2(0, AREA_SIZE, 0)
    for offset in pages:
        equal(os.pread(gmem.fd, 1, offset), b"\0")


@check
def holders_of_pages_are_respected(system: System, opened: ExitStack) -> None:
    _, gmem = gmem_on(system, opened, MMAP | INIT_SHARED)
    os.pwrite(gmem.fd, b"x" * AREA_SIZE, 0)
    ends = os.pipe()
    for end in ends:
        opened.callback(os.close, end)
    equal(os.splice(gmem.fd, ends[1], PAGE_SIZE, offset_src=3 * PAGE_SIZE), PAGE_SIZE)
    try:
        gmem.set_memory_attributes2(PAGE_SIZE, 8 * PAGE_SIZE, PRIVATE)
    except PagesInUse as busy:
        equal(busy.offset, 3 * PAGE_SIZE)
        (named,) = holders(gmem.fd, busy.offset)
        assert f"{PAGE_SIZE} bytes wait in the pipe" in named, named
    else:
        raise AssertionError("a page in a pipe was made private")
    equal(os.pread(gmem.fd, 1, PAGE_SIZE), b"x")
    os.read(ends[0], PAGE_SIZE)
    gmem.set_memory_attributes2(PAGE_SIZE, 8 * PAGE_SIZE, PRIVATE)
    equal(os.splice(gmem.fd, ends[1], PAGE_SIZE, offset_src=0), PAGE_SIZE)
    stale = 5 * PAGE_SIZE
    equal(set2(gmem, 0, PAGE_SIZE, PRIVATE, 0, stale), ("EAGAIN", 0))
    equal(set2(gmem, 1, PAGE_SIZE, PRIVATE, 0, stale), ("EINVAL", stale))


@check
def reads_past_the_page_cache_are_respected(system: System, opened: ExitStack) -> None:
    size = 32 << 20  # takes the disk a while
    vm = opened.enter_context(system.create_vm(SW_PROTECTED))
    gmem = opened.enter_context(vm.create_guest_memfd(size, MMAP | INIT_SHARED))
    hva = mapped(opened, gmem.fd, size)
    reader = os.fork()
    if not reader:
        disk = os.open("/dev/vda", os.O_RDONLY | os.O_DIRECT)
        while True:
            with suppress(OSError):  # EFAULT while the pages are private
                fdops.pread_to_address(disk, hva, size, 0)
    try:
        named = False
        for _ in range(5000):
            said, offset = set2(gmem, 0, size, PRIVATE)
            if said == "ok":
                gmem.set_memory_attributes2(0, size, 0)
                continue
            equal(said, "EAGAIN")
            who = f"process {reader} "
            found = [words for words in holders(gmem.fd, offset) if words.startswith(who)]
            named = any("pread64" in words and "(O_DIRECT)" in words for words in found)
            if named:
                break
        equal(named, True)
    finally:
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)
    equal(set2(gmem, 0, size, PRIVATE), ("ok", 0))


@check
def buffers_of_an_io_uring_are_respected(system: System, opened: ExitStack) -> None:
    _, gmem = gmem_on(system, opened, MMAP | INIT_SHARED)
    hva = mapped(opened, gmem.fd, AREA_SIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    ring = libc.syscall(425, 2, ctypes.create_string_buffer(120))  # io_uring_setup
    equal(ring >= 0, True)
    vector = struct.pack("=QQ", hva + 2 * PAGE_SIZE, PAGE_SIZE)
    try:
        equal(libc.syscall(427, ring, 0, vector, 1), 0)  # IORING_REGISTER_BUFFERS
        equal(set2(gmem, 0, AREA_SIZE, PRIVATE), ("EAGAIN", 2 * PAGE_SIZE))
        assert any("io_uring" in words for words in holders(gmem.fd, 2 * PAGE_SIZE))
        equal(libc.syscall(427, ring, 1, 0, 0), 0)  # IORING_UNREGISTER_BUFFERS
    finally:
        os.close(ring)
    # The kernel lets go of them a moment later.
    tries = (set2(gmem, 0, AREA_SIZE, PRIVATE) for _ in range(100_000))
    equal(("ok", 0) in tries, True)


# -- read, write, splice --------------------------------------------------------------------------


@check
def reads_and_writes_on_guest_memfd(system: System, opened: ExitStack) -> None:
    _, gmem = gmem_on(system, opened, MMAP | INIT_SHARED)
    equal(os.pread(gmem.fd, 2 * PAGE_SIZE, 0), bytes(2 * PAGE_SIZE))
    equal(fdops.cached_pages(gmem.fd), 0)
    data = os.urandom(3 * PAGE_SIZE)
    equal(os.pwrite(gmem.fd, data, 100), len(data))
    equal(os.pread(gmem.fd, len(data), 100), data)
    hva = mapped(opened, gmem.fd, AREA_SIZE)
    fdops.pread_to_address(gmem.fd, hva + 8 * PAGE_SIZE, 2 * PAGE_SIZE, 0)  # onto itself
    equal(os.pread(gmem.fd, PAGE_SIZE, 8 * PAGE_SIZE), os.pread(gmem.fd, PAGE_SIZE, 0))
    equal(os.pread(gmem.fd, 10, AREA_SIZE), b"")
    equal(os.pread(gmem.fd, 10, AREA_SIZE - 4), bytes(4))
    equal(refused(lambda: os.pwrite(gmem.fd, b"x", AREA_SIZE)), "EINVAL")
    equal(os.pwrite(gmem.fd, b"12345678", AREA_SIZE - 4), 4)
    gmem.set_memory_attributes2(PAGE_SIZE, PAGE_SIZE, PRIVATE)
    equal(len(os.pread(gmem.fd, 2 * PAGE_SIZE, 0)), PAGE_SIZE)
    equal(os.pwrite(gmem.fd, bytes(2 * PAGE_SIZE), 10), PAGE_SIZE - 10)
    equal(refused(lambda: os.pread(gmem.fd, 1, PAGE_SIZE)), "EACCES")
    equal(refused(lambda: os.pwrite(gmem.fd, b"x", PAGE_SIZE)), "EACCES")
    target = memory_file(opened, AREA_SIZE)
    equal(os.sendfile(target, gmem.fd, 2 * PAGE_SIZE, PAGE_SIZE), PAGE_SIZE)
    equal(os.pread(target, PAGE_SIZE, 0), os.pread(gmem.fd, PAGE_SIZE, 2 * PAGE_SIZE))


@check
def splice_into_guest_memfd(system: System, opened: ExitStack) -> None:
    _, gmem = gmem_on(system, opened, MMAP | INIT_SHARED)
    source = memory_file(opened, AREA_SIZE)
    data = os.urandom(2 * PAGE_SIZE)
    os.pwrite(source, data, 0)
    ends = os.pipe()
    for end in ends:
        opened.callback(os.close, end)
    equal(os.splice(source, ends[1], len(data), offset_src=0), len(data))
    equal(os.splice(ends[0], gmem.fd, len(data), offset_dst=5 * PAGE_SIZE), len(data))
    equal(os.pread(gmem.fd, len(data), 5 * PAGE_SIZE), data)


@check
def private_pages_are_filled_once_before_the_first_vcpu(system: System, opened: ExitStack) -> None:
    vm, gmem = gmem_on(system, opened, MMAP)
    data = os.urandom(PAGE_SIZE)
    equal(refused(lambda: os.pwrite(gmem.fd, data[1:], 0)), "EACCES")
    equal(os.pwrite(gmem.fd, data + data, 0), 2 * PAGE_SIZE)
    equal(refused(lambda: os.pwrite(gmem.fd, data, 0)), "EACCES")
    equal(refused(lambda: os.pread(gmem.fd, 1, 0)), "EACCES")
    gmem.set_memory_attributes2(0, PAGE_SIZE, 0)
    equal(os.pread(gmem.fd, PAGE_SIZE, 0), data)
    opened.callback(vm.create_vcpu(0).close)
    equal(refused(lambda: os.pwrite(gmem.fd, data, 4 * PAGE_SIZE)), "EACCES")


@check
def reads_and_writes_on_the_vm(system: System, opened: ExitStack) -> None:
    vm, gmem = gmem_on(system, opened, MMAP | INIT_SHARED)
    memfd = memory_file(opened, AREA_SIZE)
    first, second = 16 << 20, (16 << 20) + AREA_SIZE
    vm.set_user_memory_region(0, first, AREA_SIZE, mapped(opened, memfd, AREA_SIZE))
    hva = mapped(opened, gmem.fd, AREA_SIZE)
    vm.set_user_memory_region2(1, second, AREA_SIZE, hva, gmem.fd, 0)
    data = os.urandom(2 * PAGE_SIZE)
    at = second - PAGE_SIZE
    equal(os.pwrite(vm.fd, data, at), len(data))
    equal(os.pread(vm.fd, len(data), at), data)
    equal(os.pread(memfd, PAGE_SIZE, AREA_SIZE - PAGE_SIZE), data[:PAGE_SIZE])
    equal(os.pread(gmem.fd, PAGE_SIZE, 0), data[PAGE_SIZE:])
    equal(refused(lambda: os.pread(vm.fd, 1, 0)), "EFAULT")
    equal(refused(lambda: os.pwrite(vm.fd, b"x", second + AREA_SIZE)), "EFAULT")
    equal(len(os.pread(vm.fd, 8 * PAGE_SIZE, second + AREA_SIZE - PAGE_SIZE)), PAGE_SIZE)
    gmem.set_memory_attributes2(0, PAGE_SIZE, PRIVATE)
    equal(os.pread(vm.fd, len(data), at), data[:PAGE_SIZE])
    equal(refused(lambda: os.pread(vm.fd, 1, second)), "EACCES")
    target = memory_file(opened, AREA_SIZE)
    equal(os.sendfile(target, vm.fd, at, PAGE_SIZE), PAGE_SIZE)
    equal(os.pread(target, PAGE_SIZE, 0), data[:PAGE_SIZE])
    # Another process with the fd, whose own address space is another one.
    child = os.fork()
    if child == 0:
        os.pwrite(vm.fd, b"from a child", first)
        os._exit(0)
    os.waitpid(child, 0)
    equal(os.pread(memfd, 12, 0), b"from a child")


def main() -> None:
    results = {}
    with System() as system:
        for name, function in CHECKS.items():
            with ExitStack() as opened:
                try:
                    function(system, opened)
                    results[name] = "as expected"
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[1]
                    results[name] = f"line {where.lineno}: {type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    main()
