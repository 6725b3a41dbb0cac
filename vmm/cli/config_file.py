"""`--config FILE.toml`: a run's options from a file, in the words of the command line.

What the file says becomes words of the command line, so that there is one reader of options. An
option that stands on the command line replaces the file's. Paths are relative to the file. The
table [lab] has the options of `pyvmm lab`, which a plain run leaves alone.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vmm.cli.grammar import Option, commands
from vmm.core.errors import UsageError
from vmm.core.given import read_given
from vmm.core.near import did_you_mean

OPTION = "--config"
_MOST = 1 << 20
"""Bytes of a file that are read."""
_NOT_HERE = ("--help", "-h", "--version", OPTION)
_FILE = r"(?:FILE|DIR|PATH|SOCKET)\b"
_SETTING = re.compile(rf"([\w-]+)={_FILE}")
_DEBIAN = re.compile(r"debian:|payload$|pkvm-guest$")
"""Kernels that the lab has by name."""
_ALTERNATIVE = re.compile(r"\|PATH$")
"""A number, or a path: PORT|PATH."""
_NO_FILE = re.compile("[A-Z]+=")
"""A root disk's file system by its UUID=, LABEL= and so on."""


def expanded(words: Sequence[str], *, lab: bool = False) -> list[str]:
    """A run's words (or the lab's: `lab`) with what the file says in front of them. The last of
    several files counts. Raises UsageError, which names the file and the key."""
    own, program = list(words), list[str]()
    if lab and "--lab-exec" in own:
        at = own.index("--lab-exec")
        own, program = own[:at], own[at:]
    path, own = _taken(own)
    if path is None:
        return [*own, *program]
    first = own[:1] if own[:1] == ["run"] else []
    own = own[len(first) :]
    given = {word.partition("=")[0] for word in own + program if word.startswith("-")}
    return [*first, *_File(path).words(given, lab=lab), *own, *program]


