"""`pyvmm lab`'s own options, told apart from those that the inner pyvmm gets.

Everything that isn't the lab's passes through untouched and in order, so that the lab doesn't
have to know what pyvmm can do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmm.core.errors import UsageError
from vmm.core.near import did_you_mean
from vmm.core.suboptions import byte_size, unit_hint
from vmm.lab import hosts

_HOSTS = "\n".join(f"  --host {host.name:<17} {host.summary}" for host in hosts.HOSTS.values())

HELP = f"""\
usage: pyvmm lab [lab options] [pyvmm's own command and options]
       pyvmm lab image debian:trixie [--include PACKAGES] [--output FILE]
       pyvmm lab [lab options] --lab-exec PROGRAM [ARGUMENTS...]
       pyvmm lab [lab options] --kernel-selftests DIR [TESTS...]

Runs pyvmm (or PROGRAM) inside a machine under full emulation that has a hardware-like KVM.
Console, files named by options, --disk, --report, --trace and the exit status pass through.
A kernel may be named debian:6.12 (or another series): Debian's stock cloud kernel, of the lab
machine's architecture. Without --initrd a guest gets a busybox shell, without --append a quiet
boot ("--append loglevel=7" shows all of it, dmesg has it anyway). With --exec 'COMMAND' it runs
that and ends with its status; with --root IMAGE it boots from that disk. Both take debian:7.3
where no --kernel is given, as in: pyvmm lab --exec 'uname -r'

{_HOSTS}

  --kernel pkvm-guest      on arm64 and pkvm: a small kernel for protected guests, compiled once
                           from Debian's sources (some 7 minutes on two cores). Debian's own
                           kernels share nothing there: their devices don't work. On pkvm a run
                           without --kernel gets it
  --kernel payload         the embedded payload, which other hosts run without --kernel

  --kvm-patch FILE         compile the machine's KVM with this patch (git's or diff -u); several
                           in their order. On x86 modules are: half a minute, once for each
                           content. On arm64 and pkvm the whole kernel, as by --kernel-build
  --kvm-source DIR         take KVM from this kernel tree: virt, arch/x86/kvm, its headers
  --kernel-build           compile the machine's whole kernel, small, with any patch, or the whole
                           tree of --kvm-source: some 10 minutes on two cores once, then what
                           depends on what has changed
  --kvm-config NAME        with CONFIG_NAME=y, which KVM alone asks for, or with --kernel-build any
                           option of Linux's; may be repeated
  --kvm-parameter kvm.NAME=VALUE
                           a parameter of KVM's modules (or kvm_amd.NAME=VALUE); may be repeated

  --kernel-selftests DIR   build the kernel's own self-tests of guest_memfd from this kernel tree,
                           which is only read, and run them; or the tests of selftests/kvm that
                           the rest of the line names. x86

  --lab-exec PROGRAM ...   run this in the lab machine itself, instead of pyvmm; takes the rest of
                           the line
  --lab-mem SIZE           the lab machine's memory (default 2048M; 2G is the same)
  --lab-cpus N             its processors (default 2, for guests with several vCPUs 1: under QEMU's
                           emulation more are unreliable with them; bochs, arm64, pkvm 1)
  --lab-time-limit SECONDS end it after that long (default: no limit)
  --lab-file PATH          take this file or directory along, at its own path
  --lab-out PATH           bring this file or directory back at the end
  --lab-disk FILE[,ro]     attach a disk for --lab-exec; $PYVMM_LAB_DISKS lists the devices
  --lab-env NAME=VALUE     set a variable in the inner environment
  --lab-with-qemu          put QEMU on the inner PATH, as a yardstick
  --lab-cache DIR          downloads and images (default $PYVMM_LAB_CACHE, else the user's cache)
  --lab-offline            download nothing
  --lab-log FILE           write the lab machine's kernel messages there
  --lab-fresh              boot the machine's own kernel: a run begins, else, where an earlier one
                           with the same kernel, processors and memory had booted
  --lab-quiet              no progress on stderr
  --lab-qemu FILE          a qemu-system-x86_64, or the host's architecture's
  --lab-busybox FILE       a busybox, linked statically
  --lab-host-kernel FILE   the lab machine's kernel (or debian:SERIES)
  --lab-host-modules DIR   its modules, lib/modules/RELEASE
  --lab-guest-modules DIR  the guest kernel's modules, for the initramfs made for it
"""

_FLAGS = ("--kernel-build", "--lab-with-qemu", "--lab-offline", "--lab-fresh", "--lab-quiet")
_VALUES = (
    "--host",
    "--kvm-patch",
    "--kvm-source",
    "--kvm-config",
    "--kvm-parameter",
    "--kernel-selftests",
    "--lab-mem",
    "--lab-cpus",
    "--lab-time-limit",
    "--lab-file",
    "--lab-out",
    "--lab-disk",
    "--lab-env",
    "--lab-cache",
    "--lab-log",
    "--lab-qemu",
    "--lab-busybox",
    "--lab-host-kernel",
    "--lab-host-modules",
    "--lab-guest-modules",
)
_OTHERS = ("--host", "--kernel-selftests")  # of ours with no prefix of their own


@dataclass(slots=True)
class LabOptions:
    """How the lab machine is made; sizes in MiB, times in seconds."""

    host: str = hosts.DEFAULT.name
    kvm_patches: list[Path] = field(default_factory=list)
    kvm_source: Path | None = None
    kvm_symbols: list[str] = field(default_factory=list)
    kvm_parameters: list[str] = field(default_factory=list)  # module.name=value
    kernel_build: bool = False
    kernel_selftests: Path | None = None  # a kernel tree
    memory_mib: int = 2048
    cpus: int | None = None  # as many as the host has by itself
    time_limit: float | None = None
    files: list[Path] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)
    disks: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    with_qemu: bool = False
    cache: Path | None = None
    offline: bool = False
    fresh: bool = False
    quiet: bool = False
    log: Path | None = None
    qemu: str | None = None
    busybox: str | None = None
    host_kernel: str | None = None
    host_modules: str | None = None
    guest_modules: str | None = None


@dataclass(slots=True)
class LabCommand:
    """A parsed `pyvmm lab` line: what to run inside, and how."""

    options: LabOptions
    arguments: list[str]
    is_program: bool = False  # `arguments` is a command line of its own, not pyvmm's
    help: bool = False


def parse(argv: Sequence[str]) -> LabCommand:
    """Splits the line; raises UsageError naming the option at fault."""
    command = LabCommand(LabOptions(), [])
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--lab-exec":
            if not rest:
                raise UsageError("--lab-exec: the program to run is missing")
            if command.arguments:
                raise UsageError(
                    f"--lab-exec runs a program instead of pyvmm {command.arguments[0]}"
                )
            command.arguments, command.is_program = rest, True
            break
        if word == "--lab-help" or (word in ("--help", "-h") and not command.arguments):
            command.help = True
        elif word in _FLAGS:
            setattr(command.options, _field(word), True)
        elif word.startswith(("--lab-", "--kvm-")) or word.partition("=")[0] in _OTHERS:
            name, equals, value = word.partition("=")
            if name not in _VALUES:
                remedy = did_you_mean(name, (*_VALUES, *_FLAGS)) or "see pyvmm lab --help"
                raise UsageError(f"{name}: no such option of the lab; {remedy}")
            if not equals:
                if not rest:
                    raise UsageError(f"{name}: its value is missing")
                value = rest.pop(0)
            _set(command.options, name, value)
        else:
            command.arguments.append(word)
    if command.options.kernel_selftests is not None:
        _names_tests(command)
    return command


def _names_tests(command: LabCommand) -> None:
    """Raises UsageError where something else than tests is to be run, too."""
    if command.is_program:
        raise UsageError(f"--kernel-selftests runs tests instead of {command.arguments[0]}")
    wrong = [word for word in command.arguments if not re.fullmatch(r"\w+", word, re.ASCII)]
    if wrong:
        raise UsageError(f"--kernel-selftests: {wrong[0]!r} is no test's name")


def _field(name: str) -> str:
    return name.removeprefix("--lab-").removeprefix("--").replace("-", "_")


def _set(options: LabOptions, name: str, value: str) -> None:
    match name:
        case "--host":
            options.host = hosts.named(value).name
        case "--kvm-patch":
            options.kvm_patches.append(Path(value).absolute())
        case "--kvm-source":
            options.kvm_source = Path(value).absolute()
        case "--kernel-selftests":
            options.kernel_selftests = Path(value).absolute()
        case "--kvm-config":
            symbol = value.removeprefix("CONFIG_")
            if not re.fullmatch(r"\w+", symbol, re.ASCII):
                raise UsageError(f"{name} {value}: the form is NAME, as in KVM_XEN")
            options.kvm_symbols.append(symbol)
        case "--kvm-parameter":
            if not re.fullmatch(r"kvm(_amd)?\.\w+=[\w,.-]+", value, re.ASCII):
                raise UsageError(f"{name} {value}: the form is kvm.NAME=VALUE")
            options.kvm_parameters.append(value)
        case "--lab-mem":
            options.memory_mib = _mebibytes(name, value)
        case "--lab-cpus":
            options.cpus = int(_number(name, value, least=1))
        case "--lab-time-limit":
            options.time_limit = _number(name, value, least=0.001)
        case "--lab-file":
            if not Path(value).exists():
                raise UsageError(f"{name} {value}: no such file or directory")
            options.files.append(Path(value))
        case "--lab-out":
            options.outputs.append(Path(value))
        case "--lab-disk":
            options.disks.append(value)
        case "--lab-env":
            variable, equals, content = value.partition("=")
            if not equals or not variable.isidentifier():
                raise UsageError(f"{name} {value}: the form is NAME=VALUE")
            options.environment[variable] = content
        case "--lab-cache" | "--lab-log":
            setattr(options, _field(name), Path(value).absolute())
        case _:
            setattr(options, _field(name), value)


def _number(name: str, value: str, least: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not number >= least:
        raise UsageError(f"{name} {value}: a number of at least {least:g} is needed")
    return number


def _mebibytes(name: str, value: str) -> int:
    size = byte_size(value)
    if size is None or size < 256 << 20:
        hint = "" if size is None else unit_hint(size)
        raise UsageError(
            f"{name} {value}: a size of at least 256M is needed, as in 2048M or 2G{hint}"
        )
    return size >> 20
