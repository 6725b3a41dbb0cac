"""The library's page of the documentation, made from its docstrings.

python -m vmm.library.reference > vmm/docs/reference/library.md
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import vmm

PAGE = Path(vmm.__file__).parent / "docs" / "reference" / "library.md"

_HEAD = """\
# The library: `import vmm`

<!-- Made from docstrings by `python -m vmm.library.reference`: change those, not this page. -->

What this page lists is public: `vmm.__all__` has the same names, with types (py.typed), and they
stay. Everything else in `vmm` may change at any time; a subclass of a scheme or a backing of
pyvmm's own is at home in that part, and may have to follow.

Sizes are bytes, addresses are guest-physical, times are seconds, unless a name says otherwise.
What keeps a machine from starting is a `UsageError` or a `HostError`, as in the command.
"""

SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "A machine": (
        "Several machines may run in one process, started on any thread. None of them touches a "
        "signal, the terminal or a standard stream.",
        ("Machine", "MachineConfig", "Outcome", "Report"),
    ),
    "Events": (
        "`for event in machine.events(): ...` in any thread; ask for them before `start`. A "
        "`MachineEvent` is one of the four. A machine that nobody follows notes nothing.",
        ("Events", "Requested", "Changed", "Noted", "Lost"),
    ),
    "Guest memory": ("", ("Kind", "Range", "PageState")),
    "Policies": (
        "Decisions and events are in [vmm.policy](policies.md).",
        ("Policy",),
    ),
    "Your own devices, exits, schemes and backings": (
        "They are given to `Machine` as objects, or named by options: `--device`, "
        "`--exit-handler`, `--scheme` and `--private-mem` take `FILE.py:CLASS`, `MODULE:CLASS`, or "
        "a name that an installed distribution registers as an entry point, in the group "
        "`pyvmm.devices`, `pyvmm.exits`, `pyvmm.schemes`, `pyvmm.backings` or (for `--policy`) "
        "`pyvmm.policies`. What they raise ends the run: `Machine.run` raises an `ExtensionError`, "
        "whose cause it is, and the command shows the traceback of your code alone. "
        "`vmm/examples` has one of each.\n\n"
        "A scheme is a class with the members of `vmm.conversion.scheme.Scheme` and a `like`: the "
        "scheme of pyvmm's own whose VM, guests and backings it takes, and whose constructor's "
        "arguments it gets. A backing is made with the size in bytes and has the members of "
        "`vmm.memory.backing.Backing`; its `like` is `memfd` unless it says otherwise. Both are "
        "most easily derived from one of pyvmm's. An OSError of theirs is an answer, which the "
        "guest gets as an error number.",
        ("PortDevice", "PciDevice", "VirtioDevice", "ExitHandler"),
    ),
    "Sweeps": ("[Sweeps](sweep.md) has what a plan may say.", ("sweep",)),
    "Errors": (
        "",
        (
            "PyvmmError", "UsageError", "HostError", "OutputError", "GuestFailure", "NotRunning",
            "PolicyError", "ExtensionError", "GuestMemoryError", "UnmappedAccess", "PrivateAccess",
            "AccessDenied",
        ),
    ),
}  # fmt: skip
"""By heading: a text, and the names."""

_PYVMMS = frozenset(
    {
        "make_console", "running", "observer", "extensions", "guest_options", "as_ours", "validate",
        "connect", "raised", "follow", "finish", "is_asserted", "go_on", "answer_these",
        "answer_all", "disconnect",
    }
)  # fmt: skip
"""Members that pyvmm itself has a use for, and nobody else."""


def page() -> str:
    """The page, as Markdown."""
    parts = [_HEAD]
    for heading, (text, names) in SECTIONS.items():
        parts.append(f"\n## {heading}\n")
        if text:
            filled = (textwrap.fill(paragraph, 100) for paragraph in text.split("\n\n"))
            parts.append("\n" + "\n\n".join(filled) + "\n")
        parts += [_described(name, getattr(vmm, name)) for name in names]
    return _fenced("".join(parts))


def _fenced(text: str) -> str:
    """The same with a docstring's indented code as Python that readers aren't to run as it is."""
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        if line and not inside and line.startswith("    ") and not lines[-1]:
            inside = True
            lines.append("```python parse")
        elif inside and line and not line.startswith("    "):
            inside = False
            lines.insert(len(lines) - 1, "```")  # before the empty line
        lines.append(line[4:] if inside else line)
    return "\n".join(lines)


def _described(name: str, thing: Any) -> str:
    if inspect.isfunction(thing):
        return f"\n### `{name}`\n\n`{name}{_signature(thing)}`\n\n{_text(thing.__doc__)}\n"
    bases = [base.__name__ for base in thing.__mro__[1:2] if base.__name__ in vmm.__all__]
    bases = [base for base in bases if base != name]
    derived = f" ({bases[0]})" if bases else ""
    lines = [f"\n### `{name}`{derived}\n"]
    if "__init__" in vars(thing) and "Machine" in name:
        lines.append(f"\n`{name}{_signature(vars(thing)['__init__'])}`\n")
        lines.append(f"\n{_text(thing.__doc__)}\n\n{_text(vars(thing)['__init__'].__doc__)}\n")
    else:
        lines.append(f"\n{_text(thing.__doc__)}\n")
    members = list(_members(thing))
    if members:
        lines.append("\n")
    for member, about in members:
        first, *rest = about.split("\n") if about else ("",)
        more = "".join(f"\n  {line}".rstrip() for line in rest)
        lines.append(f"- `{member}`{': ' if first else ''}{first}{more}\n")
    return "".join(lines)


def _members(thing: type) -> Iterator[tuple[str, str]]:
    """Each public member as it is written, with what is said of it; a base's after a class's."""
    seen: set[str] = set()
    for kind in thing.__mro__:
        if not kind.__module__.startswith("vmm."):
            continue
        if kind is not thing and kind.__name__ in vmm.__all__ and kind.__name__ != thing.__name__:
            continue  # described by itself
        for name, annotation, default, about in _fields(kind):
            if name not in seen and name not in _PYVMMS:
                seen.add(name)
                typed = f": {annotation}" if annotation else ""
                yield f"{name}{typed}{f' = {default}' if default else ''}", about
        for name, value in vars(kind).items():
            if name in seen or name in _PYVMMS or name.startswith("_"):
                continue
            seen.add(name)
            if isinstance(value, property):
                yield name, _text(value.__doc__)
            elif inspect.isfunction(value):
                said = value.__doc__ or _base_doc(kind, name)
                yield f"{name}{_signature(value)}", _text(said)


def _base_doc(kind: type, name: str) -> str | None:
    return next((getattr(b, name).__doc__ for b in kind.__mro__[1:] if hasattr(b, name)), None)


@cache
def _source(module: str) -> tuple[str, ast.Module]:
    text = inspect.getsource(importlib.import_module(module))
    return text, ast.parse(text)


def _fields(kind: type) -> Iterator[tuple[str, str, str, str]]:
    """Fields of a class as its source has them: name, annotation, default, the string below."""
    source, tree = _source(kind.__module__)

    def written(node: ast.AST | None) -> str:
        return "" if node is None else ast.get_source_segment(source, node) or ""

    body = next(
        (
            node.body
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and node.name == kind.__name__
        ),
        [],
    )
    for node, following in zip(body, [*body[1:], None], strict=True):
        about = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            about = _text(str(following.value.value))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, annotation, default = (
                node.target.id, written(node.annotation), written(node.value)
            )  # fmt: skip
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, annotation, default = node.targets[0].id, "", written(node.value)
        else:
            continue
        if not name.startswith("_"):
            yield name, annotation, default, about


def _signature(function: Any) -> str:
    """As it is written, without `self`."""
    found = inspect.signature(function)
    parameters = [
        p.replace(annotation=_Written(p.annotation))
        for p in found.parameters.values()
        if p.name != "self"
    ]
    returned = _Written(found.return_annotation)
    text = str(found.replace(parameters=parameters, return_annotation=returned))
    return text.removesuffix(" -> None")


class _Written:
    """An annotation, shown as the source has it and not as the string that it is."""

    def __init__(self, text: object) -> None:
        self.text = text

    def __repr__(self) -> str:
        return str(self.text)


def _text(doc: str | None) -> str:
    return textwrap.dedent(inspect.cleandoc(doc or ""))


if __name__ == "__main__":
    print(page(), end="")
