"""KVM's modules with KVM_X86_SW_PROTECTED_VM, compiled for the lab's stock kernel.

Debian leaves that option out. Only arch/x86/kvm and virt are compiled, beside Debian's header
package and with its configuration as it is: a whole tree configured anew may differ where nobody
looks (without pahole: no BTF, no sched_ext, another task_struct), and its modules load all the
same. The two symbols go to make, which picks files by them, and to the compiler; nothing outside
KVM asks for them. The kernel takes the modules since Debian's have neither symbol versions nor
enforced signatures.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vmm.core.errors import HostError
from vmm.lab.architecture import HERE
from vmm.lab.closure import is_elf
from vmm.lab.programs import libraries_of_tree
from vmm.lab.progress import Progress
from vmm.lab.tied import tied

MODULES = ("kvm", "kvm-amd")
# Counts up when modules would come out differently, so that older cached ones aren't used.
RECIPE = 1
_SYMBOLS = ("CONFIG_KVM_SW_PROTECTED_VM", "CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES")
# The lab's processors are AMD's; nobody asks for type information of these modules.
_SETTINGS = ("CONFIG_KVM_INTEL=n", "CONFIG_DEBUG_INFO_BTF_MODULES=")
_SOURCES = ("arch/x86/kvm", "virt")
# Debian's programs of this name pick one of several by what they are asked to work on.
_CHOOSERS = (
    ("scripts/mod/modpost", "modpost.real-lsb-64"),
    ("tools/objtool/objtool", "objtool.real-x86"),
)


@dataclass(frozen=True, slots=True)
class KvmBuild:
    """How the modules for one stock kernel are made, all of it below a directory of its own."""

    release: str  # as `uname -r` has it
    version: str  # of Debian's package
    progress: Progress
    download: Callable[[list[str], Path], None]  # packages with all they need, unpacked

    def __call__(self, into: Path) -> None:
        """Downloads, compiles, and leaves kvm.ko and kvm-amd.ko in the new directory `into`."""
        tree = into.parent / "build"
        if any(mark in str(tree) for mark in " :"):
            raise HostError(
                f"the kernel's makefiles cannot work below {into.parent}, a path with a blank or "
                "a colon; name another directory with --lab-cache DIR or PYVMM_LAB_CACHE"
            )
        self.progress.step("downloading compiler and sources of KVM")
        self._download(tree)
        self.progress.step("unpacking KVM's sources")
        run_by_own_loader(tree)
        sources = self._unpack_sources(tree)
        self.progress.step("compiling KVM with KVM_X86_SW_PROTECTED_VM")
        self._compile(tree, sources)
        into.mkdir()
        for name in MODULES:
            shutil.copyfile(sources / f"{name}.ko", into / f"{name}.ko")

    def _download(self, tree: Path) -> None:
        series = ".".join(self.version.split(".")[:2])
        # The headers depend on the compiler that the kernel was built with, the sources on xz.
        packages = [
            f"linux-headers-{self.release}={self.version}",
            f"linux-source-{series}={self.version}",
            "make",
        ]
        self.download(packages, tree)

    def _headers(self, tree: Path) -> Path:
        return tree / "usr" / "src" / f"linux-headers-{self.release}"

    def _unpack_sources(self, tree: Path) -> Path:
        """Puts KVM's sources among the headers, to which its own includes are relative."""
        makefile = self._headers(tree) / "Makefile"
        makefile.write_text(makefile.read_text().replace("/usr/src/", f"{tree}/usr/src/"))
        common = next(iter(sorted((tree / "usr" / "src").glob("linux-headers-*-common"))))
        archive = next(iter(sorted((tree / "usr" / "src").glob("linux-source-*.tar.xz"))))
        top = archive.name.removesuffix(".tar.xz")
        with subprocess.Popen(
            [str(tree / "usr" / "bin" / "xz"), "-dc", "-T0", str(archive)], stdout=subprocess.PIPE
        ) as unpacking:
            taken = subprocess.run(
                ["tar", "-x", "-C", str(common), "--strip-components=1"]
                + [f"{top}/{folder}" for folder in _SOURCES],
                stdin=unpacking.stdout,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        if unpacking.returncode or taken.returncode:
            reason = (taken.stderr.splitlines() or ["no reason given"])[0]
            raise HostError(f"unpacking {archive.name} failed: {reason}")
        return common / "arch" / "x86" / "kvm"

    def _compile(self, tree: Path, sources: Path) -> None:
        defined = " ".join(f"-D{symbol}=1" for symbol in _SYMBOLS)
        command = [str(tree / "usr" / "bin" / "make"), f"-j{len(os.sched_getaffinity(0))}"]
        command += ["-C", str(self._headers(tree)), f"M={sources}"]
        command += [f"{symbol}=y" for symbol in _SYMBOLS] + list(_SETTINGS)
        # Debugging information would be stripped, and takes a third more time.
        command += [f"KCFLAGS={defined} -g0", "modules"]
        environment = {"PATH": f"{tree}/usr/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
        output = []
        files = 0
        with _process(command, environment) as make:
            assert make.stdout is not None
            for line in make.stdout:
                output.append(line.strip())
                words = line.split()
                if words[:2] == ["CC", "[M]"]:
                    files += 1
                    self.progress.part(f"{files} files, {Path(words[-1]).name}")
        missing = [name for name in MODULES if not (sources / f"{name}.ko").exists()]
        if make.returncode != 0 or missing:
            raise HostError(
                f"compiling KVM for Linux {self.release} failed: {_first_error(output)}; "
                "the lab's stock host needs no compiler"
            )


@contextmanager
def _process(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
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


def _first_error(output: list[str]) -> str:
    """The compiler's first complaint, else make's last words."""
    errors = [line for line in output if "error: " in line or "Error " in line]
    return (errors or output[-1:] or ["make said nothing"])[0]


def run_by_own_loader(tree: Path) -> None:
    """Makes the unpacked programs run each other: each becomes a script that starts it."""
    libraries = libraries_of_tree(tree)
    loader = libraries / HERE.loader
    for folder in tree.glob("usr/lib/linux-kbuild-*"):
        for name, chosen in _CHOOSERS:
            if (folder / name).with_name(chosen).exists():
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(chosen)
    for pattern in ("usr/bin/*", "usr/libexec/gcc/*/*/*", "usr/lib/linux-kbuild-*/**/*"):
        for program in list(tree.glob(pattern)):
            if program.is_symlink() or not os.access(program, os.X_OK):
                continue
            if not program.is_file() or ".so" in program.name or not is_elf(program):
                continue
            real = program.rename(program.with_name(f"{program.name}.elf"))
            program.write_text(
                f'#!/bin/sh\nexec {loader} --library-path {libraries} --argv0 "$0" {real} "$@"\n'
            )
            program.chmod(0o755)
