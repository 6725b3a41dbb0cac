"""KVM's modules, compiled for the lab's stock kernel: with an option that Debian leaves out
(KVM_X86_SW_PROTECTED_VM), and with changes of the user's and our own.

Only arch/x86/kvm and virt are compiled, beside Debian's header package and with its configuration
as it is: a whole tree configured anew may differ where nobody looks (without pahole: no BTF, no
sched_ext, another task_struct), and its modules load all the same. Kconfig's symbols go to make,
which picks files by them, and to the compiler; nothing outside KVM asks for them. The kernel takes
the modules since Debian's have neither symbol versions nor enforced signatures.

Compiler, headers and sources stay in the cache, so that a changed patch costs the compilation
alone; each compilation has a tree of links to them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmm.core.errors import HostError, UsageError, tell
from vmm.lab.compiling import (
    first_error,
    require_plain,
    run_by_own_loader,
    running,
    unpack_sources,
)
from vmm.lab.kvm_change import FOLDERS, HEADERS, KvmChange
from vmm.lab.progress import Progress

MODULES = ("kvm", "kvm-amd")
# Count up when modules, or the tree that they are built from, would come out differently, so that
# older cached ones aren't used.
RECIPE = 1
TREE_RECIPE = 1
_SW_PROTECTED = ("KVM_SW_PROTECTED_VM", "KVM_GENERIC_MEMORY_ATTRIBUTES")
# The lab's processors are AMD's; nobody asks for type information of these modules.
_SETTINGS = ("CONFIG_KVM_INTEL=n", "CONFIG_DEBUG_INFO_BTF_MODULES=")


@dataclass(frozen=True, slots=True)
class KvmTree:
    """Compiler, headers and KVM's sources for one stock kernel, unpacked from Debian's packages."""

    release: str  # as `uname -r` has it
    version: str  # of Debian's package
    progress: Progress
    download: Callable[[list[str], Path], None]  # packages with all they need, unpacked
    place: Path  # where the tree will be

    def __call__(self, into: Path) -> None:
        """Downloads and unpacks all of it into the new directory `into`."""
        require_plain(self.place)
        self.progress.step("downloading compiler and sources of KVM")
        series = ".".join(self.version.split(".")[:2])
        # The headers depend on the compiler that the kernel was built with, the sources on xz.
        packages = [
            f"linux-headers-{self.release}={self.version}",
            f"linux-source-{series}={self.version}",
            "make",
            "patch",
        ]
        self.download(packages, into)
        self.progress.step("unpacking KVM's sources")
        sources = into / "usr" / "src"
        common = _common(into)
        # xz is run where it lies now, all else where it will be.
        unpack_sources(into, common, [f"{{top}}/{folder}" for folder in FOLDERS])
        for archive in sources.glob("linux-source-*"):
            archive.unlink()
        run_by_own_loader(into, self.place)


@dataclass(frozen=True, slots=True)
class KvmBuild:
    """How the modules for one stock kernel are made from such a tree."""

    release: str  # as `uname -r` has it
    tree: Path
    change: KvmChange
    progress: Progress

    def __call__(self, into: Path) -> None:
        """Compiles, and leaves kvm.ko and kvm-amd.ko in the new directory `into`.

        Raises UsageError for what the user's change does wrong, else HostError.
        """
        require_plain(into.parent)
        build = into.parent / "build"
        common = self._lay_out(build)
        left_out = self.change.apply(common, [str(self.tree / "usr" / "bin" / "patch")])
        if left_out:
            tell(f"not compiled here, and left out of the patches: {', '.join(left_out)}")
        self.progress.step(f"compiling KVM {self._words()}")
        sources = common / "arch" / "x86" / "kvm"
        self._compile(build, sources)
        into.mkdir()
        for name in MODULES:
            shutil.copyfile(sources / f"{name}.ko", into / f"{name}.ko")

    def _words(self) -> str:
        if self.change.is_users:
            return "with your change"
        return "with experiments" if self.change.additions else "with KVM_X86_SW_PROTECTED_VM"

    def _lay_out(self, build: Path) -> Path:
        """A tree of links to the cached one, in which KVM's files are files of their own."""
        (build / "usr").mkdir(parents=True)
        for folder in (self.tree / "usr").iterdir():
            if folder.name != "src":
                (build / "usr" / folder.name).symlink_to(folder)
        subprocess.run(
            ["cp", "-al", str(self.tree / "usr" / "src"), str(build / "usr" / "src")], check=True
        )
        common = _common(build)
        for path in [*(common / name for name in FOLDERS), *_headers(common)]:
            for linked in [path] if path.is_file() else path.rglob("*"):
                if linked.is_file():
                    content = linked.read_bytes()
                    linked.unlink()
                    linked.write_bytes(content)
        makefile = self._headers_folder(build) / "Makefile"
        text = makefile.read_text().replace("/usr/src/", f"{build}/usr/src/")
        makefile.unlink()
        makefile.write_text(text)
        return common

    def _headers_folder(self, build: Path) -> Path:
        return build / "usr" / "src" / f"linux-headers-{self.release}"

    def _compile(self, build: Path, sources: Path) -> None:
        symbols = [*(_SW_PROTECTED if self.change.sw_protected else ()), *self.change.symbols]
        defined = "".join(f"-DCONFIG_{symbol}=1 " for symbol in symbols)
        programs = self.tree / "usr" / "bin"
        command = [str(programs / "make"), f"-j{len(os.sched_getaffinity(0))}"]
        command += ["-C", str(self._headers_folder(build)), f"M={sources}"]
        command += [f"CONFIG_{symbol}=y" for symbol in symbols] + list(_SETTINGS)
        # Debugging information would be stripped, and takes a third more time.
        command += [f"KCFLAGS={defined}-g0", "modules"]
        environment = {"PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
        output = []
        files = 0
        with running(command, environment) as make:
            assert make.stdout is not None
            for line in make.stdout:
                output.append(line.strip())
                words = line.split()
                if words[:2] == ["CC", "[M]"]:
                    files += 1
                    self.progress.part(f"{files} files, {Path(words[-1]).name}")
        missing = [name for name in MODULES if not (sources / f"{name}.ko").exists()]
        if make.returncode != 0 or missing:
            reason = first_error(output).replace("../../../", "").replace(f"{sources}/", "")
            if self.change.is_users:
                raise UsageError(f"your KVM does not compile for Linux {self.release}: {reason}")
            raise HostError(
                f"compiling KVM for Linux {self.release} failed: {reason}; "
                "the lab's stock host needs no compiler"
            )


def _common(tree: Path) -> Path:
    """The headers that all of Debian's flavours of that kernel have in common."""
    return next(iter(sorted((tree / "usr" / "src").glob("linux-headers-*-common"))))


def _headers(common: Path) -> list[Path]:
    return [path for pattern in HEADERS for path in common.glob(pattern)]
