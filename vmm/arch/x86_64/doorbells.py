"""How an x86 guest asks for conversions: the hypercall, decoded only, and the doorbells' names.

Nothing here validates a range or decides anything: what the guest said becomes a request as it
stands. The registers behind the port are vmm.devices.doorbell.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmm.core.events import ConversionRequest, Kind

KVM_HC_MAP_GPA_RANGE = 12  # include/uapi/linux/kvm_para.h
HYPERCALL_NAME = "hypercall"
PORT_NAME = "port"

# Documentation/virt/kvm/x86/hypercalls.rst: attributes of KVM_HC_MAP_GPA_RANGE.
_PAGE_SIZE_CODES = 0xF  # bits 3:0, a hint: 0 = 4 KiB, 1 = 2 MiB, 2 = 1 GiB, no others defined
_LARGEST_PAGE_SIZE_CODE = 2
_ENCRYPTED = 1 << 4

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
