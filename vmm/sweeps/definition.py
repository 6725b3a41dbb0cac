"""A sweep's definition: the grid, as a TOML file or a mapping says it, and the cells in it."""

from __future__ import annotations

import itertools
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vmm.core.errors import UsageError
from vmm.core.given import read_given
from vmm.core.near import did_you_mean

MOST_CELLS = 1_000_000
MOST_SECONDS = 1_000_000.0
_MOST_TEXT = 16 << 20
_DEFAULT_SECONDS = 600.0
KINDS = ("replay", "scenario", "kvm", "lab")
_TOP = ("name", "seed", "repetitions", "time_limit", "kernel", "policy", "workload")
_POLICY = ("name", "use", "parameters", "stack", "files")
_WORKLOAD = ("name", "kernel", "parameters", "files", "model", "input", *KINDS)
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,200}")
_KVM: Mapping[str, type | tuple[type, ...]] = {
    "kernel": str,
    "initrd": str,
    "append": str,
    "memory": (str, int),
    "cpus": int,
    "private_memory": str,
    "scheme": str,
    "disks": list,
    "rng": bool,
    "iommu": bool,
    "seconds": (int, float),
}
Parameters = tuple[tuple[str, str], ...]


class PolicyChoice(NamedTuple):
    """What decides in a cell: policies in their order, each with its NAME=VALUE words."""

    name: str
    parameters: Parameters
    stack: tuple[tuple[str, tuple[str, ...]], ...]
    files: tuple[tuple[str, str], ...]
    """Files beside the policy's own, by name."""

    @property
    def label(self) -> str:
        """The name with the parameters."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.parameters)])


class Workload(NamedTuple):
    """What a cell's guest does; `about` is what its kind takes, {kernel} filled in."""

    name: str
    kind: str
    kernel: str | None
    parameters: Parameters
    about: Mapping[str, Any]
    files: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        """The name with the kernel and the parameters."""
        words = [self.name] if self.kernel is None else [self.name, self.kernel]
        return " ".join([*words, *(f"{name}={value}" for name, value in self.parameters)])


class Cell(NamedTuple):
    """One run of the grid."""

    policy: PolicyChoice
    workload: Workload
    repetition: int

    def words(self, text: Any) -> Any:
        """`text`, or all text in it, with {repetition} filled in."""
        return _filled(text, {"repetition": str(self.repetition)})


class Definition(NamedTuple):
    """The whole grid. Paths in it start from `folder`."""

    name: str
    folder: str
    seed: int
    repetitions: int
    seconds: float
    """How long a cell may take."""
    policies: tuple[PolicyChoice, ...]
    workloads: tuple[Workload, ...]

    def cells(self) -> Iterator[Cell]:
        """All of them; every policy and workload once before any is repeated."""
        for repetition in range(self.repetitions):
            for workload in self.workloads:
                for policy in self.policies:
                    yield Cell(policy, workload, repetition)

    def __len__(self) -> int:
        return len(self.policies) * len(self.workloads) * self.repetitions

    def path(self, given: str) -> str:
        """A path of the definition as this process opens it."""
        return os.path.join(self.folder, given)


def read(path: str) -> Definition:
    """The definition in a TOML file. Raises UsageError, one line that names the place."""
    remedy = "give a sweep's TOML file"
    text = read_given(path, path, remedy, most=_MOST_TEXT)
    try:
        table = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of 5,000 digits
        raise UsageError(f"{path} is no TOML: {error}; {remedy}") from None
    stem = os.path.splitext(os.path.basename(path))[0]
    return parse(table, path, stem, os.path.dirname(path))


def parse(table: Mapping[str, Any], source: str, name: str, folder: str) -> Definition:
    """A definition from what TOML makes of it; `source` is what errors begin with, `name` what
    the sweep is called where it doesn't say. Raises UsageError."""
    top = _Table(source, "", table, _TOP)
    kernels = top.texts("kernel")
    definition = Definition(
        name=top.name("name") or name,
        folder=folder,
        seed=top.integer("seed", 0, 0, 1 << 63),
        repetitions=top.integer("repetitions", 1, 1, MOST_CELLS),
        seconds=top.number("time_limit", _DEFAULT_SECONDS, MOST_SECONDS),
        policies=tuple(_policies(top.tables("policy", _POLICY))),
        workloads=tuple(_workloads(top.tables("workload", _WORKLOAD), kernels)),
    )
    _require_different(source, "policy", [each.label for each in definition.policies])
    _require_different(source, "workload", [each.label for each in definition.workloads])
    if len(definition) > MOST_CELLS:
        raise UsageError(
            f"{source}: {len(definition.policies)} policies x {len(definition.workloads)} "
            f"workloads x {definition.repetitions} repetitions are {len(definition)} cells; "
            f"{MOST_CELLS} at most"
        )
    return definition


