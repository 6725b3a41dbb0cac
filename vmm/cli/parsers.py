"""The words that each command takes, apart from what carries them out: help, completion and the
manual page need nothing else, and are made where nothing is compiled or installed yet."""

from __future__ import annotations

import argparse

from vmm.cli.parser import Parser, add_policy_options

BENCH_SECTIONS = (
    "accessors", "conversions", "exits", "disk", "start-up", "memory", "linux", "iommu",
)  # fmt: skip
QEMU = "qemu-system-x86_64"
DEFAULT_C_BIT = 38


def check_parser() -> Parser:
    """The options of `pyvmm check`."""
    made = Parser(
        prog="pyvmm check",
        description="Probes what this host can do: first which jobs can run, then one line for "
        "each capability.",
        epilog="exit status: 0 a stock kernel with --private-mem can run here, 2 bad usage, "
        "3 it cannot",
        allow_abbrev=False,
    )
    made.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="with each capability the evidence, what it is good for and what to do without it; "
        "with each job why it doesn't use a stronger scheme",
    )
    made.add_argument("--json", action="store_true", help="print JSON, whose keys are stable")
    made.add_argument("--debug", action="store_true", help="show a traceback for errors")
    return made


def selftest_parser() -> Parser:
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
    made.add_argument(
        "--from-trace",
        metavar="DIR",
        help="run no case: write the conversions of this trace as a C program, with --emit-c",
    )
    made.add_argument("--debug", action="store_true", help="show a traceback for errors")
    return made


def bench_parser() -> Parser:
    """The options of `pyvmm bench`."""
    made = Parser(
        prog="pyvmm bench",
        description="Measures ways to reach guest memory, conversions, exits, disks, start-up and "
        "memory, on this host and beside QEMU where there is one, in turns; prints medians with "
        "their quartiles. Takes some ten minutes, with --quick less than two.",
        epilog="exit status: 0 all that could be measured was, 1 something failed, 2 bad usage, "
        "3 there is nothing to measure with",
        allow_abbrev=False,
    )
    made.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    made.add_argument(
        "--only",
        metavar="SECTION",
        action="append",
        choices=BENCH_SECTIONS,
        help=f"one of {', '.join(BENCH_SECTIONS)}; may be given several times (default: all but "
        "linux and iommu)",
    )
    made.add_argument("--rounds", metavar="N", type=int, help="how often each subject has its turn")
    made.add_argument("--json", metavar="FILE", help="write all samples to FILE")
    made.add_argument("--html", metavar="FILE", help="write a page with bars to FILE")
    made.add_argument("--svg", metavar="FILE", help="write a chart to FILE")
    made.add_argument(
        "--compare", metavar=("A", "B"), nargs=2, help="measure nothing: compare two --json files"
    )
    made.add_argument("--qemu", metavar="FILE", help=f"a {QEMU} (default: the one on PATH, if any)")
    made.add_argument(
        "--disk-dir",
        metavar="DIR",
        help="where disk images are made (default: for temporary files)",
    )
    made.add_argument(
        "--kernel",
        metavar="FILE",
        help="for linux, iommu: a stock kernel (iommu without it: the bench guest)",
    )
    made.add_argument(
        "--initrd", metavar="FILE", help="for linux, iommu: an initrd that ends in a shell"
    )
    made.add_argument(
        "--fio", metavar="FILE", help="for linux, iommu: an image with fio in it; pyvmm lab has one"
    )
    made.add_argument("--debug", action="store_true", help="show a traceback for errors")
    return made


def report_parser() -> Parser:
    """The options of `pyvmm report`."""
    made = Parser(
        prog="pyvmm report",
        description="Shows what a run with --trace DIR recorded; two traces are compared side by "
        "side.",
        allow_abbrev=False,
    )
    made.add_argument("traces", metavar="DIR", nargs="+", help="a trace, or two to compare")
    made.add_argument("--json", action="store_true", help="print the summary as JSON")
    made.add_argument("--html", metavar="FILE", help="write a page with charts; needs no network")
    made.add_argument(
        "--plots", metavar="DIR", help="write the charts as PNG files (needs pyvmm[plots])"
    )
    made.add_argument(
        "--chrome", metavar="FILE", help="write a trace that ui.perfetto.dev opens (one DIR only)"
    )
    made.add_argument("--debug", action="store_true", help="show a traceback for errors")
    return made


