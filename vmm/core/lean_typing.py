"""What `typing` offers, for the modules that every start imports, without importing `typing`.

`typing` takes longer to import than KVM takes to make a VM, and brings `re` and `enum` along. A
type checker sees its real names here; the running program gets stand-ins that do what is left to
do at run time: nothing, but for NamedTuple. Modules that use NamedTuple need
`from __future__ import annotations`, as all of ours have it.
"""

from __future__ import annotations

__all__ = [
    "TYPE_CHECKING",
    "Any",
    "Generic",
    "NamedTuple",
    "NoReturn",
    "Protocol",
    "Self",
    "TypeGuard",
    "TypeVar",
    "TypedDict",
    "cast",
]

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import (
        Any,
        Generic,
        NamedTuple,
        NoReturn,
        Protocol,
        Self,
        TypedDict,
        TypeGuard,
        TypeVar,
        cast,
    )
else:
    from collections import namedtuple

    Any = NoReturn = Self = TypeGuard = object  # for annotations, which nobody evaluates
    TypedDict = dict

    class Protocol:
        """A base that says nothing: classes implement a protocol without inheriting."""

        __slots__ = ()

    class Generic:
        """A base that may be indexed: `Generic[T]`, `RangeMap[int]`."""

        __slots__ = ()

        def __class_getitem__(cls, parameters: object) -> type:
            return cls

    def TypeVar(name: str, **about: object) -> str:
        return name

    def cast(kind: object, value: object) -> object:
        return value

    class _Fields(type):
        """Makes a named tuple of a class whose annotations are its fields."""

        def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, object]) -> type:
            if not bases:
                return super().__new__(cls, name, bases, body)
            fields = body.pop("__annotations__")
            defaults = [body.pop(field) for field in fields if field in body]
            made = namedtuple(name, fields, defaults=defaults, module=body.pop("__module__"))
            del body["__qualname__"]
            for key, value in body.items():
                setattr(made, key, value)
            return made

    class NamedTuple(metaclass=_Fields):
        """As typing's: fields by annotation, defaults, methods, properties."""
