"""What a snapshot says that policies know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fuzz.targets.registry import target
from vmm.core.events import Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.core.saved import BadState, Saved
from vmm.policy import Allow, Deny, End, Event, Policy, View
from vmm.policy.builtin import Audit, DenyAfterBoot, RateLimit
from vmm.policy.hooks import Hooks
from vmm.policy.keeping import read_policies, restore_policies, saved_policies

_BURST = 3
_EVENT = Event(Kind.SHARE, Range(0, PAGE_SIZE), 0, "port")


class _Clock:
    now = 10.0


def _view() -> View:
    made: Any = _Clock()
    view: View = made
    return view


@contextmanager
def _policies() -> Iterator[Hooks]:
    """Of the built-in policies that have a state, just asked about the boot."""
    limit = RateLimit(per_second=2, burst=_BURST)
    policies: list[Policy] = [DenyAfterBoot(), DenyAfterBoot(2.0), Audit(Path("/dev/null"), limit)]
    hooks = Hooks(policies)
    hooks.boot(_view())
    try:
        yield hooks
    finally:
        hooks.exit(End("poweroff", ""), _view())


def _restored(hooks: Hooks, rows: Any) -> list[str]:
    saved = Saved({"policies": rows}, "state")
    read = read_policies(saved)
    saved.finish()
    return restore_policies(hooks, read, _view())


def _saved(hooks: Hooks) -> Any:
    return json.loads(json.dumps(saved_policies(hooks, _view())))


def _states() -> list[bytes]:
    """Of policies that were just made, and some that no policy has saved."""
    with _policies() as hooks:
        rows = _saved(hooks)
    states: list[Any] = [rows, rows[::-1], rows * 2, [], {}, None]
    return [json.dumps(each).encode() for each in states]


@target("snapshot-policies", _states, longest=2048)
def snapshot_policies(data: bytes) -> None:
    """The JSON of a snapshot's policies: it is refused with a line, or they go on from it, decide,
    and say the same again when they are saved."""
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError):
        return  # vmm.snapshot.folder has refused it
    with _policies() as hooks:
        try:
            gone = _restored(hooks, rows)
        except BadState as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            return
        assert len(gone) <= len(rows)
        _check(hooks)


def _check(hooks: Hooks) -> None:
    now = _saved(hooks)
    assert [row["state"] is not None for row in now] == [True] * 4
    for row in now[:3]:
        assert row["state"]["seconds"] >= 0 and type(row["state"].get("unshared", True)) is bool
    assert 0 <= now[3]["state"]["tokens"] <= _BURST
    with _policies() as again:
        assert _restored(again, now) == []
        assert _saved(again) == now
    for policy in hooks.policies:
        assert policy.on_share(_EVENT, _view()).__class__ in (Allow, Deny)
