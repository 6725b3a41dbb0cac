"""Asks the policies of a run: which have a hook, in which order, and whether the answer is one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from vmm.core.errors import AccessDenied
from vmm.core.events import FAULT, Kind
from vmm.core.lean_typing import TYPE_CHECKING, Any, NoReturn
from vmm.core.ranges import Range
from vmm.policy.decisions import (
    Allow,
    CarriedOut,
    Convert,
    Decision,
    Defer,
    Deny,
    Kill,
    Partial,
    Refusal,
    combined,
)
from vmm.policy.protocol import (
    BrokenOff,
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

Hook = Callable[..., Any]

_ALLOW = Allow()
_ON = {Kind.SHARE: "on_share", Kind.UNSHARE: "on_unshare"}


class Hooks:
    """The overridden hooks of a run's policies.

    All policies must allow. They are asked in order and the first Deny or Kill counts. After a
    Partial the later ones are asked about the part, and only what all leave over is converted.
    What the others say is put together by `vmm.policy.decisions.combined`; its table is in
    vmm/docs/reference/policies.md.
    """

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.policies = tuple(policies)
        self._asked = {kind: tuple(_overridden(policies, name)) for kind, name in _ON.items()}
        # A policy that has no on_fault of its own is asked as if the guest had rung.
        self._faults = {
            kind: tuple(_overridden(policies, "on_fault", name)) for kind, name in _ON.items()
        }
        self._io = tuple(_overridden(policies, "on_io"))
        self._lend = tuple(_overridden(policies, "on_lend"))
        self._return = tuple(_overridden(policies, "on_return"))
        self._boot = tuple(_overridden(policies, "on_boot"))
        self._exit = tuple(_overridden(policies, "on_exit"))
        self.decided_by: str | None = None
        """The policy whose word the last decision was; None where all simply allowed it."""
        self._called: dict[int, tuple[Hook, tuple[Any, ...]]] = {}

    @property
    def waiting_for(self) -> str | None:
        """The name of a hook that has not returned yet; None where none is being called."""
        for called in list(self._called.values()):
            return _named(*called)
        return None

    @property
    def is_this_thread_in_one(self) -> bool:
        """Whether the calling thread is inside a hook (asked by a signal handler)."""
        return threading.get_ident() in self._called

    @property
    def asks_about_io(self) -> bool:
        """Whether a policy wants to know of a device's accesses."""
        return bool(self._io)

    def decide(
        self, kind: Kind, area: Range, vcpu: int, doorbell: str, view: View
    ) -> CarriedOut | Refusal:
        """What the policies say to a request. Raises PolicyError when one of them breaks."""
        self.decided_by = None
        hooks = (self._faults if doorbell == FAULT else self._asked)[kind]
        if not hooks:
            return _ALLOW
        result: CarriedOut = _ALLOW
        for hook in hooks:
            event = Event(kind, area, vcpu, doorbell)
            decision = self._ask(hook, event, view)
            if decision.__class__ is Allow and decision.patience is None:
                continue
            if isinstance(decision, (Deny, Kill)):
                self.decided_by = type(_policy_of(hook)).__name__
                return decision
            assert isinstance(decision, (Allow, Partial, Defer, Convert))
            _require_fitting(hook, event, view, decision)
            before = result.__class__
            result = combined(result, decision)
            if isinstance(decision, Partial):
                area = decision.area
                self.decided_by = type(_policy_of(hook)).__name__
            elif before is Allow and result.__class__ is not Allow:
                self.decided_by = type(_policy_of(hook)).__name__
        return result

    def watcher(self, view: View, device: str) -> Callable[[Range, bool, str | None], None] | None:
        """What asks about an access of `device` before it happens; None where no policy wants
        to know.

        It takes the range, whether the device writes there, and what names the range. It raises
        AccessDenied, PolicyKill or PolicyError.
        """
        if not self._io:
            return None

        def ask(area: Range, is_write: bool, named: str | None) -> None:
            event = IoEvent(device, area, is_write, named)
            for hook in self._io:
                decision = self._ask(hook, event, view)
                if decision.__class__ is not Allow:
                    self._hold_back(hook, event, view, decision)

        return ask

    def _hold_back(self, hook: Hook, event: IoEvent, view: View, decision: Decision) -> NoReturn:
        if isinstance(decision, Kill):
            raise PolicyKill(decision.reason)
        if isinstance(decision, Deny):
            name = type(_policy_of(hook)).__name__
            raise AccessDenied(f"policy {name} keeps {event.device} off {event.area}")
        say = "an access is answered with Allow(), Deny() or Kill(reason)"
        raise blame(hook, (event, view), f"returned {decision!r}; {say}")

    @property
    def asks_about_lending(self) -> bool:
        """Whether a policy wants to know of pages that are lent, or come back."""
        return bool(self._lend or self._return)

    def lending(self, event: LendEvent, view: View, *, is_return: bool = False) -> bool:
        """Whether all policies allow that pages are lent, or come back (what is forced is so
        whatever they say). Raises PolicyKill, PolicyError."""
        for hook in self._return if is_return else self._lend:
            decision = self._ask(hook, event, view)
            if isinstance(decision, Kill):
                raise PolicyKill(decision.reason)
            if isinstance(decision, Deny):
                if event.forced:
                    continue
                return False
            if decision.__class__ is not Allow:
                say = "lending is answered with Allow(), Deny() or Kill(reason)"
                raise blame(hook, (event, view), f"returned {decision!r}; {say}")
        return True

    def boot(self, view: View) -> None:
        """The guest is about to run. Raises PolicyKill when a policy won't have it."""
        for hook in self._boot:
            try:
                decision = self.call(hook, view)
            except PolicyError as error:
                if isinstance(error.__cause__, KeyboardInterrupt):
                    raise error.__cause__ from None  # no signal of ours yet: it is the user's
                raise
            if isinstance(decision, Kill):
                raise PolicyKill(_killed(decision, hook))
            if not isinstance(decision, Allow):
                raise blame(hook, (view,), f"returned {decision!r}; return Allow() or Kill(reason)")

    def exit(self, end: End, view: View) -> None:
        """The run is over; every policy hears of it, also after one that raises."""
        broken: list[PolicyError] = []
        for hook in self._exit:
            try:
                self.call(hook, end, view)
            except PolicyError as error:
                broken.append(error)
        if broken:
            raise broken[0]

    def _ask(self, hook: Hook, event: Event | IoEvent | LendEvent, view: View) -> Decision:
        decision = self.call(hook, event, view)
        if not isinstance(decision, (Allow, Deny, Partial, Defer, Convert, Kill)):
            say = "return Allow() or Deny() or another decision of vmm.policy"
            raise blame(hook, (event, view), f"returned {decision!r}; {say}")
        if isinstance(decision, Kill):
            return Kill(_killed(decision, hook))
        return decision

    def call(self, hook: Hook, *given: Any) -> Any:
        """What a policy's method returns. Raises PolicyError, whatever it raises."""
        thread = threading.get_ident()
        self._called[thread] = (hook, given)
        try:
            return hook(*given)
        except BrokenOff:
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            # An OSError of the policy's own must not reach the guest as if it were an answer, nor
            # a SystemExit the shell as if it were pyvmm's status.
            raise blame(hook, given, f"raised {error!r}") from error
        finally:
            del self._called[thread]


