"""The stand-ins for typing behave as typing's own do."""

from __future__ import annotations

import copy
import enum
import pickle
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


class LeanSide(lean_typing.Enum):
    """A side."""

    LEFT = "left"
    RIGHT = "right"

    @property
    def other(self) -> object:
        return LeanSide.RIGHT if self is LeanSide.LEFT else LeanSide.LEFT


class RealSide(enum.Enum):
    """A side."""

    LEFT = "left"
    RIGHT = "right"


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


def test_enum_has_the_members_that_the_real_one_has() -> None:
    lean, real = list(LeanSide), list(RealSide)

    assert [(each.name, each.value) for each in lean] == [(each.name, each.value) for each in real]
    assert repr(lean) == repr(real).replace("Real", "Lean")
    assert list(map(str, lean)) == [str(each).replace("Real", "Lean") for each in real]
    assert len(LeanSide) == len(RealSide)
    assert list(LeanSide.__members__) == list(RealSide.__members__)
    assert LeanSide.__doc__ == "A side."


def test_member_is_one_object_however_it_is_got() -> None:
    left = LeanSide.LEFT

    for same in (LeanSide("left"), LeanSide["LEFT"], copy.copy(left), copy.deepcopy(left)):
        assert same is left
    assert pickle.loads(pickle.dumps(left)) is left
    assert left.other is LeanSide.RIGHT
    assert isinstance(left, LeanSide) and left in LeanSide
    assert left not in ("left", LeanSide.RIGHT)


def test_enum_without_such_a_member_raises() -> None:
    with pytest.raises(ValueError, match="'up' is not a valid LeanSide"):
        LeanSide("up")
    with pytest.raises(KeyError):
        LeanSide["UP"]
