"""All that can be said to pyvmm, as data: what completion and the manual page are made from.

Read off the parsers themselves, and off the help texts of the commands that have none (lab, ctl),
so that a new option is there by itself. Needs nothing that has to be compiled or installed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import NamedTuple

SHELLS = ("bash", "zsh", "fish")
_FILES = re.compile(r"\b(FILE|DIR|PATH|SOCKET)\b")
_WORDS = re.compile(r"[a-z0-9_/.-]+(\|[a-z0-9_/.-]+)+")
_LAB_OPTION = re.compile(r"  (--[a-z][\w-]*)(?: (\S+))?(?: .*)?")
_FROM_COLUMN = 27
"""Where the lab's help texts begin."""


class Option(NamedTuple):
    """One option. `metavar` is "" for a flag; `words` are all the values that it may have, where
    that is so; `names_files` whether its value is a file's name, or begins with one."""

    names: tuple[str, ...]
    help: str
    metavar: str = ""
    is_optional: bool = False
    """Whether it may stand without its value."""
    is_repeatable: bool = False
    words: tuple[str, ...] = ()

    @property
    def names_files(self) -> bool:
        return bool(_FILES.search(self.metavar))


class Command(NamedTuple):
    """One command. `positions`: what may stand at each place after its name, words or, where there
    are none, a file's name; the last one may repeat. `text` is help that is no option's."""

    name: str
    summary: str
    options: tuple[Option, ...]
    positions: tuple[tuple[str, ...], ...] = ()
    text: str = ""
    usage: str = ""

    @property
    def option_names(self) -> list[str]:
        """All names of all options."""
        return [name for option in self.options for name in option.names]


def commands() -> list[Command]:
    """Every command, run first."""
    from vmm.cli.parsers import PARSERS
    from vmm.cli.run_options import build_parser

    run = build_parser()
    found = [_of_parser("run", run, "run a virtual machine; the command where none is given")]
    found += [_of_parser(name, make()) for name, make in PARSERS.items()]
    found += [_lab(), _ctl()]
    found.append(Command("help", "show a command's options", (), (tuple(c.name for c in found),)))
    return found


def with_a_runs(lab: Command, run: Command) -> Command:
    """The lab's options and those of the run that it takes inside, as one."""
    theirs = {option.names: option for option in run.options}
    mine = []
    for option in lab.options:
        other = theirs.pop(option.names, None)
        mine.append(option if other is None else other._replace(words=option.words))
    return lab._replace(options=(*mine, *theirs.values()))


def _of_parser(name: str, parser: argparse.ArgumentParser, summary: str = "") -> Command:
    options, positions = [], []
    for action in parser._actions:
        if action.option_strings:
            options.append(_option(action))
        else:
            words = _words(action.metavar) if isinstance(action.metavar, str) else ()
            positions.append(tuple(action.choices or words))
    text = parser.description or ""
    return Command(
        name,
        summary or _first_sentence(text),
        tuple(options),
        tuple(positions),
        f"{text.strip()}\n\n{(parser.epilog or '').strip()}".strip(),
    )


def _option(action: argparse.Action) -> Option:
    metavar = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    word = metavar if isinstance(metavar, str) else " ".join(metavar)
    if action.nargs == 0:
        word = ""
    words = tuple(map(str, action.choices or ())) or _words(word)
    return Option(
        tuple(action.option_strings),
        (action.help or "").replace("%%", "%"),
        word,
        action.nargs == "?",
        isinstance(action, argparse._AppendAction) or action.dest == "policy_arg",
        words,
    )


def _words(metavar: str) -> tuple[str, ...]:
    """ "auto|attributes|..." as words; nothing where it is not all words."""
    words = metavar.removesuffix("|...")
    return tuple(words.split("|")) if _WORDS.fullmatch(words) else ()


def _first_sentence(text: str) -> str:
    sentence = re.split(r"[.:;](?:\s|$)", " ".join(text.split()), maxsplit=1)[0]
    return sentence[:1].lower() + sentence[1:]


def _lab() -> Command:
    from vmm.lab.options import HELP

    usage, _, rest = HELP.partition("\n\n")
    about, _, _ = rest.partition("\n\n")
    return Command(
        "lab",
        "run pyvmm in a machine under full emulation that has a hardware-like KVM",
        tuple(_lab_options(HELP)),
        text=about,
        usage=usage,
    )


def _lab_options(text: str) -> Iterator[Option]:
    found: dict[str, Option] = {}
    lines = text.splitlines()
    for number, line in enumerate(lines):
        match = _LAB_OPTION.fullmatch(line)
        if match is None:
            continue
        name, metavar = match[1], match[2] or ""
        if metavar[:1].islower() and not _words(metavar) and "." not in metavar:
            # A value that is told by itself ("--host bochs"), or a flag's help, close to its name.
            if name not in found:
                found[name] = Option((name,), "", "NAME", is_repeatable=True)
            option = found[name]
            found[name] = option._replace(
                words=(*option.words, metavar), help=f"{option.help} {metavar}".strip()
            )
            continue
        is_alone = not line[:_FROM_COLUMN].endswith(" ")  # too long for a help text beside it
        help_lines = ["" if is_alone else line[_FROM_COLUMN:]]
        for more in lines[number + 1 :]:
            if not more.startswith(" " * _FROM_COLUMN):
                break
            help_lines.append(more[_FROM_COLUMN:])
        text = " ".join(" ".join(help_lines).split())
        found[name] = Option((name,), text, metavar, is_repeatable=bool(metavar))
    yield from found.values()


def _ctl() -> Command:
    from vmm.cli.ctl import COMMANDS, USAGE

    usage, _, about = USAGE.partition("\n\n")
    return Command(
        "ctl",
        "ask a running pyvmm (--control PATH) for something, or follow its events",
        (),
        ((), COMMANDS),
        about,
        usage,
    )
