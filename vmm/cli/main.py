"""`pyvmm`: options in, exit status out. 0 guest powered off, 1 guest failed, 2 bad usage or
input, 3 the host cannot do it."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from vmm.cli.parser import Parser, add_policy_options
from vmm.core.errors import HostError, PyvmmError, tell

if TYPE_CHECKING:
    from vmm.machine.config import MachineConfig

_DESCRIPTION = """\
Runs a virtual machine whose memory is private: the guest decides page by page what the host may
see, by sharing and unsharing, and a policy decides whether it may. Without --kernel the embedded
payload runs, which tries all of this out and says what it saw.
"""

_EPILOG = """\
examples:
  pyvmm --private-mem                         try private memory on this host
  pyvmm --kernel bzImage --private-mem        boot a stock kernel with private memory
  pyvmm lab --kernel bzImage --private-mem    the same under full emulation, where the host's
                                              KVM can't do it or there is none
  pyvmm lab --help                            the lab's own options
  pyvmm ctl --help                            asking a running pyvmm (--control)
  pyvmm check                                 what this host can do, and what is missing
  pyvmm selftest                              whether its KVM and pyvmm do it right
  pyvmm bench --quick                         how fast all of it is, beside QEMU and bare C
  pyvmm report DIR                            what a run with --trace DIR did
  pyvmm replay DIR --policy MODULE:CLASS      what another policy would have made of it

While the guest runs on a terminal, Ctrl-A x quits.
exit status: 0 guest powered off, 1 guest failed, 2 bad usage or input, 3 the host cannot do it
"""


def build_parser() -> argparse.ArgumentParser:
    """The options of `pyvmm [run]`."""
    parser = Parser(
        prog="pyvmm",
        usage="pyvmm [run] [options]   or   pyvmm check|selftest|bench|lab|report|replay [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    guest = parser.add_argument_group("the guest")
    guest.add_argument("--kernel", metavar="FILE", help="a Linux bzImage or vmlinux (x86-64)")
    guest.add_argument("--initrd", metavar="FILE", help="its initial RAM disk")
    guest.add_argument(
        "--append",
        metavar="TEXT",
        default="",
        help="more kernel command line, after 'console=ttyS0 panic=-1'",
    )
    guest.add_argument(
        "--mem", metavar="SIZE", default="512M", help="guest RAM, as in 512M or 2G (default 512M)"
    )
    guest.add_argument("--cpus", metavar="N", default="1", help="number of vCPUs (default 1)")
    guest.add_argument(
        "--disk",
        metavar="FILE[,ro][,serial=TEXT][,queues=N][,io=ENGINE]",
        action="append",
        default=[],
        help="a raw disk image or block device as virtio-blk; with several queues each is served "
        "by a thread of its own; may be given several times; ENGINE: auto (default), pread "
        "(through a buffer), fd2fd (inside the kernel), mmap (memcpy)",
    )
    guest.add_argument(
        "--allow-mapped-io",
        action="store_true",
        help="let a disk have io=mmap, the yardstick that reads and writes guest memory itself",
    )
    devices = parser.add_argument_group("more devices, all virtio over PCI")
    devices.add_argument(
        "--net",
        metavar="tap=NAME|passt=SOCKET[,mac=MAC]",
        action="append",
        default=[],
        help="a network card on a tap interface, or behind a passt that runs already (passt "
        "--socket SOCKET; needs no privileges); may be given several times",
    )
    devices.add_argument(
        "--vsock",
        metavar="path=PATH[,cid=N]",
        help="sockets between guest and host: a program that connects to PATH and writes "
        "'CONNECT PORT' reaches that port of the guest, the guest reaches who listens on PATH_PORT "
        "by connecting to port PORT of CID 2 (the guest's own CID: 3)",
    )
    devices.add_argument(
        "--console",
        metavar="pty|file=FILE|socket=PATH[,name=TEXT]",
        action="append",
        default=[],
        help="a console, hvc0 and so on; with name=, a plain port /dev/vport*: on a new "
        "pseudo-terminal, a file for its output, or a socket that pyvmm listens on; may be given "
        "several times",
    )
    devices.add_argument("--rng", action="store_true", help="the host's random numbers")
    devices.add_argument(
        "--balloon",
        nargs="?",
        const="",
        metavar="size=SIZE,control=PATH",
        help="a balloon that takes SIZE from the guest (default 0) and gives free memory back to "
        "the host; the socket PATH takes 'size SIZE' and 'stats'",
    )
    private = parser.add_argument_group("private memory")
    private.add_argument(
        "--private-mem",
        nargs="?",
        const="auto",
        metavar="auto|guest_memfd|guest_memfd-mmap|memfd|...",
        help="give the guest private memory; the value picks what stands behind it, for "
        "experiments also guest_memfd-plain, guest_memfd-in-place, memfd-sealed, memfd-hugetlb "
        "(default auto: the strongest that this host has and the guest can use)",
    )
    private.add_argument(
        "--scheme",
        metavar="auto|attributes|in-place|cbit|remap",
        default="auto",
        help="how private and shared pages are told apart (default auto: the first of these that "
        "this host has and the guest can use; pyvmm check says why)",
    )
    add_policy_options(private)
    private.add_argument(
        "--debug-shell",
        action="store_true",
        help="when a policy raises, open a Python prompt with the event, the view, the policy and "
        "the exception before the run ends",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--report", metavar="FILE", help="write what happened to FILE as JSON when the run ends"
    )
    output.add_argument(
        "--trace",
        metavar="DIR",
        help="record conversions, faults, I/O and exits in a folder, for pyvmm report and replay",
    )
    output.add_argument(
        "--status",
        action="store_true",
        help="keep one line up to date: on stderr where that is a terminal of its own, else as the "
        "title of the guest's terminal (SIGUSR1 prints the page states at any time)",
    )
    output.add_argument(
        "--control",
        metavar="PATH",
        help="listen on a Unix socket for JSON lines: status, pause, resume, dump-state, convert, "
        "quit; pyvmm ctl PATH COMMAND sends one",
    )
    output.add_argument(
        "--debug", action="store_true", help="show a traceback for errors, for bug reports"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status. Errors become one line on stderr."""
    try:
        if arguments and arguments[0] == "lab":
            from vmm.lab.command import run as run_lab

            return run_lab(list(arguments[1:]), check=_refuse_early)
        if arguments and arguments[0] == "check":
            return _check(arguments[1:])
        if arguments and arguments[0] == "selftest":
            from vmm.cli.selftest import run as selftest

            return selftest(arguments[1:])
        if arguments and arguments[0] == "bench":
            from vmm.cli.bench import run as bench

            return bench(arguments[1:])
        if arguments and arguments[0] == "ctl":
            from vmm.cli.ctl import run as run_ctl

            return run_ctl(arguments[1:])
        if arguments and arguments[0] == "report":
            from vmm.cli.report import run as report

            return report(arguments[1:])
        if arguments and arguments[0] == "replay":
            from vmm.cli.replay import run as replay

            return replay(arguments[1:])
        return _run(arguments)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            import traceback  # not on the start-up path

            traceback.print_exc()
        status, sentence = _explain(error)
        tell(sentence)
        return status


