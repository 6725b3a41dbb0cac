"""What C does at best: the floors that `pyvmm bench` measures Python against.

Nothing that runs guests uses this, but for `vmm.memory.engines.MappedEngine`, the comparator.
"""

from __future__ import annotations

from kvm_bindings._kvm import lib


def copy_memory(target: int, source: int, size: int) -> None:
    """memcpy(3) between two addresses: mapped and not overlapping, or the process dies."""
    lib.pyvmm_copy_memory(target, source, size)