class _Table:
    """A table of the definition: hands out what is known, names the place of what is wrong."""

    def __init__(
        self, source: str, where: str, given: Mapping[str, Any], known: Iterable[str]
    ) -> None:
        self.where = where
        self._source = source
        self._given = given
        known = tuple(known)
        for key in given:
            if key not in known:
                remedy = did_you_mean(str(key), known) or f"known are {', '.join(known)}"
                raise self.error(f"unknown key {key!r}; {remedy}")

    def error(self, what: str) -> UsageError:
        """To be raised."""
        where = f"{self._source}: {self.where}" if self.where else self._source
        return UsageError(f"{where}: {what}")

    def __contains__(self, key: str) -> bool:
        return key in self._given

    def value(self, key: str, kinds: type | tuple[type, ...], what: str) -> Any:
        """The value, of one of those types; None where there is none."""
        found = self._given.get(key)
        wanted = kinds if isinstance(kinds, tuple) else (kinds,)
        is_flag = isinstance(found, bool) and bool not in wanted  # a bool is an int, too
        if found is not None and (is_flag or not isinstance(found, kinds)):
            raise self.error(f"{key} = {found!r} is not {what}")
        return found

    def text(self, key: str) -> str | None:
        found: str | None = self.value(key, str, "text")
        if found is not None and (not found or "\0" in found):
            raise self.error(f"{key} = {found!r}: give some text")
        return found

    def name(self, key: str) -> str | None:
        found = self.text(key)
        if found is not None and not _NAME.fullmatch(found):
            raise self.error(f"{key} = {found!r}: a name is one line of 200 characters at most")
        return found

    def integer(self, key: str, default: int, least: int, most: int) -> int:
        found: int | None = self.value(key, int, "a whole number")
        if found is not None and not least <= found <= most:
            raise self.error(f"{key} = {found}: use {least} to {most}")
        return default if found is None else found

    def number(self, key: str, default: float, most: float) -> float:
        found: float | None = self.value(key, (int, float), "a number")
        if found is not None and not 0 < found <= most:
            raise self.error(f"{key} = {found}: use more than 0, up to {most:g}")
        return default if found is None else float(found)

    def texts(self, key: str) -> tuple[str, ...]:
        """Text, or a list of them; () where there is none."""
        found = self.value(key, (str, list), "text, or a list of it")
        listed = [found] if isinstance(found, str) else found or []
        for each in listed:
            if not isinstance(each, str) or not _NAME.fullmatch(each):
                raise self.error(f"{key} holds {each!r}, which is not a line of text")
        return tuple(listed)

    def table(self, key: str, known: Iterable[str] | None = None) -> _Table:
        found = self.value(key, dict, "a table")
        return self._inner(key, found or {}, known)

    def tables(self, key: str, known: Iterable[str], *, needed: bool = True) -> list[_Table]:
        found = self.value(key, list, f"a list of tables: write [[{key}]]")
        if needed and not found:
            raise self.error(f"there is no [[{key}]]; give one at least")
        made = []
        for number, each in enumerate(found or [], 1):
            if not isinstance(each, dict):
                raise self.error(f"{key} holds {each!r}: write [[{key}]]")
            made.append(self._inner(f"{key} {number}", each, known))
        return made

    def _inner(self, key: str, given: Any, known: Iterable[str] | None) -> _Table:
        where = f"{self.where}, {key}" if self.where else key
        return _Table(self._source, where, given, given if known is None else known)

    def items(self) -> Iterable[tuple[str, Any]]:
        return self._given.items()

    def choices(self) -> list[Parameters]:
        """Of a table of parameters, whose values may be lists: all combinations."""
        axes = []
        for name, value in self.items():
            values = value if isinstance(value, list) else [value]
            if not values:
                raise self.error(f"{name} = []: give one value at least")
            axes.append([(name, self._word(name, each)) for each in values])
        return list(itertools.product(*axes))

    def _word(self, name: str, value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int | float | str) and "\0" not in str(value):
            return str(value)
        raise self.error(f"{name} = {value!r}: give text, a number, true or false")

    def files(self) -> tuple[tuple[str, str], ...]:
        found = self.table("files")
        return tuple((name, found.text(name) or "") for name, _ in found.items())


def _policies(tables: Sequence[_Table]) -> Iterator[PolicyChoice]:
    for table in tables:
        files = table.files()
        name = table.name("name")
        if ("use" in table) == ("stack" in table):
            raise table.error("exactly one of use and stack is needed")
        if "use" in table:
            spec = table.text("use") or ""
            for chosen in table.table("parameters").choices():
                words = tuple(f"{key}={value}" for key, value in chosen)
                yield PolicyChoice(name or _class(spec), chosen, ((spec, words),), files)
            continue
        if "parameters" in table:
            raise table.error("parameters belong to the policies in the stack")
        yield from _stacks(table, name, files)


