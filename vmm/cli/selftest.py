"""`pyvmm selftest`: runs the conformance suite on this host's KVM and shows the matrix."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from vmm.arch import architecture
from vmm.cli.output import printing
from vmm.cli.parser import width as columns
from vmm.cli.parsers import selftest_parser as parser
from vmm.core.errors import UsageError, one_line, tell
from vmm.core.output import Output
from vmm.exits.run_loop import install_kick_handler
from vmm.host.kvm import open_kvm
from vmm.selftest.case import Case
from vmm.selftest.cases.all_cases import all_cases
from vmm.selftest.entries import Combination, combinations
from vmm.selftest.platform import KvmPlatform, Platform
from vmm.selftest.runner import Result, as_json, run_matrix

_MARKS = {"pass": "ok", "skip": "-", "fail": "XX"}
_COLOURS = {"XX": "bold red", "FAIL": "bold red", "ok": "green", "-": "dim"}
_COLUMN = 3


def run(arguments: Sequence[str]) -> int:
    """Run everything, print it, and write JSON where that is asked for; the exit status.

    Raises HostError without a KVM, UsageError and OutputError for a file that can't be written.
    """
    options = parser().parse_args(arguments)
    arch = architecture()
    cells = _chosen(options.only, arch.schemes)
    if options.from_trace is not None:
        return _from_trace(options.from_trace, options.emit_c)
    output = None if options.json is None else Output(f"--json {options.json}", options.json)
    cases = all_cases()
    results: list[Result] = []
    install_kick_handler()
    with open_kvm(arch, complete=False) as system:
        platform = KvmPlatform(arch, system)
        for result in run_matrix(platform, cases, cells):
            results.append(result)
            _show_progress(len(results), len(cases) * len(cells), result)
        _show_progress(0, 0, None)
        if options.emit_c is not None:
            emit(platform, results, Path(options.emit_c))
    if output is not None:
        output.write((json.dumps(as_json(results), indent=2) + "\n").encode())
        output.close()
    with printing():
        _print(lines(cases, cells, results))
    return 1 if any(result.status == "fail" for result in results) else 0


def _from_trace(trace: str, directory: str | None) -> int:
    """The trace's conversions as a C program; the exit status. Raises UsageError, HostError."""
    from vmm.selftest.emit_c import write
    from vmm.selftest.from_trace import case_of, cell_of
    from vmm.selftest.recorder import Inexpressible, as_c
    from vmm.trace.reader import Trace

    if directory is None:
        raise UsageError(f"--from-trace {trace}: say with --emit-c DIR where the program is to be")
    with closing(Trace(trace)) as recorded:
        arch, cell, case = architecture(), cell_of(recorded), case_of(recorded)
    install_kick_handler()
    with open_kvm(arch, complete=False) as system:
        try:
            text = as_c(KvmPlatform(arch, system), cell, case)
        except Inexpressible as obstacle:
            raise UsageError(
                f"--from-trace {trace}: it can't be said in C: {obstacle}"
            ) from obstacle
    try:
        path = write(Path(directory), "trace", text)
    except OSError as error:
        raise UsageError(f"--emit-c {directory}: {error.strerror}") from error
    with printing():
        print(f"cc -o {path.with_suffix('')} {path}")
    return 0


def emit(platform: Platform, results: Sequence[Result], directory: Path) -> None:
    """Each failure as a C program in `directory`. Raises UsageError where that can't be written."""
    from vmm.selftest.emit_c import write  # only failures are emitted
    from vmm.selftest.recorder import Inexpressible, as_c

    for result in results:
        if result.status != "fail":
            continue
        where = f"{result.case.name} in {result.combination}"
        if os.uname().machine != "x86_64":
            tell(f"--emit-c: {where}: the C program's guest is x86's")
            continue
        name = re.sub(r"\W", "_", f"{result.case.name}-{result.combination}")
        try:
            path = write(directory, name, as_c(platform, result.combination, result.case))
        except Inexpressible as obstacle:
            tell(f"--emit-c: {where} can't be said in C: {obstacle}")
        except OSError as error:
            raise UsageError(f"--emit-c {directory}: {error.strerror}") from error
        else:
            tell(f"{where} as C: cc -o {path.with_suffix('')} {path}")


