"""A guest whose code the host cannot read, and what its instructions do there.

Run as a program in the lab (on a VM type with memory attributes): one JSON object on stdout, what
each of EXPECTED's instructions did. KVM that needs to read the instruction, in order to step over
it or to emulate it, finds the shared side at its address, which holds something else.
"""

from __future__ import annotations

import json
import os
import struct
from contextlib import ExitStack

from kvm_bindings import ioctls
from kvm_bindings.exits import HypercallExit, IoExit
from kvm_bindings.x86_64 import System
from kvm_bindings.x86_64 import ioctls as x86
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.micro_guest import AREA_GPA, DONE_PORT, MicroGuest
from vmm.host.probes.micro_guest import AREA_SIZE, mapped, memory_file, seen

_MARK = 0x0100_0000
_ADD_MARK = b"\x05" + _MARK.to_bytes(4, "little")  # add eax, _MARK
_OUT_EAX = b"\xe7" + bytes([DONE_PORT])  # out DONE_PORT, eax
_MAP_GPA_RANGE, _ATTRIBUTES = 12, 0x10  # KVM_HC_MAP_GPA_RANGE, "encrypted"
CODE = {
    # xor eax, eax; cpuid; mov eax, ebx
    "cpuid": b"\x31\xc0\x0f\xa2\x89\xd8",
    # mov ecx, 0xc0000080 (EFER); rdmsr
    "rdmsr": b"\xb9\x80\x00\x00\xc0\x0f\x32",
    # mov eax, 12; mov ebx, AREA_GPA; mov ecx, 1; mov edx, 0x10; vmmcall
    "vmmcall": struct.pack(
        "<BIBIBIBI3s",
        0xB8,
        _MAP_GPA_RANGE,
        0xBB,
        AREA_GPA,
        0xB9,
        1,
        0xBA,
        _ATTRIBUTES,
        b"\x0f\x01\xd9",
    ),
}
_ANSWER = 77
EXPECTED = {
    "cpuid": int.from_bytes(b"Auth", "little") + _MARK,
    "rdmsr": 0x500 + _MARK,  # LMA, LME
    "vmmcall": [[_MAP_GPA_RANGE, AREA_GPA, 1, _ATTRIBUTES], _ANSWER + _MARK],
}
"""On hosts where KVM need not read the instructions: AMD's name, long mode, the call's answer."""

# rep movsb; mov eax, AREA_GPA; jmp rax
_COPY_AND_GO = b"\xf3\xa4\xb8" + AREA_GPA.to_bytes(4, "little") + b"\xff\xe0"


def in_private_memory(system: System, code: bytes, *, attributes: bool = True) -> object:
    """What the guest's `out` says; before it, a hypercall's arguments. Else what came instead.

    The code is private by attribute, or on a default VM in a guest_memfd that the host can't reach.
    """
    code += _ADD_MARK + _OUT_EAX
    start = _COPY_AND_GO.ljust(16, b"\x90") + code
    registers = {"rsi": layout.PAYLOAD_GPA + 16, "rdi": AREA_GPA, "rcx": len(code)}
    with (
        ExitStack() as opened,
        MicroGuest(
            system, start, "kernel", registers=registers, vm_type=int(attributes), seconds=30.0
        ) as guest,
    ):
        # IMUL with 7 bytes, wherever one begins: who reads the code here steps over _MARK too.
        shared = memory_file(opened, AREA_SIZE)
        os.pwrite(shared, b"\x69" * 4096, 0)
        flags = 0 if attributes else ioctls.GUEST_MEMFD_FLAG_MMAP
        private = opened.enter_context(guest.vm.create_guest_memfd(AREA_SIZE, flags))
        hva = mapped(opened, shared, AREA_SIZE)
        guest.vm.set_user_memory_region2(1, AREA_GPA, AREA_SIZE, hva, private.fd, 0)
        if attributes:
            private_attribute = ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE
            guest.vm.set_memory_attributes(AREA_GPA, AREA_SIZE, private_attribute)
        guest.vm.enable_cap(x86.KVM_CAP_EXIT_HYPERCALL, 1 << _MAP_GPA_RANGE)
        exit = guest.run()
        called = None
        if isinstance(exit, HypercallExit):
            called = [exit.number, *exit.args[:3]]
            guest.vcpu.answer_hypercall(_ANSWER)
            exit = guest.run()
        if not isinstance(exit, IoExit) or exit.port != DONE_PORT:
            return seen(exit)
        value = int.from_bytes(exit.data, "little")
        return value if called is None else [called, value]


def main() -> None:
    with System() as system:
        print(json.dumps({name: in_private_memory(system, code) for name, code in CODE.items()}))


if __name__ == "__main__":
    main()