def _stacks(
    table: _Table, name: str | None, files: tuple[tuple[str, str], ...]
) -> Iterator[PolicyChoice]:
    levels = []
    for inner in table.tables("stack", ("use", "parameters")):
        spec = inner.text("use")
        if spec is None:
            raise inner.error('use = "MODULE:CLASS or FILE.py:CLASS" is missing')
        levels.append([(spec, chosen) for chosen in inner.table("parameters").choices()])
    for stack in itertools.product(*levels):
        several = len(stack) > 1
        parameters = tuple(
            (f"{_class(spec)}.{key}" if several else key, value)
            for spec, chosen in stack
            for key, value in chosen
        )
        yield PolicyChoice(
            name or " + ".join(_class(spec) for spec, _ in stack),
            parameters,
            tuple((spec, tuple(f"{k}={v}" for k, v in chosen)) for spec, chosen in stack),
            files,
        )


def _class(spec: str) -> str:
    return spec.rpartition(":")[2] or spec


def _workloads(tables: Sequence[_Table], kernels: Sequence[str]) -> Iterator[Workload]:
    for table in tables:
        kind = _kind(table)
        about = _ABOUT[kind](table)
        files = table.files()
        own = table.texts("kernel") or tuple(kernels)
        uses = set(_placeholders([about, files]))
        known = {"kernel", "repetition", *(name for name, _ in files)}
        for word in sorted(uses - known):
            remedy = did_you_mean(word, known) or f"known are {', '.join(sorted(known))}"
            raise table.error(f"{{{word}}} stands for nothing; {remedy}")
        if "kernel" in uses and not own:
            raise table.error('{kernel} is used, but there is no kernel = ["...", "..."]')
        if "kernel" in table and "kernel" not in uses:
            raise table.error("kernel is given, but {kernel} is used nowhere")
        default = table.name("name") or _default_name(kind, about)
        for kernel in own if "kernel" in uses else (None,):
            values = {} if kernel is None else {"kernel": kernel}
            for parameters in table.table("parameters").choices():
                yield Workload(
                    # A default name that has the kernel in it would say it twice.
                    default.replace("{kernel}", "").strip("-_/ ") or kind,
                    kind,
                    kernel,
                    parameters,
                    _filled(about, values),
                    _filled(files, values),
                )


def _kind(table: _Table) -> str:
    found = [kind for kind in KINDS if kind in table]
    if len(found) != 1:
        raise table.error(f"exactly one of {', '.join(KINDS)} is needed")
    kind = found[0]
    for key, kinds in (
        ("parameters", ("scenario",)),
        ("model", ("scenario",)),
        ("input", ("lab",)),
    ):
        if key in table and kind not in kinds:
            raise table.error(f"{key} is for {' and '.join(kinds)}, not for {kind}")
    return kind


def _default_name(kind: str, about: Mapping[str, Any]) -> str:
    named = about.get("trace") or about.get("scenario")
    return os.path.basename(os.path.normpath(named)) if isinstance(named, str) else kind


def _about_replay(table: _Table) -> dict[str, Any]:
    return {"trace": table.text("replay")}


def _about_scenario(table: _Table) -> dict[str, Any]:
    return {"scenario": table.text("scenario"), "model": table.text("model")}


def _about_kvm(table: _Table) -> dict[str, Any]:
    inner = table.table("kvm", _KVM)
    found = {key: inner.value(key, kinds, _said(kinds)) for key, kinds in _KVM.items()}
    if "disks" in inner:
        found["disks"] = list(inner.texts("disks"))
    return {key: value for key, value in found.items() if value is not None}


def _said(kinds: type | tuple[type, ...]) -> str:
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    listed = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(words.get(kind, "a list of text") for kind in listed)


def _about_lab(table: _Table) -> dict[str, Any]:
    words = table.value("lab", list, "a list of words")
    for word in words:
        if not isinstance(word, str) or "\0" in word:
            raise table.error(f"lab holds {word!r}, which is not text")
        if word.split("=")[0] in ("--trace", "--policy", "--policy-arg"):
            raise table.error(f"lab holds {word}, which the sweep gives itself; leave it out")
    return {"words": list(words), "input": table.value("input", str, "text") or "poweroff -f\n"}


_ABOUT: Mapping[str, Callable[[_Table], dict[str, Any]]] = {
    "replay": _about_replay,
    "scenario": _about_scenario,
    "kvm": _about_kvm,
    "lab": _about_lab,
}


def _placeholders(text: Any) -> Iterator[str]:
    if isinstance(text, str):
        yield from _PLACEHOLDER.findall(text)
    elif isinstance(text, Mapping):
        yield from _placeholders(list(text.values()))
    elif isinstance(text, list | tuple):
        for each in text:
            yield from _placeholders(each)


def _filled(text: Any, values: Mapping[str, str]) -> Any:
    """Text with its {placeholders} filled in, as far as there are values; containers anew."""
    if isinstance(text, str):
        return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)
    if isinstance(text, Mapping):
        return {key: _filled(value, values) for key, value in text.items()}
    if isinstance(text, list | tuple):
        return type(text)(_filled(each, values) for each in text)
    return text


def filled(text: Any, values: Mapping[str, str]) -> Any:
    """As `Cell.words`, with other placeholders."""
    return _filled(text, values)


def _require_different(source: str, what: str, labels: Sequence[str]) -> None:
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            raise UsageError(
                f"{source}: there are two {what} entries {label!r}; give one another name"
            )
        seen.add(label)