def replay_parser() -> Parser:
    """The options of `pyvmm replay`."""
    made = Parser(
        prog="pyvmm replay",
        description="Puts the share and unshare requests of a run with --trace DIR to other "
        "policies, offline: what they would have refused, put off or joined, and what it would "
        "have cost by a model learnt from the trace's own latencies. The guest does not react: it "
        "asks for what it asked for, when it did.",
        epilog="Without --policy everything is allowed.",
        allow_abbrev=False,
    )
    made.add_argument("trace", metavar="DIR", help="the trace")
    add_policy_options(made)
    made.add_argument("--json", action="store_true", help="print JSON, whose keys are stable")
    made.add_argument("--debug", action="store_true", help="show a traceback for errors")
    return made


def measure_parser() -> Parser:
    """The options of `pyvmm measure` itself; those of a run are the run's."""
    made = Parser(
        prog="pyvmm measure",
        description="Works out the launch measurement of a strict guest (--private-mem="
        "guest_memfd) from its kernel, initrd and options, without KVM: what the report of such a "
        "run has as launch.measurement. Takes the options of the run; of devices their number "
        "counts.",
        epilog="exit status: 0 it was measured, 2 bad usage or input",
        allow_abbrev=False,
    )
    made.add_argument("--json", action="store_true", help="print all of the report's launch")
    made.add_argument(
        "--c-bit",
        type=int,
        default=DEFAULT_C_BIT,
        metavar="N",
        help="the address bit that picks the private side; the report says it (default 38, which "
        "is what hosts with 39 address bits and more have)",
    )
    made.add_argument("--debug", action="store_true", help="show a traceback for errors")
    return made


def sweep_parser() -> Parser:
    """The options of `pyvmm sweep`."""
    made = Parser(
        prog="pyvmm sweep",
        description="Runs every combination of policies, their parameters, kernels, workloads and "
        "repetitions that a TOML file lists, and stores each result once. Started again it goes on "
        "where it was: what has a result is not run again, unless the policy or the trace has "
        "changed.",
        allow_abbrev=False,
    )
    made.add_argument("sweep", metavar="FILE.toml", help="the sweep's definition")
    made.add_argument(
        "--store", metavar="FILE", help="where results are (default: FILE.sqlite beside FILE.toml)"
    )
    made.add_argument(
        "--workers", metavar="N", type=int, help="processes here (default: one per processor)"
    )
    made.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a Dask scheduler, as in tcp://host:8786, whose workers run the cells (needs "
        "pyvmm[sweep])",
    )
    made.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    made.add_argument(
        "--results-only", action="store_true", help="run nothing, show what is stored"
    )
    text = made.add_mutually_exclusive_group()
    text.add_argument("--json", action="store_true", help="print JSON, whose keys are stable")
    text.add_argument("--csv", action="store_true", help="print CSV, a line for each cell")
    made.add_argument("--html", metavar="FILE", help="write a page with Pareto plots")
    made.add_argument(
        "--svg", metavar="FILE", help="write the Pareto plots as SVG (needs pyvmm[plots])"
    )
    made.add_argument("--debug", action="store_true", help="show a traceback for errors")
    return made


def completion_parser() -> Parser:
    """The words of `pyvmm completion`."""
    made = Parser(
        prog="pyvmm completion",
        description="Prints the script that completes pyvmm's commands, options and their values.",
        epilog=_COMPLETION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("shell", metavar="bash|zsh|fish", help="the shell that is to complete them")
    made.add_argument("--debug", action="store_true", help="show a traceback for errors")
    return made


_COMPLETION = """\
To have it always:
  bash   pyvmm completion bash > ~/.local/share/bash-completion/completions/pyvmm
  zsh    pyvmm completion zsh > DIR/_pyvmm, with DIR in $fpath (before compinit)
  fish   pyvmm completion fish > ~/.config/fish/completions/pyvmm.fish
In this shell alone: source <(pyvmm completion bash); for fish: pyvmm completion fish | source
"""


PARSERS = {
    "check": check_parser,
    "selftest": selftest_parser,
    "bench": bench_parser,
    "report": report_parser,
    "replay": replay_parser,
    "sweep": sweep_parser,
    "measure": measure_parser,
    "completion": completion_parser,
}
"""By command; run's are in vmm.cli.run_options, the lab's and ctl's are no argparse's."""
