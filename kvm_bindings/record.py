"""Plain data with named fields, for classes that are made at every start and in every exit."""

from __future__ import annotations


class Record:
    """Equal to another of its class whose fields, the names in `__slots__`, are equal.

    A class of named fields that `typing.NamedTuple` or `dataclasses` would make takes twenty times
    as long to define, and every start defines a dozen of them.
    """

    __slots__: tuple[str, ...] = ()

    def _fields(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash((self.__class__, self._fields()))

    def __repr__(self) -> str:
        fields = zip(self.__slots__, self._fields(), strict=True)
        return (
            f"{self.__class__.__name__}({', '.join(f'{name}={value!r}' for name, value in fields)})"
        )
