"""Guest memory by read, write and splice: on a guest_memfd's fd, and on the VM's."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvm_bindings import KvmError, System, ioctls
from vmm.host.probes.finding import Finding, broken, no, yes
from vmm.host.probes.memory import outcome
from vmm.host.probes.micro_guest import AREA_SIZE, WORD_AT, Verb, mapped, memory_file

if TYPE_CHECKING:
    from vmm.host.architecture import HostArchitecture

_HOST_WORD, _GUEST_WORD = 0x4F49_4446, 0x5453_4547
_SHARED = ioctls.GUEST_MEMFD_FLAG_MMAP | ioctls.GUEST_MEMFD_FLAG_INIT_SHARED


def guest_memfd_io(architecture: HostArchitecture, system: System) -> Finding:
    """A guest and its host exchange words, the host by pwrite and pread on the guest_memfd."""
    with (
        ExitStack() as opened,
        architecture.micro_guest(system, Verb.EXCHANGE, word=_GUEST_WORD) as guest,
    ):
        try:
            made = opened.enter_context(guest.vm.create_guest_memfd(AREA_SIZE, _SHARED))
        except KvmError as error:
            return no("none", str(error))
        hva = mapped(opened, memory_file(opened, AREA_SIZE), AREA_SIZE)
        guest.vm.set_user_memory_region2(1, guest.area_gpa, AREA_SIZE, hva, made.fd, 0)

        def exchange() -> tuple[int | None, bytes]:
            os.pwrite(made.fd, _HOST_WORD.to_bytes(8, "little"), WORD_AT)
            said = guest.word(guest.run())
            return said, os.pread(made.fd, 8, WORD_AT)

        refused = outcome(lambda: os.pread(made.fd, 8, WORD_AT))
        if refused != "works":
            return no("none", f"pread of a guest_memfd: {refused}", pread=refused)
        return _judged("a guest_memfd", made.fd, WORD_AT, exchange())


def vm_io(architecture: HostArchitecture, system: System) -> Finding:
    """The same on the VM's fd, by guest-physical address; where there is no memory it refuses."""
    with (
        ExitStack() as opened,
        architecture.micro_guest(system, Verb.EXCHANGE, word=_GUEST_WORD) as guest,
    ):
        fd, word_at = guest.vm.fd, guest.area_gpa + WORD_AT
        refused = outcome(lambda: os.pread(fd, 8, word_at))
        if refused not in ("EFAULT", "EACCES"):
            return no("none", f"pread of the VM's fd: {refused}", pread=refused)
        hva = mapped(opened, memory_file(opened, AREA_SIZE), AREA_SIZE)
        guest.vm.set_user_memory_region(1, guest.area_gpa, AREA_SIZE, hva)

        def exchange() -> tuple[int | None, bytes]:
            os.pwrite(fd, _HOST_WORD.to_bytes(8, "little"), word_at)
            said = guest.word(guest.run())
            return said, os.pread(fd, 8, word_at)

        return _judged("the VM's fd", fd, word_at, exchange())


def _judged(what: str, fd: int, word_at: int, seen: tuple[int | None, bytes]) -> Finding:
    said, found = seen
    if said != _HOST_WORD or found != _GUEST_WORD.to_bytes(8, "little"):
        return broken("other bytes", f"{what}: a guest read {said!r}, the host {found.hex()}")
    ends = os.pipe()
    try:
        moved = os.splice(fd, ends[1], 8, offset_src=word_at)
        spliced = moved == 8 and os.read(ends[0], 8) == found
    except OSError:
        spliced = False
    finally:
        os.close(ends[0])
        os.close(ends[1])
    words = "works" if spliced else "does not"
    evidence = f"{what}: the guest found what pwrite wrote, pread what it wrote; splice {words}"
    if not spliced:
        return broken("no splice", evidence)
    return yes("works", evidence)
