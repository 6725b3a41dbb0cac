"""The Realm Services Interface: what a realm asks its monitor, decoded from registers.

Arm Realm Management Monitor specification 1.0 (DEN0137), chapter B5; function numbers as in Linux'
arch/arm64/include/asm/rsi_smc.h. Everything is hostile here: numbers are 64 bits of anything.
"""

from __future__ import annotations

import errno
import struct

from vmm.core.events import ConversionRequest, Kind
from vmm.core.lean_typing import NamedTuple
from vmm.core.ranges import PAGE_SHIFT, PAGE_SIZE

DOORBELL_NAME = "rsi"

FIRST_FUNCTION, FUNCTIONS = 0xC400_0190, 16
"""What the monitor answers, as KVM's filter wants it: 64-bit standard secure service calls."""
ABI_VERSION = 0xC400_0190
REALM_CONFIG = 0xC400_0196
IPA_STATE_SET = 0xC400_0197
IPA_STATE_GET = 0xC400_0198

SUCCESS, ERROR_INPUT = 0, 1
ACCEPT, REJECT = 0, 1
NOT_SUPPORTED = (1 << 64) - 1  # SMC Calling Convention: -1
VERSION = 1 << 16  # 1.0: major number in bits 30:16

EMPTY, RAM, DEV = 0, 1, 3
"""RIPAS, the state of an address: shared or nothing there, private, a trusted device's."""

_CONFIG = struct.Struct("<QQ")  # struct realm_config: ipa_bits, hash_algo


class StateGet(NamedTuple):
    """RSI_IPA_STATE_GET: what are the addresses from `base`, up to `top` at most?"""

    base: int
    top: int


def decode_state_set(base: int, top: int, ripas: int, vcpu: int) -> ConversionRequest | None:
    """RSI_IPA_STATE_SET's arguments as a request; None for what is an error of input.

    A range that ends before it starts or is not of whole granules has no form as a request. Where
    it lies is not looked at: that is the converter's business.
    """
    if top <= base or (base | top) % PAGE_SIZE or ripas not in (EMPTY, RAM):
        return None
    kind = Kind.SHARE if ripas == EMPTY else Kind.UNSHARE
    return ConversionRequest(kind, base, (top - base) >> PAGE_SHIFT, vcpu, DOORBELL_NAME)


def state_set_answer(base: int, top: int, result: int) -> tuple[int, int, int]:
    """x0 to x2 after RSI_IPA_STATE_SET for the converter's 0 or negative errno.

    A refusal is an answer of its own (REJECT), with nothing changed (the new base is the old
    one); a range that isn't RAM is the guest's error.
    """
    if result == 0:
        return SUCCESS, top, ACCEPT
    if result == -errno.EINVAL:
        return ERROR_INPUT, base, REJECT
    return SUCCESS, base, REJECT


def decode_state_get(base: int, top: int) -> StateGet | None:
    """RSI_IPA_STATE_GET's arguments; None for an error of input."""
    if top <= base or (base | top) % PAGE_SIZE:
        return None
    return StateGet(base, top)


def realm_config(ipa_bits: int) -> bytes:
    """The page that RSI_REALM_CONFIG writes; no hash algorithm: nothing is measured."""
    return _CONFIG.pack(ipa_bits, 0).ljust(PAGE_SIZE, b"\0")
