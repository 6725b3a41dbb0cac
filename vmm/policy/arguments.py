"""A policy's declarations: `--policy-arg NAME=VALUE` turned into what its constructor declares,
and whether its hooks can be called."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from vmm.core.errors import UsageError
from vmm.core.near import did_you_mean
from vmm.core.suboptions import byte_size

if TYPE_CHECKING:
    from vmm.policy.protocol import Policy

_FLAGS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def bind(
    make: type[Any], words: Sequence[str], load: Callable[[str, Sequence[str]], object]
) -> dict[str, Any]:
    """The keyword arguments for `make`. Raises UsageError that names the word and the remedy.

    A parameter declared as a policy takes MODULE:CLASS and is given to `load`, together with the
    words for that policy's own arguments: `of=m:C of.limit=3`.
    """
    parameters = _parameters(make)
    given: dict[str, str] = {}
    inner: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        outer, dot, rest = name.partition(".")
        if not equals or not outer:
            raise UsageError(f"--policy-arg {word}: write NAME=VALUE")
        if outer not in parameters:
            known = ", ".join(parameters) or "none at all"
            raise UsageError(f"--policy-arg {word}: {make.__name__} takes {known}")
        if dot:
            inner.setdefault(outer, []).append(f"{rest}={value}")
        elif name in given:
            raise UsageError(f"--policy-arg {word}: {name} is given twice")
        else:
            given[name] = value
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in given]
    if missing:
        raise UsageError(
            f"{make.__name__} needs {', '.join(missing)}; "
            f"give it with --policy-arg {missing[0]}=VALUE"
        )
    for name in inner.keys() - given.keys():
        raise UsageError(f"--policy-arg {name}.{inner[name][0]}: {name}=MODULE:CLASS is missing")
    hints = _hints(make) if given else {}
    result: dict[str, Any] = {}
    for name, text in given.items():
        if name not in hints:
            raise UsageError(
                f"--policy-arg {name}={text}: {make.__name__} declares no type for {name}; "
                f"write {name}: int, float, bool, str or Path there"
            )
        wanted = hints[name]
        if _is_policy(wanted):
            result[name] = load(text, inner.get(name, []))
            continue
        if name in inner:
            raise UsageError(f"--policy-arg {name}.{inner[name][0]}: {name} is not a policy")
        try:
            result[name] = converted(text, wanted)
        except (ValueError, OverflowError):
            raise UsageError(
                f"--policy-arg {name}={text}: {make.__name__} wants {described(wanted)}"
            ) from None
    return result


def _parameters(make: type[Any]) -> dict[str, inspect.Parameter]:
    """What can be given by name; a class without a constructor of its own takes nothing."""
    if make.__init__ is object.__init__:
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(make).parameters
    return {name: parameter for name, parameter in found.items() if parameter.kind in named}


def _hints(make: type[Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(make.__init__)
    except Exception as error:
        raise UsageError(f"{make.__name__}: its constructor's types: {error!r}") from error


def _is_policy(wanted: Any) -> bool:
    from vmm.policy.protocol import Policy

    kinds = typing.get_args(wanted) or (wanted,)
    return any(isinstance(kind, type) and issubclass(kind, Policy) for kind in kinds)


def converted(text: str, wanted: Any) -> Any:
    """`text` as a value of type `wanted`. Raises ValueError."""
    origin = typing.get_origin(wanted)
    if origin in (Union, types.UnionType):
        return _first_that_fits(text, typing.get_args(wanted))
    if origin is Literal:
        return next(value for value in _choices(wanted, text))
    if wanted is bool:
        if text.lower() not in _FLAGS:
            raise ValueError(text)
        return _FLAGS[text.lower()]
    if wanted is int:
        return _integer(text)
    if wanted is type(None):
        if text != "none":
            raise ValueError(text)
        return None
    if wanted in (float, str, Path):
        return wanted(text)
    raise ValueError(text)


def _first_that_fits(text: str, wanted: Sequence[Any]) -> Any:
    # Text and paths take everything: they come last.
    for each in sorted(wanted, key=lambda kind: kind in (str, Path)):
        try:
            return converted(text, each)
        except ValueError:
            continue
    raise ValueError(text)


def _choices(wanted: Any, text: str) -> list[Any]:
    found = [value for value in typing.get_args(wanted) if str(value) == text]
    if not found:
        raise ValueError(text)
    return found


def _integer(text: str) -> int:
    """A number, or a size as in 80M, which is written as everywhere else."""
    digits = text.removeprefix("-")
    size = byte_size(digits.replace("_", "")) if digits[:1].isdigit() else None
    if size is not None:
        return -size if text.startswith("-") else size
    return int(text, 0)


def described(wanted: Any) -> str:
    if wanted is int:
        return "int: a number, or a size as in 80M"
    if wanted is bool:
        return "bool: yes or no"
    return getattr(wanted, "__name__", str(wanted)) if isinstance(wanted, type) else str(wanted)


def require_hooks(policy: Policy) -> None:
    """Raise UsageError for a hook that would never be called, or could not be.

    It would fail open: nobody would be asked about what the policy was written to refuse.
    """
    from vmm.policy.protocol import Policy

    name = type(policy).__name__
    known = [word for word in vars(Policy) if word.startswith("on_")]
    for word in dir(policy):
        if word.startswith("on_") and word not in known and callable(getattr(policy, word)):
            remedy = did_you_mean(word, known) or f"the hooks are {', '.join(known)}"
            raise UsageError(f"{name}.{word} is no hook and would never be called; {remedy}")
    for word in known:
        hook = getattr(policy, word)
        if not callable(hook):
            raise UsageError(f"{name}.{word} is {hook!r}, not a method")
        wanted = list(inspect.signature(getattr(Policy, word)).parameters)[1:]
        try:
            inspect.signature(hook).bind(*wanted)
        except TypeError:
            raise UsageError(
                f"{name}.{word} is called with {len(wanted)} arguments; "
                f"write def {word}(self, {', '.join(wanted)})"
            ) from None
        except ValueError:
            pass  # written in C: it doesn't say what it takes
    if policy.wants("on_save") != policy.wants("on_restore"):
        raise UsageError(
            f"{name} has one of on_save and on_restore; write the other one, too, or what it knows "
            "would be gone after a restore"
        )
