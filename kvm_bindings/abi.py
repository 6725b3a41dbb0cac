"""Which declarations of the KVM ABI an architecture's classes use.

An extension is compiled for one architecture. Another one's classes and numbers can be imported
all the same, for tests and for tools that only read: their structures come from the header then.
"""

from __future__ import annotations

import os
from functools import cache

from kvm_bindings._kvm import ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MACHINE = os.uname().machine
"""The architecture that the extension is compiled for."""


@cache
def ffi_for(architecture: str) -> Any:
    """cffi's view of that architecture's structures (the names are uname's).

    The compiled one on such a machine. Elsewhere the headers are parsed, with sizes and offsets
    by this machine's rules: all of ours are little-endian with 64-bit pointers.
    """
    if architecture == MACHINE:
        return ffi
    from pathlib import Path

    from cffi import FFI

    parsed, here = FFI(), Path(__file__).parent
    for header in (here / "kvm_abi.h", here / architecture / "kvm_abi.h"):
        parsed.cdef(header.read_text())
    return parsed
