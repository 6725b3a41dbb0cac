"""`pyvmm report`: what a trace says, as text, JSON, a page, pictures, or for Perfetto."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack, closing

from vmm.cli import process
from vmm.cli.output import aligned, printing
from vmm.cli.parsers import report_parser as parser
from vmm.core.errors import UsageError, one_line
from vmm.core.output import Output
from vmm.trace.layout import COLUMNS, SIDECAR
from vmm.trace.reader import Trace
from vmm.trace.summary import summarise
from vmm.trace.views.tables import Summary, refusal_lines, tables


def run(arguments: Sequence[str]) -> int:
    """The whole command; raises UsageError."""
    options = parser().parse_args(arguments)
    if len(options.traces) > 2:
        raise UsageError(f"{len(options.traces)} traces; pyvmm report compares two at most")
    if options.html and options.chrome and _is_same(options.html, options.chrome):
        raise UsageError(f"--html and --chrome both write {options.html}; give another path")
    if options.chrome and len(options.traces) > 1:
        raise UsageError("--chrome takes one trace; give a single DIR")
    with ExitStack() as opened:
        pages = {
            option: opened.enter_context(
                closing(Output(f"--{option} {path}", path, _parts(options.traces)))
            )
            for option in ("html", "chrome")
            if (path := getattr(options, option))
        }
        if process.is_ours():
            _enter_sandbox(options)
        traces = [opened.enter_context(closing(Trace(path))) for path in options.traces]
        summaries = [summarise(trace) for trace in traces]
        _write_views(options, pages, traces, summaries)
    show(summaries, as_json=options.json)
    return 0


def _parts(traces: Sequence[str]) -> list[str]:
    """What the traces are made of; a view may lie beside that."""
    names = [SIDECAR, *(column.name for column in COLUMNS)]
    return [os.path.join(trace, name) for trace in traces for name in names]


def _is_same(one: str, other: str) -> bool:
    return one != "-" and os.path.realpath(one) == os.path.realpath(other)


def _enter_sandbox(options: Namespace) -> None:
    """Traces come from anywhere: what reads them reaches them, and where the views go."""
    from vmm.sandbox.enter import enter

    folders = [os.path.dirname(path) or "." for path in (options.html, options.chrome) if path]
    if options.plots:
        from vmm.trace.views.plots import prepare

        prepare(options.plots)  # matplotlib makes caches of its own
        folders.append(options.plots)
    enter("auto", kept=(), folders=folders, reads=options.traces, maps=True)


def _write_views(
    options: Namespace, pages: dict[str, Output], traces: list[Trace], summaries: list[Summary]
) -> None:
    if "html" in pages:
        from vmm.trace.views.page import write_page

        write_page(pages["html"], traces, summaries)
    if options.plots:
        from vmm.trace.views.plots import write_plots

        write_plots(options.plots, traces, summaries)
    if "chrome" in pages:
        from vmm.trace.views.chrome import write_chrome

        write_chrome(pages["chrome"], traces[0])


def show(summaries: list[Summary], *, as_json: bool) -> None:
    """Print to stdout; a reader that has seen enough is no error."""
    with printing():
        if as_json:
            print(json.dumps({"traces": summaries}, indent=2))
        elif sys.stdout.isatty():
            _print_rich(summaries)
        else:
            print("\n".join(plain_lines(summaries)))


def plain_lines(summaries: list[Summary]) -> list[str]:
    """Aligned text; with two traces a last column says how the second compares."""
    made = tables(summaries)
    label = max(len(row.label) for table in made for row in table.rows) + 2
    lines: list[str] = []
    for table in made:
        lines += [table.title, *aligned(table.rows, label), ""]
    return [one_line(line) for line in [*lines, *_refusals(summaries)]]


def _refusals(summaries: list[Summary]) -> list[str]:
    lines = []
    for summary in summaries:
        where = f" in {summary['path']}" if len(summaries) > 1 else ""
        told = refusal_lines(summary)
        lines += [f"refusals{where}", *(f"  {line}" for line in told or ["none"])]
    return lines


def _print_rich(summaries: list[Summary]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    for table in tables(summaries):
        shown = RichTable(box=box.SIMPLE, show_header=False, pad_edge=False, title_justify="left")
        shown.title = Text(table.title, style="bold")
        for row in table.rows:
            cells = [Text(one_line(cell)) for cell in row.cells]
            shown.add_row(Text(row.label, style="dim"), *cells, Text(row.change, style="cyan"))
        console.print(shown)
    for number, line in enumerate(_refusals(summaries)):
        console.print(Text(one_line(line), style="" if number else "bold"))
