"""Policies: user code that decides about conversions. Mechanism never decides.

Everything that a policy needs is imported from here: `from vmm.policy import Policy, Allow, Deny`.
"""

from vmm.core.events import Kind
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.ranges import Range
from vmm.memory.guest_memory import PageState
from vmm.policy.decisions import Allow, Convert, Decision, Defer, Deny, Kill, Partial
from vmm.policy.protocol import (
    Counts,
    End,
    Event,
    IoEvent,
    Policy,
    PolicyError,
    PolicyKill,
    View,
)

if TYPE_CHECKING:
    from vmm.policy.lending import LendEvent

__all__ = [
    "Allow",
    "Convert",
    "Counts",
    "Decision",
    "Defer",
    "Deny",
    "End",
    "Event",
    "IoEvent",
    "Kill",
    "Kind",
    "LendEvent",
    "PageState",
    "Partial",
    "Policy",
    "PolicyError",
    "PolicyKill",
    "Range",
    "View",
]


def __getattr__(name: str) -> object:
    """LendEvent, when somebody asks for it: most runs lend nothing."""
    if name == "LendEvent":
        from vmm.policy.lending import LendEvent

        return LendEvent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
