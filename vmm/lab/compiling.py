"""Compiling with compilers out of unpacked packages: how they run each other, and make's run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vmm.core.errors import HostError
from vmm.lab.architecture import HERE
from vmm.lab.closure import is_elf
from vmm.lab.programs import libraries_of_tree
from vmm.lab.tied import tied

# Debian's programs of this name pick one of several by what they are asked to work on.
_CHOOSERS = (
    ("scripts/mod/modpost", "modpost.real-lsb-64"),
    ("tools/objtool/objtool", "objtool.real-x86"),
)
# Where packages have programs that are run by others: their own, compilers' passes, the kernel's.
_PROGRAMS = (
    "usr/bin/*",
    "usr/libexec/gcc*/*/*/*",
    "usr/lib/linux-kbuild-*/**/*",
)

_FAULTS = ("error: ", "ERROR: ", "undefined reference to ", "multiple definition of ")
_FULL = "No space left on device"


def require_plain(folder: Path) -> None:
    """Raises HostError where the kernel's makefiles cannot work."""
    if any(mark in str(folder) for mark in " :"):
        raise HostError(
            f"the kernel's makefiles cannot work below {folder}, a path with a blank or "
            "a colon; name another directory with --lab-cache DIR or PYVMM_LAB_CACHE"
        )


def unpack_sources(
    tree: Path, into: Path, options: Sequence[str], tools: Path | None = None
) -> None:
    """Unpacks the kernel's sources, an archive in `tree`, with these options of tar.

    Their top folder is left out; {top} in an option is its name. `tools` is the tree that xz is in,
    if that isn't `tree`.
    """
    tools = tools or tree
    archive = next(iter(sorted((tree / "usr" / "src").glob("linux-source-*.tar.xz"))))
    top = archive.name.removesuffix(".tar.xz")
    with subprocess.Popen(
        [*_started(tools, tools / "usr" / "bin" / "xz"), "-dc", "-T0", str(archive)],
        stdout=subprocess.PIPE,
    ) as unpacking:
        taken = subprocess.run(
            ["tar", "-x", "-C", str(into), "--strip-components=1"]
            + [option.format(top=top) for option in options],
            stdin=unpacking.stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    if unpacking.returncode or taken.returncode:
        reason = (taken.stderr.splitlines() or ["no reason given"])[0]
        raise HostError(f"unpacking {archive.name} failed: {reason}")


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """make with its output, and all that it started ended with it however the caller leaves."""
    process = subprocess.Popen(
        tied(command),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with process:
        try:
            yield process
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise


def run_make(
    command: list[str], environment: dict[str, str], compiled: Callable[[int, str], None]
) -> tuple[int, list[str]]:
    """make's exit status (negative: by a signal), and the lines that it said.

    `compiled` is told of each file that is compiled: how many there were, and its name.
    """
    output = []
    files = 0
    with running(command, environment) as make:
        assert make.stdout is not None
        for line in make.stdout:
            output.append(line.strip())
            words = line.split()
            if words[:1] in (["CC"], ["AS"]):
                files += 1
                compiled(files, Path(words[-1]).name)
    if make.returncode and any(_FULL in line for line in output):
        raise HostError(
            f"compiling failed: {_FULL.lower()}; make room where the lab's cache and temporary "
            "files are, or name another directory with --lab-cache DIR or TMPDIR"
        )
    return make.returncode, output


def first_error(output: list[str]) -> str:
    """The compiler's first complaint, else the linker's, else make's last words."""
    errors = [line for mark in _FAULTS for line in output if mark in line]
    errors += [line for line in output if "Error " in line]
    return (errors or output[-1:] or ["make said nothing"])[0]


def names_a_fault(reason: str) -> bool:
    """Whether this is a complaint about a source, and not only that something failed."""
    return any(mark in reason for mark in _FAULTS)


def _started(tree: Path, program: Path) -> list[str]:
    """The words that start an unpacked program, whether or not `run_by_own_loader` was there."""
    if not is_elf(program):
        return [str(program)]
    libraries = libraries_of_tree(tree)
    return [str(libraries / HERE.loader), "--library-path", str(libraries), str(program)]


def run_by_own_loader(tree: Path, place: Path | None = None) -> None:
    """Makes the unpacked programs run each other: each becomes a script that starts it.

    `place` is where the tree will be by then, when that isn't where it is.
    """
    place = place or tree
    libraries = libraries_of_tree(place)
    start = shlex.join([str(libraries / HERE.loader), "--library-path", str(libraries)])
    for folder in tree.glob("usr/lib/linux-kbuild-*"):
        for name, chosen in _CHOOSERS:
            if (folder / name).with_name(chosen).exists():
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(chosen)
    for pattern in _PROGRAMS:
        for program in list(tree.glob(pattern)):
            if program.is_symlink() or not os.access(program, os.X_OK):
                continue
            if not program.is_file() or ".so" in program.name or not is_elf(program):
                continue
            real = program.rename(program.with_name(f"{program.name}.elf"))
            program.write_text(
                f'#!/bin/sh\nexec {start} --argv0 "$0" '
                f'{shlex.quote(str(place / real.relative_to(tree)))} "$@"\n'
            )
            program.chmod(0o755)