def _refuse_early(arguments: Sequence[str]) -> None:
    """Raise UsageError for words that pyvmm would refuse, without doing what they say."""
    if arguments and arguments[0] == "check":
        _check_parser().parse_args(arguments[1:])
    elif arguments and arguments[0] == "selftest":
        from vmm.cli.selftest import parser

        parser().parse_args(arguments[1:])
    elif arguments and arguments[0] == "bench":
        from vmm.cli.bench import parser as bench_parser

        bench_parser().parse_args(arguments[1:])
    else:
        _configuration(arguments)


def _check_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="pyvmm check",
        description="Probes what this host can do: one line for each capability, with evidence, "
        "what it enables and what to do without it, then which jobs can run.",
        epilog="exit status: 0 a stock kernel with --private-mem can run here, 2 bad usage, "
        "3 it cannot",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON, whose keys are stable")
    parser.add_argument("--debug", action="store_true", help="show a traceback for errors")
    return parser


def _check(arguments: Sequence[str]) -> int:
    options = _check_parser().parse_args(arguments)
    from vmm.cli.check import run

    return run(as_json=options.json)


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit status and the sentence for whatever ended the command."""
    if isinstance(error, PyvmmError):
        return error.exit_status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 1, "interrupted while no guest was running"
    if isinstance(error, OSError):
        return HostError.exit_status, f"the host refused: {error}"
    return 1, f"internal error: {error!r}; --debug shows where, for a bug report"


def _configuration(arguments: Sequence[str]) -> MachineConfig:
    """What `pyvmm [run] OPTIONS` asks for. Raises UsageError; looks at no file, nor at the host."""
    words = arguments[1:] if arguments and arguments[0] == "run" else arguments
    options = build_parser().parse_args(words)
    from vmm.machine.config import MachineConfig, parse_count, parse_size

    config = MachineConfig(
        kernel=options.kernel,
        initrd=options.initrd,
        append=options.append,
        memory=parse_size(options.mem),
        cpus=parse_count(options.cpus),
        private_memory=options.private_mem,
        scheme=options.scheme,
        disks=tuple(options.disk),
        nets=tuple(options.net),
        consoles=tuple(options.console),
        vsock=options.vsock,
        rng=options.rng,
        balloon=options.balloon,
        allow_mapped_io=options.allow_mapped_io,
        policies=tuple((spec, tuple(words)) for spec, words in options.policy),
        report=options.report,
        trace=options.trace,
        debug_shell=options.debug_shell,
        status=options.status,
        control=options.control,
    )
    config.validate()
    return config


def _run(arguments: Sequence[str]) -> int:
    config = _configuration(arguments)
    from vmm.machine.images import OpenedImages

    # It asks a running guest's machine for its pages; before and after that it must do no harm.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # A kernel is uncompressed by a child process while this one imports the rest.
    with contextlib.closing(OpenedImages(config)) as images:
        from vmm.machine.machine import Machine

        outcome = Machine(config, images).run()
    if outcome.exit_status:
        tell(f"{_sentence(outcome.exit)}: {outcome.reason}")
    return outcome.exit_status


def _sentence(exit: str) -> str:
    return {
        "stopped": "the run was stopped",
        "killed": "the run was ended",
        "panic": "the guest panicked",
        "failed": "the guest failed",
        "triple-fault": "the guest crashed",
        "internal-error": "the guest cannot go on",
    }[exit]


def _open_standard_fds() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed.

    Else the next file opened, a disk perhaps, would get the number and the console's bytes.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number


def entry_point() -> NoReturn:
    """The console script."""
    _open_standard_fds()
    sys.exit(main(sys.argv[1:]))
