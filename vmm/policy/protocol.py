"""The policy protocol: an event and a read-only view in, a decision out."""

from __future__ import annotations

from vmm.core.errors import PyvmmError
from vmm.core.events import Kind
from vmm.core.lean_typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from vmm.core.ranges import Range
from vmm.memory.guest_memory import PageState, Residency
from vmm.policy.decisions import Allow, Decision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.policy.lending import LendEvent


class PolicyError(PyvmmError):
    """A policy's hook raised an exception (then it is the cause), or its answer does not fit.

    `policy` is the policy, `given` what its hook was called with; None and empty where that is
    not known.
    """

    def __init__(
        self, sentence: str, policy: Policy | None = None, given: tuple[object, ...] = ()
    ) -> None:
        super().__init__(sentence)
        self.policy = policy
        self.given = given


class PolicyKill(PyvmmError):
    """A policy ended the run; the text is its reason."""


class BrokenOff(KeyboardInterrupt):
    """A signal ends the run while this thread is in a hook, which may never return."""


class Event(NamedTuple):
    """A validated request: `area` is page-aligned guest RAM, GPAs without the C-bit.

    `doorbell` says how the guest asked: "hypercall", "port", or "fault" for an access to a page
    that is not in the state the access needs (an implicit conversion).
    """

    kind: Kind
    area: Range
    vcpu: int
    doorbell: str


class IoEvent(NamedTuple):
    """A device is about to touch `area`, in bytes; with `is_write` it changes the guest's memory.

    `named` is what names all of `area` to the device for an access of this direction: "ring"
    (the driver told it where the queue lies), "descriptor" (one of a request that is being
    carried out), or None: nothing does.
    """

    device: str
    area: Range
    is_write: bool
    named: str | None


class End(NamedTuple):
    """How a run ended: `exit` and `reason` as the report's `guest` has them."""

    exit: str
    reason: str


class Counts(NamedTuple):
    """Requests of one kind so far, the one being decided included; the report's numbers."""

    calls: int
    bytes: int
    denied: int
    failed: int


class View(Protocol):
    """What a policy may see of the guest's state; reading it changes nothing."""

    @property
    def now(self) -> float:
        """Seconds on a clock that never goes back; only differences mean something."""

    @property
    def ram_bytes(self) -> int: ...

    def states(self, within: Range | None = None) -> list[tuple[Range, PageState]]:
        """The runs of pages in equal state; those of conversions under way are CONVERTING."""

    def bytes_in(self, state: PageState) -> int:
        """How many bytes are in that state, or may be once the conversions under way have ended:
        their pages count for the state that they leave and for the one that they are to have."""

    def residency(self) -> Residency: ...
    def counts(self, kind: Kind) -> Counts: ...


class Policy:
    """Allows everything; a policy is a subclass that overrides the hooks it wants.

    on_share, on_unshare and on_fault run on the vCPU's thread while the guest waits, one at a
    time; what they have allowed may still be under way when they are asked about other pages, never
    about the same ones. on_io on the thread that serves the device, perhaps beside another hook;
    on_boot, on_restore and on_exit on the main thread, when no vCPU runs; on_save on the device
    loop's, while the guest stands still. on_save and on_restore are looked up then, the others
    once, before on_boot; a hook that is not overridden costs nothing.
    """

    def wants(self, hook: str) -> bool:
        """Whether the hook of that name is to be called: by default one that is overridden.

        For a policy that wraps another and has the hooks that the other one wants.
        """
        own = getattr(getattr(self, hook), "__func__", None)
        return own is not getattr(Policy, hook)

    def wrapped_policies(self) -> Sequence[Policy]:
        """The policies that this one asks itself: a snapshot has their states beside its own."""
        return ()

    def on_share(self, event: Event, view: View) -> Decision:
        """The guest asks to make `event.area` shared."""
        return Allow()

    def on_unshare(self, event: Event, view: View) -> Decision:
        """The guest asks to make `event.area` private."""
        return Allow()

    def on_fault(self, event: Event, view: View) -> Decision:
        """The guest touched pages as if they were in the other state: convert them?

        Without this hook on_share or on_unshare is asked, so that no fault gets around them. A
        guest that is refused can't go on: its run ends.
        """
        return Allow()

    def on_io(self, event: IoEvent, view: View) -> Decision:
        """A device is about to touch guest memory: Allow, Deny or Kill.

        Deny stops the device as if the driver had named memory that is not there.
        """
        return Allow()

    def on_lend(self, event: LendEvent, view: View) -> Decision:
        """The guest lends private pages to a device (--iommu): Allow, Deny or Kill.

        On the vCPU's thread while the guest waits, or on the device loop's. Deny leaves the pages
        unmapped: the device stops when it is told to touch them.
        """
        return Allow()

    def on_return(self, event: LendEvent, view: View) -> Decision:
        """The guest takes pages back that it has lent: Allow, Deny or Kill.

        Deny leaves them with the device, and the guest's request fails; but not if it is forced.
        """
        return Allow()

    def on_boot(self, view: View) -> Decision:
        """The guest is loaded, or restored, and about to run: Allow or Kill."""
        return Allow()

    def on_save(self, view: View) -> object:
        """A snapshot is made: what this policy knows and needs to go on, or None.

        None, flags, numbers, text, lists, and mappings of text to them; a megabyte of JSON at most.
        A time is a difference from `view.now`, which is a clock of this run. Changes nothing: the
        run goes on, with what this policy has. What it raises is the snapshot's refusal.
        """
        return None

    def on_restore(self, state: Any, view: View) -> None:
        """Go on from what on_save has returned, after __init__ and on_boot, before the guest runs.

        `state` comes from a file that anybody can have written. Raises ValueError, TypeError or
        KeyError for one that can't be right: the run ends with status 2 and a line that says so.
        Arguments may be others than they were: not an error.
        """

    def on_exit(self, end: End, view: View) -> None:
        """The run is over, memory is still there; not called where an error broke the run off
        or a vCPU's thread did not end."""
