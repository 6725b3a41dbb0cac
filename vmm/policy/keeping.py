"""What policies know, in a snapshot: a row for each, in the order in which they are asked, a
wrapped one behind the one that wraps it.

    {"policy": "MODULE:CLASS", "state": what on_save returned, or null}

A restored run may name other policies. One of the same class at the same place among its like gets
the state; the others begin as in any run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmm.core.lean_typing import Any, NamedTuple
from vmm.core.saved import NotSaved, Saved, State, own_state
from vmm.policy.hooks import Hooks, blame
from vmm.policy.protocol import Policy, PolicyError, View

MOST_POLICIES = 64
"""Wrapped ones included."""
_LONGEST_NAME = 256
_LONGEST_REASON = 200
_WRONG = (ValueError, TypeError, KeyError)
"""What on_restore raises for a state that can't be right."""


def saved_policies(hooks: Hooks, view: View) -> list[State]:
    """All policies with what they know, while the guest stands still. Raises NotSaved."""
    rows: list[State] = []
    try:
        for policy in _each(hooks):
            state = None
            if hooks.call(policy.wants, "on_save"):
                state = _own(policy, hooks.call(policy.on_save, view))
            rows.append({"policy": _name(policy), "state": state})
    except PolicyError as error:
        raise NotSaved(f"{error}; the snapshot is not made, and the guest goes on") from error
    return rows


def _own(policy: Policy, state: object) -> Any:
    try:
        return own_state(state)
    except ValueError as error:
        raise NotSaved(
            f"policy {type(policy).__name__}: what on_save returned {error}; the snapshot is not "
            "made, and the guest goes on"
        ) from None


class SavedPolicy(NamedTuple):
    """A row of a snapshot; `where` is its place there, for errors."""

    name: str
    state: Any
    where: Saved


def read_policies(saved: Saved) -> list[SavedPolicy]:
    """The rows of the mapping's `policies`, as far as anybody but a policy can tell. Raises
    BadState."""
    found = []
    for row in saved.inners("policies", MOST_POLICIES):
        found.append(SavedPolicy(row.text("policy", _LONGEST_NAME), row.own("state"), row))
        row.finish()
    return found


def restore_policies(hooks: Hooks, rows: Sequence[SavedPolicy], view: View) -> list[str]:
    """Give policies what they knew, after on_boot and before the guest runs. Names of the classes
    of those that are not there any more.

    Raises BadState where a policy says that a state can't be right, PolicyError where it breaks.
    """
    left = list(rows)
    for policy in _each(hooks):
        name = _name(policy)
        row = next((each for each in left if each.name == name), None)
        if row is None:
            continue
        left.remove(row)
        if row.state is not None and hooks.call(policy.wants, "on_restore"):
            _restore(hooks, policy, row, view)
    return [row.name.rpartition(":")[2] for row in left]


def _restore(hooks: Hooks, policy: Policy, row: SavedPolicy, view: View) -> None:
    try:
        hooks.call(policy.on_restore, row.state, view)
    except PolicyError as error:
        cause = error.__cause__
        if not isinstance(cause, _WRONG):
            raise
        why = f"{type(cause).__name__}: {cause}"[:_LONGEST_REASON]
        name = type(policy).__name__
        raise row.where.bad(f"policy {name} can't go on from its state: {why}") from error


def _name(policy: Policy) -> str:
    """The same for a class of a FILE.py, wherever the file is (`loader` names its module)."""
    return f"{type(policy).__module__}:{type(policy).__qualname__}"[:_LONGEST_NAME]


def _each(hooks: Hooks) -> Iterator[Policy]:
    """The policies, each once. Raises PolicyError."""
    seen: set[int] = set()
    left = list(reversed(hooks.policies))
    while left:
        policy = left.pop()
        if id(policy) in seen or type(policy) is Policy:
            continue  # asked by two, or by nobody
        seen.add(id(policy))
        if len(seen) > MOST_POLICIES:
            raise PolicyError(f"a snapshot has {MOST_POLICIES} policies at most")
        yield policy
        others = hooks.call(policy.wrapped_policies)
        if not (isinstance(others, list | tuple) and all(isinstance(p, Policy) for p in others)):
            say = f"returned {others!r:.60}; return a list of policies"
            raise blame(policy.wrapped_policies, (), say)
        left += reversed(others)
