"""KVM's modules, compiled for the lab's stock kernel: with an option that Debian leaves out
(KVM_X86_SW_PROTECTED_VM), and with changes of the user's and our own.

Only arch/x86/kvm and virt are compiled, beside Debian's header package and with its configuration
as it is: a whole tree configured anew may differ where nobody looks (without pahole: no BTF, no
sched_ext, another task_struct), and its modules load all the same. Kconfig's symbols go to make,
which picks files by them, and to the compiler; nothing outside KVM asks for them. The kernel takes
the modules since Debian's have neither symbol versions nor enforced signatures.

Compiler, headers and sources stay in the cache, and so does the tree that a kind of KVM is compiled
in: links to them, KVM's own files, and make's objects. A changed patch changes some of the files,
and make compiles what depends on them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmm.core.errors import UsageError, tell
from vmm.lab.compiling import (
    first_error,
    names_a_fault,
    require_plain,
    run_by_own_loader,
    run_make,
    unpack_sources,
)
from vmm.lab.kvm_change import FOLDERS, HEADERS, KvmChange
from vmm.lab.progress import Progress
from vmm.lab.work_folder import MakeFailed, WorkFolder, link_tree

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
    work: Path  # where it is compiled, in whatever state an earlier build left that

    def __call__(self, into: Path) -> None:
        """Compiles, and leaves kvm.ko and kvm-amd.ko in the new directory `into`.

        Raises UsageError for what the user's change does wrong, else HostError. The caller holds a
        lock on `work`.
        """
        require_plain(self.work)
        changed = into.parent / "changed"
        for path in _kvm_files(_common(self.tree)):
            target = changed / path.relative_to(_common(self.tree))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        left_out = self.change.apply(changed, [str(self.tree / "usr" / "bin" / "patch")])
        if left_out:
            tell(f"not compiled here, and left out of the patches: {', '.join(left_out)}")
        self.progress.step(f"compiling KVM {self._words()}")
        folder = WorkFolder(self.work)
        sources = folder.build(
            lambda: self._lay_out(folder), lambda: self._make_in(folder, changed)
        )
        into.mkdir()
        for name in MODULES:
            shutil.copyfile(sources / f"{name}.ko", into / f"{name}.ko")

    def _make_in(self, folder: WorkFolder, changed: Path) -> Path:
        """The folder with the modules of the files in `changed`."""
        common = _common(self.work)
        files = (path for path in changed.rglob("*") if path.is_file())
        folder.take_over({str(path.relative_to(changed)): path for path in files}, common)
        sources = common / "arch" / "x86" / "kvm"
        self._make(sources)
        return sources

    def _words(self) -> str:
        if self.change.is_users:
            return "with your change"
        return "with experiments" if self.change.additions else "with KVM_X86_SW_PROTECTED_VM"

    def _lay_out(self, folder: WorkFolder) -> None:
        """A new tree of links to the cached one."""
        (self.work / "usr").mkdir()
        for part in (self.tree / "usr").iterdir():
            if part.name != "src":
                (self.work / "usr" / part.name).symlink_to(part)
        link_tree(self.tree / "usr" / "src", self.work / "usr" / "src")
        makefile = self._headers_folder / "Makefile"
        text = makefile.read_text().replace("/usr/src/", f"{self.work}/usr/src/")
        makefile.unlink()
        makefile.write_text(text)
        common = _common(self.work)
        folder.note([str(path.relative_to(common)) for path in _kvm_files(common)])

    @property
    def _headers_folder(self) -> Path:
        return self.work / "usr" / "src" / f"linux-headers-{self.release}"

    def _make(self, sources: Path) -> None:
        for name in MODULES:
            (sources / f"{name}.ko").unlink(missing_ok=True)
        symbols = [*(_SW_PROTECTED if self.change.sw_protected else ()), *self.change.symbols]
        defined = "".join(f"-DCONFIG_{symbol}=1 " for symbol in symbols)
        programs = self.tree / "usr" / "bin"
        command = [str(programs / "make"), f"-j{len(os.sched_getaffinity(0))}"]
        command += ["-C", str(self._headers_folder), f"M={sources}"]
        command += [f"CONFIG_{symbol}=y" for symbol in symbols] + list(_SETTINGS)
        # Debugging information would be stripped, and takes a third more time.
        command += [f"KCFLAGS={defined}-g0", "modules"]
        environment = {"PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
        status, output = run_make(
            command,
            environment,
            lambda count, name: self.progress.part(f"{count} files, {name}"),
        )
        missing = [name for name in MODULES if not (sources / f"{name}.ko").exists()]
        if status != 0 or missing:
            reason = first_error(output).replace("../../../", "").replace(f"{sources}/", "")
            if self.change.is_users and status >= 0 and names_a_fault(reason):
                raise UsageError(f"your KVM does not compile for Linux {self.release}: {reason}")
            raise MakeFailed(
                f"compiling KVM for Linux {self.release} failed: {reason}; "
                "the lab's stock host needs no compiler"
            )


def work_name(version: str, change: KvmChange) -> str:
    """Of the folder where changes that differ in their patches alone are compiled."""
    kind = repr((RECIPE, TREE_RECIPE, change.sw_protected, change.additions, change.symbols))
    return f"kvm-work/{version}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"


def _common(tree: Path) -> Path:
    """The headers that all of Debian's flavours of that kernel have in common."""
    return next(iter(sorted((tree / "usr" / "src").glob("linux-headers-*-common"))))


def _kvm_files(common: Path) -> Iterator[Path]:
    """KVM's own files in a kernel's sources."""
    for folder in FOLDERS:
        yield from (path for path in (common / folder).rglob("*") if path.is_file())
    for pattern in HEADERS:
        yield from common.glob(pattern)
