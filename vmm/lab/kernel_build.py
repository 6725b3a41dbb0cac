"""Small kernels compiled from sources: Debian's, or a tree of the user's own, with changes in them.

A few hundred options instead of Debian's thousands, everything built in: minutes instead of an
hour. `SmallKernel` says what a kernel is for and needs; guests' (vmm.lab.guest_kernel) and lab
machines' own (vmm.lab.host_kernel) are made by the same steps. What is compiled may stay in a work
folder, as KVM's modules do (vmm.lab.kvm_build): then a changed file costs what depends on it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmm.core.errors import HostError, UsageError, tell
from vmm.lab.architecture import HERE, LabArchitecture
from vmm.lab.compiling import (
    first_error,
    names_a_fault,
    require_plain,
    run_by_own_loader,
    run_make,
    unpack_sources,
)
from vmm.lab.kvm_change import NOT_COMPILED, KvmChange, kernel_files
from vmm.lab.progress import Progress
from vmm.lab.work_folder import MakeFailed, WorkFolder, link_tree

# Count up when a kernel, or the trees that it is built from, would come out differently, so that
# older cached ones aren't used.
RECIPE = 1
TREES_RECIPE = 1
_SW_PROTECTED = "KVM_SW_PROTECTED_VM"
# gcc makes this machine's code, and another's comes with a compiler of its own; libelf is for
# objtool, which reads what was compiled for x86.
_TOOLS = ("gcc", "libc6-dev", "libelf-dev", "make", "patch", "flex", "bison", "bc", "m4")

Download = Callable[[list[str], Path], None]
"""Unpacks packages with all that they need."""


@dataclass(frozen=True, slots=True)
class SmallKernel:
    """What one kind of kernel is for, and has to have."""

    name: str  # of its cache entries
    label: str  # for people, after "compiling"
    architecture: LabArchitecture
    configurations: tuple[Path, ...]  # one after the other, on top of `make allnoconfig`
    required: tuple[str, ...]  # refused without these, rather than found out when it runs
    files: int  # to be compiled, about
    minutes: int  # that takes on two cores, about
    otherwise: str  # what the user can do without it

    def configuration(self, change: KvmChange) -> str:
        """What is asked of Kconfig."""
        text = "".join(path.read_text() for path in self.configurations)
        symbols = (*((_SW_PROTECTED,) if change.sw_protected else ()), *change.symbols)
        return text + "".join(f"CONFIG_{symbol}=y\n" for symbol in symbols)

    def recipe(self, change: KvmChange) -> str:
        """Changes when the kernel that is built is another one, but for its sources."""
        digest = hashlib.sha256(self.configuration(change).encode()).hexdigest()
        return f"{digest[:12]}-{RECIPE}"

    @property
    def image(self) -> str:
        """What boots, by its name in an entry."""
        return self.architecture.kernel_image


@dataclass(frozen=True, slots=True)
class KernelTools:
    """Compiler, make and all that kernels are compiled with, unpacked; they run as they lie."""

    progress: Progress
    download: Download
    place: Path  # where the tree will be

    def __call__(self, into: Path) -> None:
        require_plain(self.place)
        self.progress.step("downloading a compiler for kernels (100 MB)")
        self.download([*_TOOLS, "xz-utils"], into)
        # The links that a system has, by which linker scripts name the C library.
        for name in ("lib", "lib64"):
            if not (into / name).exists():
                (into / name).symlink_to(f"usr/{name}")
        run_by_own_loader(into, self.place)


@dataclass(frozen=True, slots=True)
class KernelSources:
    """Linux's sources out of Debian's package of one version, what small kernels need of them."""

    version: str
    progress: Progress
    download: Download  # the package alone
    tools: Path

    def __call__(self, into: Path) -> None:
        self.progress.step(f"downloading Linux {self.version}'s sources (150 MB)")
        series = ".".join(self.version.split(".")[:2])
        package = into.parent / "package"
        self.download([f"linux-source-{series}={self.version}"], package)
        self.progress.step("unpacking the kernel's sources")
        into.mkdir()
        excluded = [f"--exclude={{top}}/{folder}/*.[ch]" for folder in NOT_COMPILED]
        unpack_sources(package, into, excluded, self.tools)


@dataclass(frozen=True, slots=True)
class KernelBuild:
    """How a kernel is made with such tools, from such sources or the user's."""

    kernel: SmallKernel
    tools: Path
    cross: Path | None  # the tree of another architecture's compiler
    sources: Path | None  # Debian's; None where the change brings a tree
    origin: str  # of the sources, for people
    change: KvmChange
    progress: Progress
    work: Path  # where it is compiled, in whatever state an earlier build left that

    def __call__(self, into: Path) -> None:
        """Compiles, and leaves the image and its configuration in the new directory `into`.

        Raises UsageError for what the user's change does wrong, else HostError. The caller holds a
        lock on `work`.
        """
        require_plain(self.work)
        wanted = self._wanted(into.parent / "changed")
        folder = WorkFolder(self.work)
        minutes = f"once, some {self.kernel.minutes} minutes on two cores"
        time = "what has changed" if folder.goes_on else minutes
        self.progress.step(f"compiling {self.kernel.label} ({time})")

        def compile_in() -> None:
            folder.take_over(wanted, self._tree)
            self._configure()
            with folder.interruptible():
                self._make(self.kernel.image)

        folder.build(lambda: self._lay_out(folder), compile_in)
        into.mkdir()
        boot = self._tree / "arch" / self.kernel.architecture.linux / "boot"
        shutil.copyfile(boot / self.kernel.image, into / self.kernel.image)
        shutil.copyfile(self._tree / ".config", into / "config")

    @property
    def _tree(self) -> Path:
        return self.work / "linux"

    def _wanted(self, changed: Path) -> dict[str, Path]:
        """Each source file by its name: of the tree, or what patches made of it, in `changed`."""
        base = self.sources if self.change.source is None else self.change.source
        assert base is not None
        names = kernel_files(base, self.kernel.architecture.linux)
        wanted = {str(path.relative_to(base)): path for path in names}
        changed.mkdir()
        touched = self.change.touched()
        for name in touched & wanted.keys():
            (changed / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(wanted[name], changed / name)
            del wanted[name]
        left_out = self.change.apply(changed, [str(self.tools / "usr" / "bin" / "patch")])
        if left_out:
            tell(f"not compiled here, and left out of the patches: {', '.join(left_out)}")
        for path in changed.rglob("*"):
            if path.is_file():
                wanted[str(path.relative_to(changed))] = path
        return wanted

    def _lay_out(self, folder: WorkFolder) -> None:
        """Links to the cached sources; a tree of the user's is copied file by file."""
        if self.change.source is not None:
            self._tree.mkdir()
            folder.note([])
            return
        assert self.sources is not None
        link_tree(self.sources, self._tree)
        names = kernel_files(self._tree, self.kernel.architecture.linux)
        folder.note([str(path.relative_to(self._tree)) for path in names])

    def _configure(self) -> None:
        """Anew each time: a patch may have changed what Kconfig asks."""
        (self._tree / "small.config").write_text(self.kernel.configuration(self.change))
        self._make("allnoconfig", "KCONFIG_ALLCONFIG=small.config")
        options = set((self._tree / ".config").read_text().splitlines())

        def lacking(names: tuple[str, ...]) -> str:
            return ", ".join(name for name in names if f"CONFIG_{name}=y" not in options)

        if names := lacking(self.change.symbols):
            raise UsageError(
                f"--kvm-config: {self.origin} doesn't take {names}: there is no such option, or "
                "one that it depends on is off (--kvm-config takes more than one)"
            )
        needed = self.kernel.required
        if names := lacking((*needed, *((_SW_PROTECTED,) if self.change.sw_protected else ()))):
            kind = HostError if self.change.source is None else UsageError
            files = ", ".join(path.name for path in self.kernel.configurations)
            raise kind(f"{self.origin} doesn't take {names} of {files}; {self.kernel.otherwise}")

    def _make(self, *words: str) -> None:
        programs = self.tools / "usr" / "bin"
        libraries = HERE.libraries(self.tools)
        # Programs that the build makes for itself run by the C library that they are linked with.
        linking = f"-Wl,--dynamic-linker={libraries / HERE.loader},-rpath={libraries}"
        architecture = self.kernel.architecture
        prefix = "" if self.cross is None else f"{self.cross}/usr/bin/{architecture.triplet}-"
        command = [str(programs / "make"), f"-j{len(os.sched_getaffinity(0))}"]
        command += ["-C", str(self._tree), f"ARCH={architecture.linux}", f"CROSS_COMPILE={prefix}"]
        command += [f"HOSTCC=gcc --sysroot={self.tools}", f"HOSTLDFLAGS={linking}", *words]
        environment = {
            "PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C",
            "M4": str(programs / "m4"),
            "BISON_PKGDATADIR": str(self.tools / "usr" / "share" / "bison"),
            "KBUILD_BUILD_USER": "pyvmm",
            "KBUILD_BUILD_HOST": "lab",
        }
        status, output = run_make(
            command,
            environment,
            lambda count, name: self.progress.part(
                f"{count} files of about {self.kernel.files}, {name}"
            ),
        )
        if status == 0:
            return
        reason = first_error(output).replace(f"{self._tree}/", "")
        if self.change.is_users and status > 0 and names_a_fault(reason):
            raise UsageError(f"your kernel does not compile: {reason}")
        raise MakeFailed(
            f"compiling {self.kernel.label} from {self.origin} failed: {reason}; "
            f"{self.kernel.otherwise}"
        )


def work_name(kernel: SmallKernel, origin: str) -> str:
    """Of the folder where kernels from the same sources are compiled, whatever is changed there."""
    kind = repr((RECIPE, TREES_RECIPE, origin))
    return f"kvm-work/{kernel.name}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
