"""Who keeps the state of a page: KVM's memory attributes, by VM or by guest_memfd, and the exits
of guests that touch what is not there."""

from __future__ import annotations

import os
from contextlib import ExitStack

from kvm_bindings import KvmError, ioctls
from kvm_bindings.exits import Exit, IoExit, MemoryFaultExit
from kvm_bindings.x86_64 import System
from vmm.machine.probes.cpu import is_done, seen
from vmm.machine.probes.finding import Finding, broken, no, unknown, yes
from vmm.machine.probes.memory import EXCHANGE, VM_TYPES, WORD_AT
from vmm.machine.probes.micro_guest import (
    AREA_GPA,
    AREA_SIZE,
    MicroGuest,
    mapped,
    memory_file,
)
from vmm.machine.schemes import Wanted, try_scheme

_PRIVATE = ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE
_MARKER, _GUEST_WORD = 0x4452_4853, 0x5453_4547
_REGISTERS = {"rdi": AREA_GPA, "rsi": _GUEST_WORD}


def memory_attributes(system: System) -> Finding:
    """Whether a VM type has KVM_SET_MEMORY_ATTRIBUTES, and a guest then meets either side."""
    words = []
    for number, name in VM_TYPES.items():
        try:
            vm = system.create_vm(number)
        except KvmError:
            continue
        with vm:
            offered = vm.check_extension(ioctls.KVM_CAP_MEMORY_ATTRIBUTES)
        words.append(f"KVM_CAP_MEMORY_ATTRIBUTES = {offered:#x} on a {name} VM")
        if offered & _PRIVATE:
            return _two_sides(system, number, "; ".join(words))
    return no("none", "; ".join(words) or "no VM can be created")


def _two_sides(system: System, vm_type: int, word: str) -> Finding:
    """A guest exchanges a word in a shared page, in the same page made private, and shared again:
    it must find the file's word, nothing, and its own."""
    with (
        ExitStack() as opened,
        MicroGuest(system, EXCHANGE, "user", registers=_REGISTERS, vm_type=vm_type) as guest,
    ):
        shared = memory_file(opened, AREA_SIZE)
        os.pwrite(shared, _MARKER.to_bytes(8, "little"), WORD_AT)
        private = opened.enter_context(guest.vm.create_guest_memfd(AREA_SIZE))
        hva = mapped(opened, shared, AREA_SIZE)
        guest.vm.set_user_memory_region2(1, AREA_GPA, AREA_SIZE, hva, private.fd, 0)
        found = []
        for attribute in (0, _PRIVATE, 0):
            guest.vm.set_memory_attributes(AREA_GPA, AREA_SIZE, attribute)
            exit = guest.run()
            if not is_done(exit):
                evidence = f"{word}; a guest's access with attribute {attribute:#x}: {seen(exit)}"
                return broken("faults", evidence, vm_type=vm_type)
            found.append(_value(exit))
    if found != [_MARKER, 0, _GUEST_WORD]:
        evidence = f"{word}; a guest read {', '.join(map(hex, found))} from the two sides"
        return broken("sides mix", evidence, vm_type=vm_type)
    return yes(
        f"on {VM_TYPES[vm_type]} VMs",
        f"{word}; a guest met the guest_memfd in private pages, the memfd in shared ones",
        vm_type=vm_type,
    )


def in_place(system: System) -> Finding:
    """Whether a guest_memfd keeps attributes itself (KVM_SET_MEMORY_ATTRIBUTES2)."""
    wanted = Wanted("in-place", "auto", AREA_SIZE, two_addresses=False, host_loads=False)
    opened = try_scheme(system, "in-place", wanted)
    if isinstance(opened, str):
        return no("none", opened)
    vm, backing = opened
    backing.close()
    vm.close()
    return yes("works", "a page made private was out of the host's reach, and back when shared")


def memory_faults(system: System) -> Finding:
    """KVM_EXIT_MEMORY_FAULT: a guest touches a page of a guest_memfd that is closed, and goes on
    once there is memory."""
    with ExitStack() as opened, MicroGuest(system, EXCHANGE, "user", registers=_REGISTERS) as guest:
        offered = guest.vm.check_extension(ioctls.KVM_CAP_MEMORY_FAULT_INFO)
        word = f"KVM_CAP_MEMORY_FAULT_INFO = {offered}"
        if not offered:
            return no("not offered", word)
        hva = mapped(opened, memory_file(opened, AREA_SIZE), AREA_SIZE)
        try:
            lost = guest.vm.create_guest_memfd(AREA_SIZE, ioctls.GUEST_MEMFD_FLAG_MMAP)
        except KvmError as error:
            evidence = f"{word}: KVM's word alone, as nothing here can provoke one ({error})"
            return unknown(evidence, "offered, not tried", capability=offered)
        with lost:
            guest.vm.set_user_memory_region2(1, AREA_GPA, AREA_SIZE, hva, lost.fd, 0)
        try:
            exit: Exit = guest.run()
        except KvmError as error:
            return broken("fail instead", f"{word}; {error}", capability=offered)
        if not isinstance(exit, MemoryFaultExit):
            evidence = f"{word}; an access to a closed guest_memfd: {seen(exit)}"
            return broken("don't exit", evidence, capability=offered)
        guest.vm.set_user_memory_region(1, 0, 0, 0)
        guest.vm.set_user_memory_region(1, AREA_GPA, AREA_SIZE, hva)
        again = guest.run()
    what = f"{word}; an access to a closed guest_memfd exited with GPA {exit.gpa:#x}"
    if not is_done(again):
        evidence = f"{what}; with memory there: {seen(again)}"
        return broken("can't be answered", evidence, capability=offered)
    return yes("exit, and go on", f"{what}; with memory there it went on", capability=offered)


def _value(exit: Exit) -> int:
    return int.from_bytes(exit.data, "little") if isinstance(exit, IoExit) else -1
