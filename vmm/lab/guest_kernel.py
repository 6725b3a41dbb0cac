"""A small kernel for protected guests, compiled from Debian's source package.

Debian's arm64 kernels have neither ARM_PKVM_GUEST nor DMA_RESTRICTED_POOL: as protected guests they
share nothing, so that no device works. This one has both, all drivers built in, and a tenth of the
size, which counts where the host of the guest is emulated. Compilers and sources are unpacked for
the build and leave with it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmm.core.errors import HostError
from vmm.lab.architecture import HERE, LabArchitecture
from vmm.lab.compiling import (
    first_error,
    require_plain,
    run_by_own_loader,
    running,
    unpack_sources,
)
from vmm.lab.progress import Progress

NAME = "pkvm-guest"
CONFIGURATION = Path(__file__).with_name(f"{NAME}.config")
IMAGE = "Image"
# Counts up when the image would come out differently, so that older cached ones aren't used.
_RECIPE = 1
# Without them the kernel boots and its guest has no disk: refused here rather than found there.
_REQUIRED = ("ARM_PKVM_GUEST", "DMA_RESTRICTED_POOL", "VIRTIO_PCI", "VIRTIO_BLK", "EXT4_FS")
_FILES = 900  # to be compiled, about
_TOOLS = ("gcc", "libc6-dev", "make", "flex", "bison", "bc", "m4", "xz-utils")
# What isn't compiled in these folders makes two thirds of the sources; makefiles and Kconfig files
# are read all the same.
_NOT_COMPILED = (
    *(f"drivers/{name}" for name in ("gpu", "media", "staging", "infiniband", "scsi", "usb")),
    *(f"drivers/net/{name}" for name in ("ethernet", "wireless")),
    "sound",
    "Documentation",
    "tools/testing",
)


def recipe() -> str:
    """Changes when the kernel that is built is another one."""
    return hashlib.sha256(CONFIGURATION.read_bytes()).hexdigest()[:12] + f"-{_RECIPE}"


@dataclass(frozen=True, slots=True)
class GuestKernelBuild:
    """How the kernel is made from Debian's sources of one version."""

    version: str  # of Debian's package
    architecture: LabArchitecture
    compilers: Callable[[], Path]  # a tree of packages: programs named by the architecture
    progress: Progress
    download: Callable[[list[str], Path], None]  # packages with all they need, unpacked

    def __call__(self, into: Path) -> None:
        """Downloads, compiles, and leaves Image in the new directory `into`."""
        require_plain(into.parent)
        cross = self.compilers()
        tree, sources = into.parent / "build", into.parent / "linux"
        self.progress.step("downloading compiler and sources of a guest kernel (230 MB)")
        series = ".".join(self.version.split(".")[:2])
        self.download([*_TOOLS, f"linux-source-{series}={self.version}"], tree)
        run_by_own_loader(tree)
        self._complete(tree)
        self.progress.step("unpacking the sources of a guest kernel")
        sources.mkdir()
        excluded = [f"--exclude={{top}}/{folder}/*.[ch]" for folder in _NOT_COMPILED]
        unpack_sources(tree, sources, excluded)
        self.progress.step(f"compiling the guest kernel {NAME} (once, some 7 minutes on two cores)")
        shutil.copyfile(CONFIGURATION, sources / "small.config")
        self._make(tree, cross, sources, "allnoconfig", "KCONFIG_ALLCONFIG=small.config")
        self._require_options(sources)
        self._make(tree, cross, sources, IMAGE)
        into.mkdir()
        built = sources / "arch" / "arm64" / "boot" / IMAGE
        shutil.copyfile(built, into / IMAGE)
        shutil.copyfile(sources / ".config", into / "config")

    def _complete(self, tree: Path) -> None:
        """The links that a system has, by which linker scripts name the C library."""
        for name in ("lib", "lib64"):
            if not (tree / name).exists():
                (tree / name).symlink_to(f"usr/{name}")

    def _make(self, tree: Path, cross: Path, sources: Path, *words: str) -> None:
        bin_folder = tree / "usr" / "bin"
        libraries = HERE.libraries(tree)
        # Programs that the build makes for itself run by the C library that they are linked with.
        linking = f"-Wl,--dynamic-linker={libraries / HERE.loader},-rpath={libraries}"
        command = [
            str(bin_folder / "make"),
            f"-j{len(os.sched_getaffinity(0))}",
            "-C",
            str(sources),
        ]
        command += ["ARCH=arm64", f"CROSS_COMPILE={cross}/usr/bin/{self.architecture.triplet}-"]
        command += [f"HOSTCC=gcc --sysroot={tree}", f"HOSTLDFLAGS={linking}", *words]
        environment = {
            "PATH": f"{bin_folder}:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C",
            "M4": str(bin_folder / "m4"),
            "BISON_PKGDATADIR": str(tree / "usr" / "share" / "bison"),
            "KBUILD_BUILD_USER": "pyvmm",
            "KBUILD_BUILD_HOST": "lab",
        }
        output = []
        files = 0
        with running(command, environment) as make:
            assert make.stdout is not None
            for line in make.stdout:
                output.append(line.strip())
                if line.split()[:1] in (["CC"], ["AS"]):
                    files += 1
                    self.progress.part(f"{files} files of about {_FILES}")
        if make.returncode != 0:
            raise HostError(
                f"compiling a guest kernel from Debian's Linux {self.version} failed: "
                f"{first_error(output)}; --kernel FILE takes another one"
            )

    def _require_options(self, sources: Path) -> None:
        options = set((sources / ".config").read_text().splitlines())
        missing = [name for name in _REQUIRED if f"CONFIG_{name}=y" not in options]
        if missing:
            raise HostError(
                f"Debian's Linux {self.version} doesn't take {', '.join(missing)} of "
                f"{CONFIGURATION}; --kernel FILE takes another one"
            )