def _taken(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file that is named, and the other words."""
    path, rest, left = None, list[str](), list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name != OPTION:
            rest.append(word)
            continue
        if not equals:
            value = left.pop(0) if left and not left[0].startswith("-") else ""
        if not value:
            raise UsageError(f"argument {OPTION}: expected one argument; see pyvmm --help")
        path = value
    return path, rest


class _File:
    """One such file, read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._folder = os.path.dirname(path)
        text = read_given(path, f"{OPTION} {path}", "give a TOML file", most=_MOST)
        try:
            self._values = tomllib.loads(text.decode())
        except UnicodeDecodeError as error:
            raise UsageError(f"{OPTION} {path} is not TOML: it is not UTF-8: {error}") from None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            reason = "it is nested too deep" if isinstance(error, RecursionError) else error
            raise UsageError(f"{OPTION} {path} is not TOML: {reason}") from None
        if any("\0" in each for each in _texts(self._values)):
            raise UsageError(
                f"{OPTION} {path}: a text has a NUL character, which no option takes; leave it out"
            )

    def words(self, given: set[str], *, lab: bool) -> list[str]:
        """The options that are not `given` already."""
        known = {command.name: _by_name(command.options) for command in commands()}
        table = self._values.pop("lab", {})
        if not isinstance(table, dict):
            raise self._error("lab", table, "a table, as in [lab]")
        words = self._of_table("", self._values, known["run"], given)
        of_lab = self._of_table("lab.", table, known["lab"], given)  # misspelt keys are told always
        return [*of_lab, *words] if lab else words

    def _of_table(
        self,
        where: str,
        table: Mapping[str, Any],
        known: Mapping[str, Option],
        given: set[str],
    ) -> list[str]:
        words: list[str] = []
        for key, value in table.items():
            option = known.get(f"--{key}") or known.get(f"-{key}")
            if key == "policy-arg":
                raise self._error(key, value, 'it into a table [[policy]], beside policy = "..."')
            if option is None or option.names[-1] in _NOT_HERE:
                hint = _hint(key, known)
                raise UsageError(f"{OPTION} {self._path}: {where}{key} is no option{hint}")
            if option.names[-1] in given:
                continue
            if key == "policy":
                words += self._policies(value)
            else:
                words += self._of_option(f"{where}{key}", option, value)
        return words

    def _of_option(self, key: str, option: Option, value: Any) -> list[str]:
        name = option.names[-1]
        values = value if isinstance(value, list) and option.is_repeatable else [value]
        words = []
        for each in values:
            if isinstance(each, bool) and (not option.metavar or option.is_optional):
                words += [name] if each else []
            elif not option.metavar:
                raise self._error(key, each, "true or false")
            elif isinstance(each, str) or (type(each) is int and each >= 0):
                value = self._placed(option, str(each))
                alone = option.is_optional or value[:1] in ("", "-")
                words += [f"{name}={value}"] if alone else [name, value]
            else:
                several = ", or a list of them" if option.is_repeatable else ""
                raise self._error(key, each, f"a text or a whole number{several}")
        return words

    def _policies(self, value: Any) -> list[str]:
        """ "MODULE:CLASS", or a table of it and its arguments, or a list of these."""
        words = []
        for each in value if isinstance(value, list) else [value]:
            table = {"policy": each} if isinstance(each, str) else each
            if not isinstance(table, dict) or not isinstance(table.get("policy"), str):
                raise self._error(
                    "policy", each, '"MODULE:CLASS", or a table of policy and policy-arg'
                )
            for key in table.keys() - {"policy", "policy-arg"}:
                hint = _hint(key, ("policy", "policy-arg"))
                raise UsageError(f"{OPTION} {self._path}: policy.{key} is no option{hint}")
            place, _, name = table["policy"].rpartition(":")
            spec = f"{self._path_of(place)}:{name}" if place.endswith(".py") else table["policy"]
            words.append(f"--policy={spec}")
            arguments = table.get("policy-arg", {})
            if not isinstance(arguments, dict):
                raise self._error("policy-arg", arguments, "a table of NAME = VALUE")
            for argument, content in arguments.items():
                if not isinstance(content, str | int | float):
                    raise self._error(f"policy-arg.{argument}", content, "a text or a number")
                text = ("no", "yes")[content] if isinstance(content, bool) else content
                words.append(f"--policy-arg={argument}={text}")
        return words

    def _placed(self, option: Option, value: str) -> str:
        """`value` with the paths in it relative to the file's folder."""
        if not self._folder:
            return value
        metavar = option.metavar
        if _ALTERNATIVE.search(metavar) and not value.isdigit():
            return self._path_of(value)
        if re.fullmatch(_FILE, metavar):
            return value if _DEBIAN.match(value) else self._path_of(value)
        # A comma in a setting's value is written twice.
        words = [word.replace("\0", ",") for word in value.replace(",,", "\0").split(",")]
        keys = set(_SETTING.findall(metavar))
        key, equals, _ = words[0].partition("=")
        is_setting = bool(equals) and key in keys
        if re.match(_FILE, metavar) and not (is_setting or _NO_FILE.match(words[0])):
            words[0] = self._path_of(words[0])
        for at, word in enumerate(words):
            key, equals, path = word.partition("=")
            if equals and key in keys:
                words[at] = f"{key}={self._path_of(path)}"
        return ",".join(word.replace(",", ",,") for word in words)

    def _path_of(self, path: str) -> str:
        """ "-" is standard output."""
        return path if path in ("", "-") else os.path.join(self._folder, path)

    def _error(self, key: str, value: object, wanted: str) -> UsageError:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
        return UsageError(f"{OPTION} {self._path}: {key} is {shown}; write {wanted}")


def _texts(value: object) -> Iterator[str]:
    """All texts in what a file says."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _by_name(options: Sequence[Option]) -> dict[str, Option]:
    return {name: option for option in options for name in option.names}


def _hint(key: str, known: Sequence[str] | Mapping[str, object]) -> str:
    near = did_you_mean(key, (name.lstrip("-") for name in known))
    return f"; {near}" if near else "; the keys are the options' names, as pyvmm --help has them"
