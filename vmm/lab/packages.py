"""The programs and kernels that the lab is made of: given by option, found, or downloaded.

Everything downloaded is unpacked into the cache once; afterwards no network is needed. Every
file can be given by option instead, and the error for a machine without apt or network says so.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from vmm.core.errors import HostError, UsageError
from vmm.core.kernel_file import debian_version, kernel_release
from vmm.lab import kvm_build
from vmm.lab.apt import QEMU_SUITE, Apt, PackagesUnavailable, newest
from vmm.lab.architecture import AMD64, HERE, LabArchitecture
from vmm.lab.cache import Cache
from vmm.lab.kvm_change import KvmChange
from vmm.lab.progress import Progress

# guest_memfd with host mappings on ordinary VMs, the newest KVM that Debian builds.
HOST_SERIES = "7.3"
_DEBIAN = "debian:"

_T = TypeVar("_T")


class MissingFiles(HostError):
    """Files that the lab needs, is not given, and cannot download; several make one sentence."""

    def __init__(self, wanted: Sequence[str], cache: Path, reason: str) -> None:
        super().__init__(
            f"the lab needs {'; '.join(wanted)}: not in the cache {cache} "
            f"and not to be downloaded ({reason})"
        )
        self.wanted = tuple(wanted)
        self.reason = reason


@dataclass(slots=True)
class Wants:
    """Asks for several things, so that one error names all that are missing."""

    _errors: list[MissingFiles] = field(default_factory=list)

    def gather(self, get: Callable[[], _T]) -> _T | None:
        """The thing, or None when it is missing: `settle` then raises."""
        try:
            return get()
        except MissingFiles as error:
            self._errors.append(error)
            return None

    def settle(self, cache: Path) -> None:
        """Raises MissingFiles if anything was missing."""
        if self._errors:
            wanted = [w for error in self._errors for w in error.wanted]
            raise MissingFiles(wanted, cache, self._errors[0].reason)


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU: its program, and for an unpacked one where its libraries and firmware lie."""

    program: Path
    libraries: Path | None = None
    data: tuple[Path, ...] = ()

    @property
    def loader(self) -> Path | None:
        """The unpacked C library's own loader; None for a QEMU that the system runs."""
        return None if self.libraries is None else self.libraries / HERE.loader

    def command(self) -> list[str]:
        """The words that start it; options follow."""
        words = []
        if self.loader is not None:
            # The libraries come from another release than the system's perhaps: run the program
            # with the loader that belongs to them, and let no other process see them.
            words += [str(self.loader), "--library-path", str(self.libraries)]
        words.append(str(self.program))
        for folder in self.data:
            words += ["-L", str(folder)]
        return words


@dataclass(frozen=True, slots=True)
class Bochs:
    """Bochs unpacked with all that it needs, and a floppy image that boots the lab's kernel."""

    tree: Path
    floppy: Path


@dataclass(frozen=True, slots=True)
class Kernel:
    """A bootable image and, where known, the modules that were built with it."""

    image: Path
    modules: Path | None


