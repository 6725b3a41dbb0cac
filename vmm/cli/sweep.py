"""`pyvmm sweep`: many runs over policies, parameters, kernels and workloads."""

from __future__ import annotations

import json
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from types import FrameType

from vmm.cli.output import printing
from vmm.cli.parsers import sweep_parser as parser
from vmm.core.errors import UsageError, tell
from vmm.core.output import Output
from vmm.sweeps import definition, running
from vmm.sweeps.api import default_store
from vmm.sweeps.results import Results
from vmm.sweeps.running import Progress
from vmm.sweeps.store import Store
from vmm.sweeps.table import lines

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


def run(arguments: Sequence[str]) -> int:
    """The whole command; raises UsageError, OutputError."""
    options = parser().parse_args(arguments)
    _require_fitting(options)
    named = definition.read(options.sweep)
    path = options.store or default_store(options.sweep)
    with ExitStack() as opened:
        outputs = {
            option: opened.enter_context(
                closing(Output(f"--{option} {given}", given, (options.sweep, path)))
            )
            for option in ("html", "svg")
            if (given := getattr(options, option))
        }
        prepared = opened.enter_context(closing(running.Prepared(named)))
        store = opened.enter_context(
            closing(Store(path, named.name, create=not options.results_only))
        )
        interrupted = False
        if options.results_only:
            results = running.stored(prepared.plan, store)
        else:
            try:
                with progress() as shown, interruptible(shown) as told:
                    results = running.run(
                        prepared,
                        store,
                        scheduler=options.scheduler,
                        workers=options.workers,
                        retry_failed=options.retry_failed,
                        told=told,
                    )
            except KeyboardInterrupt:
                interrupted = True
                results = running.stored(prepared.plan, store)
        _write(results, outputs)
    _print(results, options, path)
    if interrupted:
        tell("interrupted; the same command goes on where it was")
        return INTERRUPTED
    return 1 if results.failed and not options.results_only else 0


def _require_fitting(options: Namespace) -> None:
    if options.scheduler and options.workers is not None:
        raise UsageError("--workers is for processes of this machine; leave it or --scheduler out")
    if options.results_only and (options.scheduler or options.retry_failed or options.workers):
        raise UsageError("--results-only runs nothing; leave the options for running out")


def _write(results: Results, outputs: dict[str, Output]) -> None:
    if "html" in outputs:
        from vmm.sweeps.page import write_page

        write_page(outputs["html"], results)
    if "svg" in outputs:
        from vmm.sweeps.plots import write_svg

        write_svg(outputs["svg"], results)


def _print(results: Results, options: Namespace, store: str) -> None:
    with printing():
        if options.json:
            print(json.dumps(results.as_json(), indent=2))
        elif options.csv:
            print(results.as_csv(), end="")
        else:
            print("\n".join(lines(results, store)))


@contextmanager
def interruptible(told: Callable[[Progress], None]) -> Iterator[Callable[[Progress], None]]:
    """Ctrl-C is a KeyboardInterrupt of what hears how far it is, which it does every half second.

    Raised wherever Python happens to be, it may get lost (in a destructor, by Dask's garbage
    collection), or cut short what is being stored. Before the first word, and pressed once more, it
    is raised at once.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield told
        return
    has_begun = pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed or not has_begun:
            signal.default_int_handler(number, frame)
        pressed = True

    def hear(now: Progress) -> None:
        nonlocal has_begun
        has_begun = True
        if pressed:
            raise KeyboardInterrupt
        told(now)

    signal.signal(signal.SIGINT, press)
    try:
        yield hear
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """Where `running.run` says how far it is: a bar on a terminal, else what would look like a
    hang."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield _Waiting()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rest]}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("sweep", total=None, rest="")

        def show(now: Progress) -> None:
            rest = "waiting for workers" if not now.slots else ""
            if now.seconds_left is not None:
                rest = f"{duration_text(now.seconds_left)} left"
            if now.failed:
                rest += f", {now.failed} failed"
            bar.update(task, total=now.cells, completed=now.stored, rest=rest)

        yield show


class _Waiting:
    """Says once that a scheduler has no workers, where that would look as if nothing happened."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, now: Progress) -> None:
        if not now.slots and now.stored < now.cells and not self._said:
            self._said = True
            tell("the scheduler has no workers; waiting for some (Ctrl-C ends it)")


def duration_text(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
