"""`pyvmm`: options in, exit status out. 0 guest powered off, 1 guest failed, 2 bad usage or
input, 3 the host cannot do it."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import sys
from collections.abc import Sequence

from vmm.cli import process
from vmm.cli.run_options import DEFAULT_SIZES, parse
from vmm.core.errors import HostError, PyvmmError, UsageError, in_words, limit_met, tell
from vmm.core.lean_signal import signal
from vmm.core.lean_typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from vmm.machine.config import MachineConfig

_COMMANDS = (
    "run",
    "check",
    "selftest",
    "bench",
    "lab",
    "ctl",
    "report",
    "replay",
    "measure",
    "sweep",
    "completion",
    "help",
)


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status. Errors become one line on stderr."""
    try:
        return _command(_without_help(arguments))
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 0  # help, for `head`; unbuffered, it is noticed here and not when all is over
        if "--debug" in arguments:
            import traceback  # not on the start-up path

            traceback.print_exc()
        status, sentence = _explain(error)
        tell(sentence)
        return OWN_STATUS if _executes(arguments) else status


OWN_STATUS = 125
"""With --exec, when there is no status of the command to pass on; as env(1) and timeout(1)."""


def _executes(arguments: Sequence[str]) -> bool:
    """Whether a run was asked to run a command in the guest, whose status is the run's."""
    with contextlib.suppress(UsageError):  # which is what the command ended with
        arguments = _with_config_file(arguments)
    ours = arguments[: arguments.index("--lab-exec")] if "--lab-exec" in arguments else arguments
    return any(word == "--exec" or word.startswith("--exec=") for word in ours)


def _command(arguments: Sequence[str]) -> int:
    word = arguments[0] if arguments else "run"
    match word:
        case "lab":
            from vmm.lab.command import run as lab

            words = _with_config_file(arguments[1:], lab=True)
            return lab(list(words), check=_refuse_early)
        case "measure":
            from vmm.cli.measure import run as measure

            return measure(arguments[1:], _configuration)
        case "check" | "selftest" | "bench" | "ctl" | "report" | "replay" | "completion" | "sweep":
            import importlib

            status: int = importlib.import_module(f"vmm.cli.{word}").run(arguments[1:])
            return status
    _require_command(word)
    return _run(arguments)


def _require_command(word: str) -> None:
    """Raise UsageError for a first word that is neither a command nor an option."""
    if word in _COMMANDS or word.startswith("-"):
        return
    from vmm.core.near import did_you_mean

    if os.path.isfile(word):
        remedy = f"a kernel is given as --kernel {word}"
    else:
        remedy = did_you_mean(word, _COMMANDS) or f"the commands are {', '.join(_COMMANDS)}"
    raise UsageError(f"there is no command {word}; {remedy}")


def _without_help(arguments: Sequence[str]) -> Sequence[str]:
    """`help COMMAND` is COMMAND --help, `help` alone is --help."""
    if arguments and arguments[0] == "help":
        return [*arguments[1:2], "--help"]
    return arguments


def _refuse_early(arguments: Sequence[str], machine: str) -> None:
    """Raise UsageError for words that pyvmm on such a machine (as uname -m says it) would refuse,
    without doing what they say.
    """
    if arguments and arguments[0] in ("check", "selftest", "bench"):
        from vmm.cli.parsers import PARSERS

        PARSERS[arguments[0]]().parse_args(arguments[1:])
    elif arguments and arguments[0] == "measure":
        from vmm.cli.measure import words_of

        _configuration(words_of(arguments[1:])[1], machine)
    else:
        if arguments:
            _require_command(arguments[0])
        _configuration(arguments, machine)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone."""
    import select  # not on the start-up path

    waiter = select.poll()
    waiter.register(1, 0)
    return bool(waiter.poll(0))


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit status and the sentence for whatever ended the command."""
    if isinstance(error, PyvmmError):
        return error.exit_status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 1, f"interrupted {str(error) or 'while no guest was running'}"
    if isinstance(error, MemoryError):
        return 1, "pyvmm itself ran out of memory; give it more, or less to do"
    # Not KvmError: a host that has no room for memslots or VMs can't do it.
    if type(error) is OSError and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "" if limit_met(error) else "; make room"
        return 1, f"output could not be written: {in_words(error)}{remedy}"
    if isinstance(error, ImportError) and os.strerror(errno.EMFILE) in str(error):
        error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        limits = "raise `ulimit -u`, or the limit of the cgroup (pids.max)"
        return HostError.exit_status, f"the host refused one more thread; {limits}"
    if isinstance(error, OSError):
        return HostError.exit_status, f"the host refused: {in_words(error)}"
    return 1, f"internal error: {error!r}; --debug shows where, for a bug report"


