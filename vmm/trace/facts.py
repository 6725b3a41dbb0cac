"""What a trace's sidecar says, checked before it is believed: anybody may have written it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmm.core.errors import UsageError
from vmm.core.given import Unusable, read_json
from vmm.core.ranges import PAGE_SIZE
from vmm.trace.layout import FORMAT, MOST_MEMORY, MOST_NAMES, MOST_SIDECAR, SIDECAR, VERSION

_COPY = "copy the folder again, or record again"


def read_facts(path: Path, folder: int) -> dict[str, Any]:
    """The sidecar of the trace at `path`, whose folder is open as `folder`: every fact that is
    used is of its type and within bounds. Raises UsageError."""
    give = "give the DIR of a run with --trace DIR"
    try:
        facts = read_json(
            SIDECAR, f"{path} is not a trace: {SIDECAR}", give,
            most=MOST_SIDECAR, folder=folder, follow=False,
        )  # fmt: skip
    except Unusable as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UsageError(f"{path} is not a trace: it has no {SIDECAR}; {give}") from None
        raise
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UsageError(f"{path} is not a trace: {SIDECAR} does not say {FORMAT}; {give}")
    if facts.get("version") != VERSION:
        raise UsageError(
            f"{path} is a trace of version {_shown(facts.get('version'))}; this pyvmm reads "
            f"version {VERSION}: use the pyvmm that recorded it"
        )
    facts.setdefault("names", None)
    facts.setdefault("states", [])
    for key, (fits, wanted) in _FACTS.items():
        if key in facts and not fits(facts[key]):
            raise UsageError(
                f"{path} is damaged: {SIDECAR}: {key!r} is {_shown(facts[key])}, not {wanted}; "
                f"{_COPY}"
            )
    _check_states(path, facts["states"])
    return facts


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _check_states(path: Path, states: list[list[Any]]) -> None:
    """RAM of whole pages, each in one state. Raises UsageError."""
    end = 0
    for gpa, size, state in sorted(states, key=lambda each: each[0]):
        if gpa < end or size < 0 or (gpa | size) % PAGE_SIZE or gpa + size > MOST_MEMORY:
            raise UsageError(
                f"{path} is damaged: {SIDECAR}: the memory at {_number(gpa)} of {_number(size)} "
                f"bytes ({_shown(state)}) is not of whole pages below {MOST_MEMORY:#x}, each "
                f"named once; {_COPY}"
            )
        end = gpa + size


def _number(value: int) -> str:
    return hex(value) if abs(value) < 1 << 80 else f"more than {1 << 80:#x}"


def _is_int(value: object) -> bool:
    return type(value) is int


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _policies(value: object) -> bool:
    return isinstance(value, list) and all(map(_words, value))


def _texts_by_name(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _states(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, list) and [type(cell) for cell in each] == [int, int, str]
        for each in value
    )


def _or_none(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or fits(value)


_FACTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "complete": (lambda value: isinstance(value, bool), "true or false"),
    "names": (
        lambda value: _words(value) and len(value) <= MOST_NAMES,
        f"a list of at most {MOST_NAMES} texts",
    ),
    "states": (_states, "a list of [address, bytes, state]"),
    "command": (_or_none(_words), "a list of texts"),
    "kernel": (_is_text, "a text"),
    "cpus": (_or_none(_is_int), "a whole number"),
    "scheme": (_is_text, "a text"),
    "doorbell": (_is_text, "a text"),
    "backings": (_or_none(_texts_by_name), "texts by name"),
    "policies": (_or_none(_policies), "a list of lists of texts"),
    "guest": (_or_none(_texts_by_name), "texts by name"),
    "dropped_events": (lambda value: _is_int(value) and value >= 0, "a whole number"),
}
"""By name: whether a value will do, and what would."""
