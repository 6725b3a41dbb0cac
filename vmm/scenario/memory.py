"""Guest memory for scenarios: page states are real, and there is nothing in the pages."""

from __future__ import annotations

from collections.abc import Sequence

from vmm.conversion.schemes.plain import PlainScheme
from vmm.core.ranges import Range
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.replay.replay import ModelBacking


class _Side(ModelBacking):
    def pread(self, size: int, offset: int) -> bytes:
        """No bytes: whether an access is allowed has been asked before it comes here."""
        return b""


class ModelScheme(PlainScheme):
    """No KVM; a fault asks for a conversion, as with the schemes where that can happen."""

    name = "model"
    converts_on_fault = True


def model_memory(ram: Sequence[Range], private: Sequence[Range]) -> GuestMemory:
    """Memory of two sides, of which `private` starts private. Raises OSError."""
    size = ram[-1].end
    shared_side, private_side = _Side(size), _Side(size)
    memory = GuestMemory(ram, shared_side, private_side, private)
    private_side.state = PageState.PRIVATE
    shared_side.memory = private_side.memory = memory
    return memory