def _configuration(arguments: Sequence[str], machine: str | None = None) -> MachineConfig:
    """What `pyvmm [run] OPTIONS` asks for on a machine of that architecture (this one's).

    Raises UsageError; looks at no file, nor at the host.
    """
    words = arguments[1:] if arguments and arguments[0] == "run" else arguments
    options = parse(_with_config_file(words))
    from vmm.arch import architecture
    from vmm.machine.config import MachineConfig, parse_count, parse_size

    disks, root = options.disk, options.root
    if root is not None:
        from vmm.core.root_disk import split_root  # most runs have none

        disk, root = split_root(root)
        disks = disks if disk is None else [disk, *disks]
    config = MachineConfig(
        kernel=options.kernel,
        initrd=options.initrd,
        append=options.append,
        memory=parse_size(options.mem),
        cpus=parse_count(options.cpus),
        private_memory=options.private_mem,
        scheme=options.scheme,
        disks=tuple(disks),
        nets=tuple(options.net),
        file_systems=tuple(options.fs),
        consoles=tuple(options.console),
        vsock=options.vsock,
        rng=options.rng,
        balloon=options.balloon,
        iommu=options.iommu,
        allow_mapped_io=options.allow_mapped_io,
        devices=tuple(options.device),
        exit_handlers=tuple(options.exit_handler),
        policies=tuple((spec, tuple(words)) for spec, words in options.policy),
        report=options.report,
        trace=options.trace,
        debug_shell=options.debug_shell,
        root=root,
        execute=options.exec,
        share=options.share,
        status=options.status,
        control=options.control,
        memory_file=options.memory_file,
        gdb=options.gdb,
        gdb_sees_private=options.gdb_sees_private,
        core_dumps=options.core_dumps or (options.private_mem is None and options.restore is None),
        restore=options.restore,
        paused=options.S,
        sandbox=options.sandbox,
        allowed_paths=tuple(options.allow_path),
        user=options.uid,
    )
    if config.paused and config.control is None:
        raise UsageError("-S needs --control PATH: pyvmm ctl PATH resume lets the guest go")
    if config.restore is not None and (options.mem, options.cpus) != DEFAULT_SIZES:
        raise UsageError(
            "--restore and --mem or --cpus: the snapshot says how large the machine is"
        )
    config.validate(architecture(machine))
    return config


def _with_config_file(words: Sequence[str], *, lab: bool = False) -> Sequence[str]:
    if not any(word.startswith("--config") for word in words):
        return words
    from vmm.cli.config_file import expanded  # most command lines say all

    return expanded(words, lab=lab)


def _run(arguments: Sequence[str]) -> int:
    config = _configuration(arguments)
    if config.user is not None and not process.is_ours():
        raise UsageError("--uid: all threads of the program that calls would change; run pyvmm")
    if not process.is_ours() or config.debug_shell:  # the shell is the user's own
        config = config._replace(sandbox="off")
    from vmm.arch import architecture
    from vmm.machine.images import OpenedImages

    # It asks a running guest's machine for its pages; before and after that it must do no harm.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # A kernel is uncompressed by a child process while this one imports the rest.
    with contextlib.closing(OpenedImages(architecture(), config)) as images:
        from vmm.machine.machine import Machine

        outcome = Machine(config, images).run()
    if outcome.command_status is not None:
        return outcome.command_status
    if outcome.exit_status:
        tell(f"{_sentence(outcome.exit)}: {outcome.reason}")
    if config.execute is not None:
        return OWN_STATUS
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
    # Python has None for those that it found closed, which nothing that prints expects.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _told(status: int) -> int:
    """The exit status, after what was printed has got out."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the interpreter's own flush
        if not isinstance(error, BrokenPipeError):
            tell(f"standard output could not be written: {error.strerror}")
            return status or 1
    return status


def entry_point() -> NoReturn:
    """The console script."""
    # What a start imports and makes is there to stay: looking through it for garbage at every 700
    # objects would only delay the guest. Later collections are as much rarer as they are longer.
    gc.set_threshold(100_000)
    _open_standard_fds()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see vmm.__main__
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main(sys.argv[1:])
    except SystemExit as ended:  # --help
        status = ended.code if isinstance(ended.code, int) else 0
    status = _told(status)
    gc.freeze()  # the kernel takes all of it back faster than the interpreter looks through it
    sys.exit(status)
