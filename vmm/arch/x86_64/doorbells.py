"""How an x86 guest asks for conversions: the hypercall and the port registers, decoded only.

Neither doorbell validates a range or decides anything: both turn what the guest wrote into a
request as it stands, and the port block keeps the answer until the guest reads it.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import NamedTuple

from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SHIFT

KVM_HC_MAP_GPA_RANGE = 12  # include/uapi/linux/kvm_para.h
HYPERCALL_NAME = "hypercall"
PORT_NAME = "port"

# Documentation/virt/kvm/x86/hypercalls.rst: attributes of KVM_HC_MAP_GPA_RANGE.
_PAGE_SIZE_CODES = 0xF  # bits 3:0, a hint: 0 = 4 KiB, 1 = 2 MiB, 2 = 1 GiB, no others defined
_LARGEST_PAGE_SIZE_CODE = 2
_ENCRYPTED = 1 << 4

_U32 = 0xFFFF_FFFF
_U64 = 0xFFFF_FFFF_FFFF_FFFF


def decode_map_gpa_range(args: Sequence[int], vcpu: int) -> ConversionRequest:
    """KVM_HC_MAP_GPA_RANGE(gpa, pages, attributes) as a request; `args` are a0, a1, a2, ...

    The page size is a hint about the mapping to use, `pages` counts 4 KiB pages whatever it
    says: a defined code changes nothing, an undefined one is handed on in `reserved` together
    with bits 63:5, which must be zero.
    """
    gpa, pages, attributes = args[0] & _U64, args[1] & _U64, args[2] & _U64
    reserved = attributes & ~(_PAGE_SIZE_CODES | _ENCRYPTED)
    if attributes & _PAGE_SIZE_CODES > _LARGEST_PAGE_SIZE_CODE:
        reserved |= attributes & _PAGE_SIZE_CODES
    kind = Kind.UNSHARE if attributes & _ENCRYPTED else Kind.SHARE
    return ConversionRequest(kind, gpa, pages, vcpu, HYPERCALL_NAME, reserved)


class HostCheck(NamedTuple):
    """The payload asks the VMM to verify and replace a pattern in `size` bytes from `gpa`."""

    gpa: int
    size: int
    vcpu: int


class Failure(NamedTuple):
    """The payload reports that it failed, with a code of its own."""

    code: int
    vcpu: int


Command = ConversionRequest | HostCheck | Failure

REG_FRAME, REG_PAGES, REG_COMMAND, REG_RESULT, REG_FAILURE = 0x00, 0x04, 0x08, 0x0C, 0x10
COMMAND_SHARE, COMMAND_UNSHARE, COMMAND_HOST_CHECK = 1, 2, 3
DOORBELL_ID = int.from_bytes(b"VMMB", "little")
REGISTER_SIZE = 4


class _Latches:
    """One vCPU's registers, so that two vCPUs can ring at the same time."""

    __slots__ = ("frame", "pages", "result")

    def __init__(self) -> None:
        self.frame = 0
        self.pages = 0
        self.result = 0


def _as_u32(result: int) -> int:
    """0 or a negative errno as the guest reads it: two's complement."""
    return result & _U32


class PortDoorbell:
    """The port register block; a write that completes a command hands the command back.

    +0x00 first guest frame number (rw)     +0x04 number of 4 KiB pages (rw)
    +0x08 write: command, read: DOORBELL_ID +0x0c result of the last command (read)
    +0x10 failure code (write)

    Registers are 32 bits wide: accesses of another size or alignment read all ones and write
    nothing. With `conversions` False (an ordinary VM) only the failure register works.
    """

    def __init__(self, vcpus: int, *, conversions: bool = True) -> None:
        self._latches = [_Latches() for _ in range(vcpus)]
        self._conversions = conversions

    def read(self, vcpu: int, offset: int, size: int) -> int:
        """What the guest's vCPU `vcpu` reads; all ones where there is no register."""
        ones = (1 << 8 * size) - 1
        if size != REGISTER_SIZE or not self._conversions:
            return ones
        latches = self._latches[vcpu]
        registers = {
            REG_FRAME: latches.frame,
            REG_PAGES: latches.pages,
            REG_COMMAND: DOORBELL_ID,
            REG_RESULT: latches.result,
        }
        return registers.get(offset, ones)

    def write(self, vcpu: int, offset: int, size: int, value: int) -> Command | None:
        """Take a register write; the command it completes, if any.

        A conversion or host check is to be answered with `answer` before the vCPU goes on.
        """
        if size != REGISTER_SIZE:
            return None
        value &= _U32
        if offset == REG_FAILURE:
            return Failure(value, vcpu) if value else None
        if not self._conversions:
            return None
        latches = self._latches[vcpu]
        if offset == REG_FRAME:
            latches.frame = value
        elif offset == REG_PAGES:
            latches.pages = value
        elif offset == REG_COMMAND:
            return self._command(vcpu, latches, value)
        return None

    def _command(self, vcpu: int, latches: _Latches, code: int) -> Command | None:
        gpa = latches.frame << PAGE_SHIFT
        if code in (COMMAND_SHARE, COMMAND_UNSHARE):
            # A VMM that forgets to answer must not report success.
            latches.result = _as_u32(-errno.EIO)
            kind = Kind.SHARE if code == COMMAND_SHARE else Kind.UNSHARE
            return ConversionRequest(kind, gpa, latches.pages, vcpu, PORT_NAME)
        if code == COMMAND_HOST_CHECK:
            latches.result = _as_u32(-errno.EIO)
            return HostCheck(gpa, latches.pages << PAGE_SHIFT, vcpu)
        latches.result = _as_u32(-errno.ENOSYS)
        return None

    def answer(self, vcpu: int, result: int) -> None:
        """Give `vcpu` the result of its last command: 0 or a negative error number."""
        self._latches[vcpu].result = _as_u32(result)
