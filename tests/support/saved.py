"""Saved states as somebody hostile would write them, with all checksums right."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vmm.core.saved import BadState, Saved

WRONG: tuple[Any, ...] = (
    -1, 1 << 70, 10**400, 1.5, True, "", "zz", "00" * 70000, [], {}, [[]], [{}], None,
)  # fmt: skip


def places(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something in a state: of a long list, its first and its last."""
    if path:
        yield path
    if isinstance(state, dict):
        for name, value in state.items():
            yield from places(value, (*path, name))
    elif isinstance(state, list):
        for at in sorted({0, len(state) - 1}) if state else ():
            yield from places(state[at], (*path, at))


def mutations(state: Any) -> Iterator[tuple[str, Any]]:
    """A description and a state, for each thing that may be wrong in one place."""
    for path in places(state):
        for wrong in WRONG:
            changed = copy.deepcopy(state)
            parent = _at(changed, path[:-1])
            if type(parent[path[-1]]) is type(wrong) and parent[path[-1]] == wrong:
                continue
            parent[path[-1]] = wrong
            yield f"{path} = {wrong!r:.30}", changed
        changed = copy.deepcopy(state)
        del _at(changed, path[:-1])[path[-1]]
        yield f"{path} is gone", changed
        if isinstance(_at(state, path), dict):
            changed = copy.deepcopy(state)
            _at(changed, path)["more"] = 1
            yield f"{path} has more", changed


def _at(state: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        state = state[step]
    return state


def refuses_what_is_wrong(state: Any, restore: Callable[[Saved], None]) -> int:
    """`restore` takes `state`; what is wrong it takes, too (then it does no harm), or refuses with
    one line; how many were refused."""
    restore(Saved(json.loads(json.dumps(state)), "here"))
    refused = 0
    for what, changed in mutations(state):
        try:
            saved = Saved(changed, "here")
            restore(saved)
            saved.finish()
        except BadState as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, what
            refused += 1
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
    return refused
