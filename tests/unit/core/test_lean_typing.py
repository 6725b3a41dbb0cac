"""The stand-ins for typing behave as typing's own do."""

from __future__ import annotations

import typing

import pytest

from vmm.core import lean_typing


class Lean(lean_typing.NamedTuple):
    """A point."""

    x: int
    y: int = 2

    @property
    def sum(self) -> int:
        return self.x + self.y


class Real(typing.NamedTuple):
    """A point."""

    x: int
    y: int = 2

    @property
    def sum(self) -> int:
        return self.x + self.y


def test_named_tuple_is_what_typing_makes_of_the_same_class() -> None:
    lean, real = Lean(1), Real(1)

    assert (tuple(lean), lean._asdict(), lean.sum) == (tuple(real), real._asdict(), real.sum)
    assert repr(lean) == repr(real).replace("Real", "Lean")
    assert (Lean.__module__, Lean.__doc__, Lean._fields) == (__name__, "A point.", Real._fields)
    assert tuple(lean._replace(y=5)) == (1, 5)


def test_named_tuple_without_a_value_for_a_field_raises() -> None:
    with pytest.raises(TypeError, match="x"):
        Lean()  # type: ignore[call-arg]


def test_generic_class_can_be_indexed_and_subclassed() -> None:
    T = lean_typing.TypeVar("T")

    class Box(lean_typing.Generic[T]):
        pass

    class Numbers(Box[int]):
        pass

    assert isinstance(Numbers(), Box)
