"""The manual page pyvmm(1), made from the parsers when the wheel is built. See man(7).

The same tree gives the same bytes: no date, no host, no width of somebody's terminal.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from vmm.cli.grammar import Command, Option, commands
from vmm.cli.run_options import EPILOG

_ABOUT = "userspace virtual machine monitor for guest private memory"


def manual(version: str) -> str:
    """The page as troff text."""
    return "\n".join(_lines(version)) + "\n"


def _lines(version: str) -> Iterator[str]:
    known = commands()
    run = known[0]
    yield f'.TH PYVMM 1 "" "pyvmm {_text(version)}" "User Commands"'
    yield ".SH NAME"
    yield f"pyvmm \\- {_ABOUT}"
    yield ".SH SYNOPSIS"
    yield ".nf"
    yield ".B pyvmm \\fR[\\fBrun\\fR] [\\fIoptions\\fR]"
    yield ".B pyvmm \\fIcommand\\fR [\\fIoptions\\fR]"
    yield ".fi"
    yield ".SH DESCRIPTION"
    description, _, _ = run.text.partition("\n\n")
    yield _text(description)
    yield ".SH COMMANDS"
    for command in known:
        yield ".TP"
        yield f".B {_text(command.name)}"
        yield f"{_sentence(command.summary)}"
    yield ".SH OPTIONS OF A RUN"
    yield from _options(run.options)
    for command in known[1:]:
        if command.options or command.usage:
            yield from _section(command)
    yield ".SH EXAMPLES"
    examples, _, rest = EPILOG.partition("\n\n")
    yield from _verbatim(examples.partition("\n")[2])
    notes, _, status = rest.partition("exit status: ")
    yield ".SH NOTES"
    for line in notes.strip().splitlines():
        yield ".PP"
        yield _text(line)
    yield ".SH EXIT STATUS"
    numbers, _, more = status.strip().partition(";")
    for word in numbers.split(", "):
        number, _, meaning = word.partition(" ")
        yield ".TP"
        yield f".B {number}"
        yield f"{_sentence(meaning)}"
    if more:
        yield ".PP"
        yield _sentence(more)


def _section(command: Command) -> Iterator[str]:
    yield f".SH PYVMM {_text(command.name.upper())}"
    if command.usage:
        yield from _verbatim(command.usage)
    for paragraph in filter(None, command.text.split("\n\n")):
        yield ".PP"
        yield _text(" ".join(paragraph.split()))
    yield from _options(command.options)


def _options(options: tuple[Option, ...]) -> Iterator[str]:
    for option in options:
        names = ", ".join(f"\\fB{_text(name)}\\fR" for name in option.names)
        value = f"\\fI{_text(option.metavar)}\\fR" if option.metavar else ""
        form = f"[={value}]" if option.is_optional else f" {value}" if value else ""
        yield ".TP"
        yield f"{names}{form}"
        yield _sentence(option.help)


def _verbatim(text: str) -> Iterator[str]:
    yield ".PP"
    yield ".nf"
    yield from map(_text, text.splitlines())
    yield ".fi"


def _sentence(text: str) -> str:
    words = " ".join(text.split())
    return _text(f"{words[:1].upper()}{words[1:]}".rstrip(".") + ".")


def _text(text: str) -> str:
    """`text` without a meaning to troff: a backslash, a leading dot or quote, hyphens of code."""
    plain = (
        text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("^", "\\(ha")
    )
    return re.sub(r"(?m)^\.", r"\\&.", plain)


if __name__ == "__main__":
    sys.stdout.write(manual(sys.argv[1]))
