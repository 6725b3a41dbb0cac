"""Which declarations of the KVM ABI an architecture's classes use.

An extension is compiled for one architecture. Another one's classes and numbers can be imported
all the same, for tests and for tools that only read: their structures come from the header then.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

from kvm_bindings._kvm import ffi

_HERE = Path(__file__).resolve().parent


@cache
def ffi_for(architecture: str) -> Any:
    """cffi's view of that architecture's structures (the names are platform.machine()'s).

    The compiled one on such a machine. Elsewhere the headers are parsed, with sizes and offsets
    by this machine's rules: all of ours are little-endian with 64-bit pointers.
    """
    if platform.machine() == architecture:
        return ffi
    from cffi import FFI

    parsed = FFI()
    for header in (_HERE / "kvm_abi.h", _HERE / architecture / "kvm_abi.h"):
        parsed.cdef(header.read_text())
    return parsed