def _chosen(names: Sequence[str], schemes: Sequence[str]) -> list[Combination]:
    """The cells of these names, all of the schemes without any. Raises UsageError."""
    there = {str(cell): cell for cell in combinations(schemes)}
    for name in names:
        if name not in there:
            raise UsageError(f"--only {name}: no such cell; there are {', '.join(there)}")
    return [there[name] for name in dict.fromkeys(names)] or list(there.values())


def _show_progress(done: int, total: int, result: Result | None) -> None:
    """One line on a terminal's stderr, written over and over; `result` None takes it away."""
    if sys.stderr is None or not sys.stderr.isatty():
        return
    text = ""
    if result is not None:
        if result.status == "fail":
            sys.stderr.write("\r\033[K")
            tell(f"FAIL {result.case.name} in {result.combination}: {result.reason}")
        text = f"{done}/{total} {result.combination} {result.case.name}"
    sys.stderr.write(f"\r\033[K{text[:79]}")
    sys.stderr.flush()


class Matrix:
    """Results by case and cell."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._by_place = {(r.case.name, r.combination): r for r in results}

    def at(self, case: Case, cell: Combination) -> Result:
        return self._by_place[case.name, cell]


def notes(results: Sequence[Result]) -> Iterator[str]:
    """Every failure, then why what was skipped was skipped, then the sum."""
    for result in results:
        if result.status == "fail":
            yield f"FAIL {result.case.name} in {result.combination}: {result.reason}"
    reasons: dict[str, list[Result]] = {}
    for result in results:
        if result.status == "skip":
            reasons.setdefault(result.reason, []).append(result)
    for reason, skipped in reasons.items():
        yield f"skipped {_where(skipped)}: {reason}"
    counts = {word: sum(r.status == word for r in results) for word in _MARKS}
    seconds = sum(result.seconds for result in results)
    yield (
        f"{counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped "
        f"in {seconds:.1f} s"
    )


def _where(results: Sequence[Result]) -> str:
    """Which cells, in few words."""
    cells = list(dict.fromkeys(str(result.combination) for result in results))
    cases = list(dict.fromkeys(result.case.name for result in results))
    what = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
    where = cells[0] if len(cells) == 1 else f"{len(cells)} cells"
    return f"{what} in {where}"


def lines(
    cases: Sequence[Case], cells: Sequence[Combination], results: Sequence[Result]
) -> Iterator[str]:
    """The cells, numbered; the matrix with a line for each case, under the room that it is of;
    what failed, what was skipped, and the sum."""
    matrix = Matrix(results)
    for number, cell in enumerate(cells, 1):
        yield f"{number:>{_COLUMN}}  {cell}"
    names = {case: case.name.partition(".")[::2] for case in cases}
    width = max(len(name) for _, name in names.values()) + 2
    head = "".join(f"{number:>{_COLUMN}}" for number in range(1, len(cells) + 1))
    room = None
    for case, (room_of_case, name) in names.items():
        if room != room_of_case:
            room = room_of_case
            yield ""
            yield f"{room:<{width}}{head}"
        marks = "".join(f"{_MARKS[matrix.at(case, cell).status]:>{_COLUMN}}" for cell in cells)
        yield f"{f'  {name}':<{width}}{marks}"
    yield ""
    for note in notes(results):
        yield from textwrap.wrap(
            one_line(note), columns(), subsequent_indent="  ", break_on_hyphens=False
        )


def _print(text: Iterator[str]) -> None:
    if not sys.stdout.isatty():
        print("\n".join(text))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in text:
        shown = Text(line)
        for word, style in _COLOURS.items():
            shown.highlight_regex(rf"(?<=\s){word}(?=\s|$)|^FAIL ", style)
        console.print(shown, soft_wrap=True)
