"""What happens to a guest, as plain data: the requests and events that rooms hand each other."""

from __future__ import annotations

from vmm.core.lean_typing import Enum, NamedTuple


class Kind(Enum):
    """Which way a conversion goes."""

    SHARE = "share"
    UNSHARE = "unshare"


FAULT = "fault"
"""The doorbell of an implicit conversion: the guest's access itself asks."""


FROM_HOST = "control"
"""The doorbell of a conversion that the host's side wants."""
NO_VCPU = 0xFF
"""The vCPU of a request that none made."""


class ConversionRequest(NamedTuple):
    """A guest's request to convert `pages` 4 KiB pages from `gpa`, exactly as the guest put it.

    Nothing in it is validated: `gpa` and `pages` are whatever the guest wrote, `reserved` holds
    the attribute bits that have no meaning. `doorbell` names how the guest asked.
    """

    kind: Kind
    gpa: int
    pages: int
    vcpu: int
    doorbell: str
    reserved: int = 0