@dataclass(slots=True)
class Packages:
    """Gives the lab's programs and kernels, downloading what isn't in the cache."""

    cache: Cache
    progress: Progress
    apt: Apt  # of programs that run here
    offline: bool = False
    architecture: LabArchitecture = AMD64  # of the lab machine
    other_apt: Apt | None = None  # of its packages, when it isn't this machine's

    @property
    def machine_apt(self) -> Apt:
        """Gives packages of the lab machine's architecture."""
        return self.other_apt or self.apt

    def qemu(self, given: str | None) -> Qemu:
        """The one given, else the one on PATH, else Debian's, unpacked into the cache."""
        if given is not None:
            return Qemu(_existing(given, "--lab-qemu"))
        on_path = shutil.which(self.architecture.qemu_program)
        if on_path is not None:
            return Qemu(Path(on_path))
        return self.unpacked_qemu()

    def unpacked_qemu(self) -> Qemu:
        """Debian's QEMU with all of its libraries, from the cache."""
        program = self.architecture.qemu_program
        tree = self.tree(
            f"qemu{self.architecture.suffix()}",
            f"downloading QEMU (Debian {QEMU_SUITE}) into the cache",
            lambda path: self.apt.download_closure(
                [f"{self.architecture.qemu_package}/{QEMU_SUITE}"], QEMU_SUITE, path
            ),
            f"{program} (--lab-qemu FILE, or put it on PATH)",
        )
        share = tree / "usr" / "share"
        return Qemu(
            program=tree / "usr" / "bin" / program,
            libraries=HERE.libraries(tree),
            data=tuple(share / name for name in self.architecture.qemu_data),
        )

    def bochs_tree(self) -> Path:
        """Debian's Bochs, and the boot loader for it, unpacked with all of their libraries."""
        return self.tree(
            "bochs",
            f"downloading Bochs (Debian {QEMU_SUITE}) into the cache",
            lambda path: self.apt.download_closure(
                ["bochs", "bochs-term", "grub-pc-bin", "ncurses-base"], QEMU_SUITE, path
            ),
            "Debian's Bochs for --host bochs",
        )

    def busybox(self, given: str | None) -> Path:
        """A statically linked busybox."""
        if given is not None:
            return _existing(given, "--lab-busybox")
        tree = self.tree(
            f"busybox{self.architecture.suffix()}",
            "downloading busybox-static into the cache",
            lambda path: self.machine_apt.download([f"busybox-static/{QEMU_SUITE}"], path),
            "busybox, linked statically (--lab-busybox FILE)",
        )
        return _one_of(tree, ("usr/bin/busybox", "bin/busybox"))

    def fio_tree(self) -> Path:
        """Debian's fio, unpacked with all of its libraries."""
        return self.tree(
            "fio",
            f"downloading fio (Debian {QEMU_SUITE}) into the cache",
            lambda path: self.apt.download_closure(["fio"], QEMU_SUITE, path),
            "fio",
        )

    def host_kernel(self, given: str | None, modules: str | None) -> Kernel:
        """The kernel whose KVM the lab offers."""
        if given is None:
            given = _DEBIAN + HOST_SERIES
        if given.startswith(_DEBIAN):
            return self.debian_kernel(
                given,
                f"a Linux {HOST_SERIES} image with its modules "
                "(--lab-host-kernel FILE --lab-host-modules DIR)",
            )
        if modules is None:
            raise UsageError(
                f"--lab-host-kernel {given}: its modules are needed too, "
                f"{', '.join((*self.architecture.kvm_modules, 'virtio_blk'))} and overlay; "
                "give --lab-host-modules DIR (lib/modules/RELEASE)"
            )
        return Kernel(
            _existing(given, "--lab-host-kernel"), _existing(modules, "--lab-host-modules")
        )

    def debian_kernel(self, name: str, wanted: str | None = None) -> Kernel:
        """Debian's newest cloud kernel of a series, named as `debian:6.12`."""
        series = name.removeprefix(_DEBIAN)
        if not re.fullmatch(r"\d+\.\d+", series):
            raise UsageError(f"kernel {name!r}: the form is debian:SERIES, as in debian:6.12")
        tree = self.tree(
            self.kernel_tree(series).name,
            f"downloading Debian's Linux {series} into the cache",
            lambda path: self._download_kernel(series, path),
            wanted or f"a Linux {series} image (--kernel FILE)",
        )
        image = next(iter(sorted(tree.rglob("vmlinuz*"))))
        return Kernel(image, next(iter(sorted(tree.glob("**/lib/modules/*"))), None))

    def changed_kvm(self, kernel: Kernel, change: KvmChange, wanted_by: str) -> Path:
        """A directory with KVM's modules for this kernel, changed so.

        `wanted_by`: the option that asks for it. Raises UsageError for a change that can't be
        carried out, or for another kernel than Debian's.
        """
        release, version = kernel_release(kernel.image), debian_version(kernel.image)
        if release is None or version is None or not version.startswith(f"{HOST_SERIES}."):
            raise UsageError(
                f"{wanted_by}: KVM can be compiled for Debian's Linux {HOST_SERIES} only, "
                f"which {kernel.image} is not; leave --lab-host-kernel out"
            )

        def download(packages: list[str], into: Path) -> None:
            if self.offline:
                raise PackagesUnavailable("--lab-offline")
            with self.cache.lock("apt"):
                self.apt.download_closure(packages, QEMU_SUITE, into)

        def build(into: Path) -> None:
            name = f"packages/kvm-tree-{version}-{kvm_build.TREE_RECIPE}"
            place = self.cache.path(name)
            tree = kvm_build.KvmTree(release, version, self.progress, download, place)
            unpacked = self.cache.entry(name, tree)
            work = kvm_build.work_name(version, change)
            with self.cache.lock(work):
                kvm_build.KvmBuild(release, unpacked, change, self.progress, self.cache.path(work))(
                    into
                )

        name = f"packages/{change.name()}-{version}-{kvm_build.RECIPE}"
        try:
            return self.cache.entry(name, build)
        except PackagesUnavailable as error:
            wanted = (
                f"headers and sources of Linux {release} to compile KVM (if the archive has a "
                f"newer {HOST_SERIES} by now, remove {self.kernel_tree(HOST_SERIES)})"
            )
            raise MissingFiles([wanted], self.cache.root, str(error)) from error

    def kernel_tree(self, series: str) -> Path:
        """Where Debian's kernel of a series is unpacked."""
        return self.cache.path(f"packages/linux-{series}{self.architecture.suffix()}")

    def _download_kernel(self, series: str, into: Path) -> None:
        number = re.escape(series)
        flavour = self.architecture.kernel_flavour
        names = self.machine_apt.package_names(
            rf"^linux-(image|binary|modules)-{number}[.-].*{flavour}$",
        )
        images = [n for n in names if n.startswith("linux-image-") and "unsigned" not in n]
        image = newest(images)
        if image is None:
            known = {".".join(re.findall(r"\d+", n)[:2]) for n in self._cloud_kernels()}
            raise PackagesUnavailable(
                f"no cloud kernel {series} in the archive, which has {', '.join(sorted(known))}"
            )
        release = image.removeprefix("linux-image-")
        # From 7.1 on the image package is empty and depends on two that hold the files.
        parts = [n for n in (f"linux-binary-{release}", f"linux-modules-{release}") if n in names]
        self.machine_apt.download(parts if len(parts) == 2 else [image], into)

    def _cloud_kernels(self) -> list[str]:
        flavour = self.architecture.kernel_flavour
        return self.machine_apt.package_names(rf"^linux-image-[0-9].*{flavour}$")

    def tree(self, name: str, doing: str, build: Callable[[Path], None], wanted: str) -> Path:
        """An unpacked tree of the cache; `build` downloads it, `wanted` says what is missing."""

        def download(path: Path) -> None:
            if self.offline:
                raise PackagesUnavailable("--lab-offline")
            self.progress.step(doing)
            with self.cache.lock("apt"):
                build(path)

        try:
            return self.cache.entry(f"packages/{name}", download)
        except PackagesUnavailable as error:
            raise MissingFiles([wanted], self.cache.root, str(error)) from error


def _existing(path: str, option: str) -> Path:
    found = Path(path)
    if not found.exists():
        raise UsageError(f"{option} {path}: no such file")
    return found.absolute()


def _one_of(tree: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (tree / name).is_file():
            return tree / name
    raise HostError(f"{tree} holds none of {', '.join(names)}; remove it to download it again")