def _require_fitting(hook: Hook, event: Event, view: View, decision: Decision) -> None:
    """A decision that does not fit its event is the policy's fault, never the guest's."""
    why = ""
    if isinstance(decision, Partial) and not event.area.contains(decision.area):
        why = "Partial takes a part of the request"
    elif isinstance(decision, Convert) and not decision.area.contains(event.area):
        why = "Convert takes a range that contains the request"
    elif _puts_off(decision) and event.kind is not Kind.UNSHARE:
        why = "only an unshare can be put off: after a share the guest uses the pages at once"
    if why:
        raise blame(hook, (event, view), f"returned {decision!r}; {why}")


def _puts_off(decision: Decision) -> bool:
    return isinstance(decision, Defer) or (
        isinstance(decision, Partial) and decision.later is not None
    )


def blame(hook: Hook, given: tuple[Any, ...], what: str) -> PolicyError:
    """The error that names the policy and the hook at fault."""
    return PolicyError(f"{_named(hook, given)} {what}", _policy_of(hook), given)


def _named(hook: Hook, given: tuple[Any, ...]) -> str:
    where = f" for {given[0].area}" if given and hasattr(given[0], "area") else ""
    name = type(_policy_of(hook)).__name__
    return f"policy {name}: {getattr(hook, '__name__', 'hook')}{where}"


def _policy_of(hook: Hook) -> Any:
    return getattr(hook, "__self__", hook)


def _overridden(policies: Sequence[Policy], *names: str) -> Iterator[Hook]:
    """Each policy's bound hook of the first of `names` that it wants to be called."""
    for policy in policies:
        for name in names:
            if policy.wants(name):
                yield getattr(policy, name)
                break


def _killed(decision: Kill, hook: Hook) -> str:
    return f"policy {type(_policy_of(hook)).__name__}: {decision.reason}"
