"""`pyvmm selftest`: runs the conformance suite on this host's KVM and shows the matrix."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmm.arch import architecture
from vmm.cli.output import printing
from vmm.cli.parser import Parser
from vmm.core.errors import UsageError, tell
from vmm.core.output import Output
from vmm.exits.run_loop import install_kick_handler
from vmm.host.kvm import open_kvm
from vmm.selftest.case import Case
from vmm.selftest.cases.all_cases import all_cases
from vmm.selftest.entries import Combination, combinations
from vmm.selftest.platform import KvmPlatform, Platform
from vmm.selftest.runner import Result, as_json, run_matrix

_MARKS = {"pass": "ok", "skip": "-", "fail": "FAIL"}
_COLOURS = {"pass": "green", "skip": "dim", "fail": "bold red"}


def parser() -> Parser:
    """The options of `pyvmm selftest`."""
    made = Parser(
        prog="pyvmm selftest",
        description="Tries everything that private memory has to do on this host's KVM: every "
        "case with every scheme and backing. Takes about half a minute.",
        epilog="exit status: 0 nothing failed, 1 something did, 2 bad usage, 3 there is no KVM",
        allow_abbrev=False,
    )
    made.add_argument(
        "--only",
        metavar="SCHEME/BACKING",
        action="append",
        default=[],
        help="these cells alone, as in cbit/guest_memfd; may be given several times",
    )
    made.add_argument("--json", metavar="FILE", help="write the results to FILE as well")
    made.add_argument(
        "--emit-c",
        metavar="DIR",
        help="write each case that fails as a C program that shows it without pyvmm, to compile "
        "with cc; those that C has no words for are named",
    )
    made.add_argument("--debug", action="store_true", help="show a traceback for errors")
    return made


def run(arguments: Sequence[str]) -> int:
    """Run everything, print it, and write JSON where that is asked for; the exit status.

    Raises HostError without a KVM, UsageError and OutputError for a file that can't be written.
    """
    options = parser().parse_args(arguments)
    arch = architecture()
    cells = _chosen(options.only, arch.schemes)
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
        if not (sys.stdout.isatty() and _print_table(cases, cells, results)):
            print("\n".join(plain_lines(cases, cells, results)))
    return 1 if any(result.status == "fail" for result in results) else 0


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


def plain_lines(
    cases: Sequence[Case], cells: Sequence[Combination], results: Sequence[Result]
) -> list[str]:
    """The matrix for a file or a pipe: cells numbered, one line for each case."""
    matrix = Matrix(results)
    lines = [f"{number:>4}  {cell}" for number, cell in enumerate(cells, 1)]
    width = max(len(case.name) for case in cases)
    head = " " * width + "".join(f"{number:>5}" for number in range(1, len(cells) + 1))
    lines += ["", head]
    for case in cases:
        marks = "".join(f"{_MARKS[matrix.at(case, cell).status]:>5}" for cell in cells)
        lines.append(f"{case.name:<{width}}{marks}")
    return [*lines, "", *notes(results)]


def _print_table(
    cases: Sequence[Case], cells: Sequence[Combination], results: Sequence[Result]
) -> bool:
    """A table in colours; False, and nothing, where the terminal is too narrow for it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if console.width < 40 + sum(_column_width(cell) + 2 for cell in cells):
        return False
    matrix = Matrix(results)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", overflow="fold")
    for cell in cells:
        table.add_column(f"{cell.scheme}\n{cell.backing}", justify="center", overflow="fold")
    for case in cases:
        found = [matrix.at(case, cell).status for cell in cells]
        table.add_row(case.title, *(Text(_MARKS[word], style=_COLOURS[word]) for word in found))
    console.print(table)
    for note in notes(results):
        console.print(Text(note, style="bold red" if note.startswith("FAIL") else ""))
    return True


def _column_width(cell: Combination) -> int:
    return max(len(cell.scheme), len(cell.backing))
