"""What an object's saved state looks like, and how one is read that may be hostile.

A state is what JSON can hold: a mapping of names to numbers, flags, text, lists and mappings;
bytes are text in hexadecimal. Who saves has `state()`, which makes one; who restores has
`restore(saved)`, which takes it out of a `Saved`: each value with its type and its bounds. A
snapshot is a file that anybody can have written, so that nothing in it is believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from vmm.core.errors import UsageError
from vmm.core.lean_typing import Any, Protocol, TypeVar

T = TypeVar("T")
State = dict[str, Any]

MOST_OWN = 1 << 20
"""The most bytes of JSON that somebody's own code may have in a snapshot."""
MOST_DEPTH = 16
"""And how deep lists and mappings lie in each other there."""
_LONGEST_NUMBER = 64


class BadState(UsageError):
    """A saved state that can't be restored; the text says where and why."""


class Stateful(Protocol):
    """What has a state that a snapshot keeps."""

    def state(self) -> State:
        """All of it, at a moment when nobody changes it. Raises NotSaved."""
        ...

    def restore(self, saved: Saved) -> None:
        """Be in that state; the object is as it was made. Raises BadState."""
        ...


class NotSaved(UsageError):
    """Something of the machine can't be saved (now); the text says what to do."""


class Saved:
    """One mapping of a saved state. What is asked for and not there, of another type or out of
    bounds raises BadState, and so does (`finish`) what nobody has asked for."""

    def __init__(self, values: object, where: str) -> None:
        """`where` names it in errors."""
        if type(values) is not dict:
            raise BadState(f"{where}: no mapping of names to values")
        self.where = where
        self._values: dict[str, Any] = values
        self._left = set(values)

    def _take(self, name: str, kind: type[T]) -> T:
        value = self._values.get(name)
        if type(value) is not kind:  # not isinstance: True is a number to it
            what = "is missing" if name not in self._values else f"is no {_KINDS[kind]}"
            raise BadState(f"{self.where}: {name} {what}")
        self._left.discard(name)
        return value

    def number(self, name: str, most: int, least: int = 0) -> int:
        """An integer, `least` to `most`."""
        value = self._take(name, int)
        if not least <= value <= most:
            shown = str(value) if abs(value) < 1 << 64 else "a number of more than 64 bits"
            raise BadState(f"{self.where}: {name} is {shown}, not {least} to {most}")
        return value

    def flag(self, name: str) -> bool:
        return self._take(name, bool)

    def text(self, name: str, most: int = 4096) -> str:
        """Text of at most so many characters."""
        value = self._take(name, str)
        if len(value) > most:
            raise BadState(f"{self.where}: {name} has {len(value)} characters, {most} are the most")
        return value

    def bytes(self, name: str, size: int | None = None, most: int = 1 << 16) -> bytes:
        """Bytes: exactly `size`, or at most `most`."""
        text = self._take(name, str)
        if len(text) > 2 * (most if size is None else size):
            raise BadState(f"{self.where}: {name} is too long: {len(text) // 2} bytes")
        try:
            value = bytes.fromhex(text)
        except ValueError:
            raise BadState(f"{self.where}: {name} is not in hexadecimal") from None
        if size is not None and len(value) != size:
            raise BadState(f"{self.where}: {name} has {len(value)} bytes, not {size}")
        return value

    def inner(self, name: str) -> Saved:
        """A mapping inside of this one."""
        return Saved(self._take(name, dict), f"{self.where}.{name}")

    def has(self, name: str) -> bool:
        """Whether there is such a value; `null` is none."""
        if self._values.get(name) is None:
            self._left.discard(name)
            return False
        return True

    def rows(self, name: str, most: int) -> list[Any]:
        """A list of at most so many, for the caller to look at."""
        value = self._take(name, list)
        if len(value) > most:
            raise BadState(f"{self.where}: {name} has {len(value)} entries, {most} are the most")
        return value

    def inners(self, name: str, most: int) -> list[Saved]:
        """A list of at most so many mappings."""
        rows = self.rows(name, most)
        return [Saved(row, f"{self.where}.{name}[{at}]") for at, row in enumerate(rows)]

    def each(self, name: str, count: int) -> list[Saved]:
        """A list of exactly so many mappings."""
        inners = self.inners(name, count)
        if len(inners) != count:
            raise BadState(f"{self.where}: {name} has {len(inners)} entries, not {count}")
        return inners

    def numbers(self, name: str, width: int, most: int, largest: int) -> list[tuple[int, ...]]:
        """A list of at most `most` rows of `width` numbers, none above `largest`."""
        rows = self.rows(name, most)
        for at, row in enumerate(rows):
            right = type(row) is list and len(row) == width
            if not right or any(type(one) is not int or not 0 <= one <= largest for one in row):
                raise BadState(
                    f"{self.where}: {name}[{at}] is not {width} numbers up to {largest:#x}"
                )
        return [tuple(row) for row in rows]

    def own(self, name: str) -> Any:
        """What somebody's own code has saved (`own_state`); None where it is null."""
        self._left.discard(name)
        try:
            return own_state(self._values.get(name))
        except ValueError as error:
            raise BadState(f"{self.where}: {name} {error}") from None

    def names(self) -> list[str]:
        """The names there are, in their order."""
        return list(self._values)

    def bad(self, why: str) -> BadState:
        """The error for what only its owner can see to be wrong."""
        return BadState(f"{self.where}: {why}")

    def finish(self) -> None:
        """All of it has been asked for."""
        if self._left:
            raise BadState(f"{self.where}: {min(self._left)!r:.40} is nothing that it has")


_KINDS: dict[type, str] = {int: "number", bool: "flag", str: "text", dict: "mapping", list: "list"}


def own_state(value: object) -> Any:
    """`value` as it comes back from a snapshot, where it is what JSON can hold and no more than
    MOST_OWN and MOST_DEPTH. Raises ValueError, whose text goes on from the value's name."""
    import json  # most runs neither save nor are restored

    left: list[tuple[object, int]] = [(value, 0)]
    looked_at = 0
    while left:
        each, depth = left.pop()
        looked_at += 1
        # Each takes a byte of JSON at least: what holds the same list often is found here.
        if looked_at > MOST_OWN:
            raise ValueError(f"has more than {MOST_OWN} bytes of JSON")
        if depth > MOST_DEPTH:
            raise ValueError(f"is nested more than {MOST_DEPTH} deep")
        if isinstance(each, dict):
            for key in each:
                if type(key) is not str:
                    raise ValueError(f"has a key that is no text: {key!r:.60}")
            left += [(one, depth + 1) for one in each.values()]
        elif isinstance(each, list | tuple):
            left += [(one, depth + 1) for one in each]
        elif type(each) is int:
            if each.bit_length() > _LONGEST_NUMBER:
                raise ValueError(f"has a number of more than {_LONGEST_NUMBER} bits")
        elif type(each) is float:
            if not math.isfinite(each):
                raise ValueError(f"has {each}, which is no number to JSON")
        elif each is not None and type(each) not in (bool, str):
            raise ValueError(f"has what JSON can't hold: {each!r:.60}")
    text = json.dumps(value, allow_nan=False)
    if len(text) > MOST_OWN:
        raise ValueError(f"has {len(text)} bytes of JSON, {MOST_OWN} are the most")
    return json.loads(text)


def restored(saved: Saved, restore: Callable[[Saved], None]) -> None:
    """Have `restore` take all that there is."""
    restore(saved)
    saved.finish()
