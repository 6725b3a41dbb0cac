"""What `typing` and `enum` offer, for the modules that every start imports, without importing them.

`typing` takes longer to import than KVM takes to make a VM, and `enum` three milliseconds. A
type checker sees their real names here; the running program gets stand-ins that do what is left to
do at run time: nothing, but for NamedTuple and Enum. Modules that use NamedTuple need
`from __future__ import annotations`, as all of ours have it.
"""

from __future__ import annotations

__all__ = [
    "TYPE_CHECKING",
    "Any",
    "Enum",
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
    from enum import Enum
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

    class _Members(type):
        """Makes each public value in a class's body the one object of its name."""

        def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, object]) -> type:
            values = {
                key: body.pop(key)
                for key in tuple(body)
                if key[0] != "_" and not hasattr(body[key], "__get__")
            }
            made = super().__new__(cls, name, bases, body)
            made.__members__ = {}
            for key, value in values.items():
                member = made.__members__[key] = object.__new__(made)
                member.name, member.value = key, value
                setattr(made, key, member)
            return made

        def __call__(cls, value: object) -> object:
            for member in cls:
                if member.value == value:
                    return member
            raise ValueError(f"{value!r} is not a valid {cls.__name__}")

        def __iter__(cls) -> object:
            return iter(cls.__members__.values())

        def __len__(cls) -> int:
            return len(cls.__members__)

        def __contains__(cls, value: object) -> bool:
            return isinstance(value, cls)

        def __getitem__(cls, name: str) -> object:
            return cls.__members__[name]

    class Enum(metaclass=_Members):
        """As enum's, for plain values: members by attribute, name, value and in order. They are
        equal to themselves only, and hashed as quickly as any object."""

        def __repr__(self) -> str:
            return f"<{type(self).__name__}.{self.name}: {self.value!r}>"

        def __str__(self) -> str:
            return f"{type(self).__name__}.{self.name}"

        def __reduce__(self) -> tuple[object, ...]:  # copies and pickles are the member itself
            return type(self), (self.value,)
