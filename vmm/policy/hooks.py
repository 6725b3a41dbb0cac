"""Asks the policies of a run: which have a hook, in which order, and whether the answer is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.policy.decisions import Allow, Convert, Decision, Defer, Deny, Kill, Partial
from vmm.policy.protocol import End, Event, Policy, PolicyError, PolicyKill, View

Hook = Callable[..., Any]

_ALLOW = Allow()


class Hooks:
    """The overridden hooks of a run's policies.

    All policies must allow. They are asked in order and the first Deny or Kill counts. After a
    Partial the later ones are asked about the part, and only what all leave over is converted.
    Defer and Convert are wishes about how an allowed request is carried out: the first one
    counts, and a Partial outweighs it.
    """

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._share = _overridden(policies, "on_share")
        self._unshare = _overridden(policies, "on_unshare")
        self._boot = _overridden(policies, "on_boot")
        self._exit = _overridden(policies, "on_exit")
        self._called: tuple[Hook, str] | None = None

    @property
    def waiting_for(self) -> str | None:
        """The name of the hook that has not returned yet; None where none is being called."""
        called = self._called
        return None if called is None else _named(*called)

    def decide(self, kind: Kind, area: Range, vcpu: int, doorbell: str, view: View) -> Decision:
        """What the policies say to a request. Raises PolicyError when one of them breaks."""
        hooks = self._share if kind is Kind.SHARE else self._unshare
        if not hooks:
            return _ALLOW
        result: Decision = _ALLOW
        for hook in hooks:
            event = Event(kind, area, vcpu, doorbell)
            decision = self._ask(hook, event, view)
            if decision.__class__ is Allow:
                continue
            if isinstance(decision, (Deny, Kill)):
                return decision
            self._require_fitting(hook, event, decision)
            if isinstance(decision, Partial):
                area = decision.area
                result = decision
            elif result.__class__ is Allow:
                result = decision
        return result

    def boot(self, view: View) -> None:
        """The guest is about to run. Raises PolicyKill when a policy won't have it."""
        for hook in self._boot:
            decision = self._call(hook, "", view)
            if isinstance(decision, Kill):
                raise PolicyKill(_killed(decision, hook))
            if not isinstance(decision, Allow):
                raise blame(hook, "", f"returned {decision!r}; return Allow() or Kill(reason)")

    def exit(self, end: End, view: View) -> None:
        """The run is over; every policy hears of it, also after one that raises."""
        broken: list[PolicyError] = []
        for hook in self._exit:
            try:
                self._call(hook, "", end, view)
            except PolicyError as error:
                broken.append(error)
        if broken:
            raise broken[0]

    def _ask(self, hook: Hook, event: Event, view: View) -> Decision:
        decision = self._call(hook, f" for {event.area}", event, view)
        if not isinstance(decision, (Allow, Deny, Partial, Defer, Convert, Kill)):
            say = "return Allow() or Deny() or another decision of vmm.policy"
            raise blame(hook, f" for {event.area}", f"returned {decision!r}; {say}")
        if isinstance(decision, Kill):
            return Kill(_killed(decision, hook))
        return decision

    def _call(self, hook: Hook, where: str, *arguments: object) -> object:
        self._called = (hook, where)
        try:
            return hook(*arguments)
        except (Exception, SystemExit) as error:
            # An OSError of the policy's own must not reach the guest as if it were an answer, nor
            # a SystemExit the shell as if it were pyvmm's status.
            raise blame(hook, where, f"raised {error!r}; --debug shows where") from error
        finally:
            self._called = None

    def _require_fitting(self, hook: Hook, event: Event, decision: Decision) -> None:
        """A decision that does not fit its event is the policy's fault, never the guest's."""
        why = ""
        if isinstance(decision, Partial) and not event.area.contains(decision.area):
            why = "Partial takes a part of the request"
        elif isinstance(decision, Convert) and not decision.area.contains(event.area):
            why = "Convert takes a range that contains the request"
        elif isinstance(decision, Defer) and event.kind is not Kind.UNSHARE:
            why = "only an unshare can be put off: after a share the guest uses the pages at once"
        if why:
            raise blame(hook, f" for {event.area}", f"returned {decision!r}; {why}")


def blame(hook: Hook, where: str, what: str) -> PolicyError:
    """The error that names the policy and the hook at fault."""
    return PolicyError(f"{_named(hook, where)} {what}")


def _named(hook: Hook, where: str) -> str:
    name = type(getattr(hook, "__self__", hook)).__name__
    return f"policy {name}: {getattr(hook, '__name__', 'hook')}{where}"


def _overridden(policies: Sequence[Policy], name: str) -> tuple[Hook, ...]:
    """The bound hooks `name` that are not Policy's own, which allow everything."""
    hooks = [getattr(policy, name) for policy in policies]
    own = getattr(Policy, name)
    return tuple(hook for hook in hooks if getattr(hook, "__func__", None) is not own)


def _killed(decision: Kill, hook: Hook) -> str:
    return f"policy {type(getattr(hook, '__self__', hook)).__name__}: {decision.reason}"
