"""Kernels that are compiled from sources, once, and kept: guests', and lab machines' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from vmm.core.errors import HostError
from vmm.core.kernel_file import debian_version
from vmm.lab import guest_kernel, host_kernel
from vmm.lab.apt import QEMU_SUITE, PackagesUnavailable
from vmm.lab.kernel_build import (
    TREES_RECIPE,
    KernelBuild,
    KernelSources,
    KernelTools,
    SmallKernel,
    work_name,
)
from vmm.lab.kvm_change import KvmChange
from vmm.lab.packages import HOST_SERIES, Kernel, MissingFiles, Packages

_TOOLS = f"packages/kernel-tools-{TREES_RECIPE}"
_KEPT = 24  # some 10 MB each


@dataclass(slots=True)
class BuiltKernels:
    """Gives kernels for the architecture of `packages`."""

    packages: Packages
    compilers: Callable[[], Path] | None  # the tree of a cross compiler; None: not needed

    def guest(self) -> Kernel:
        """The small kernel for protected guests (vmm.lab.guest_kernel).

        What only its build needs is unpacked for that, and leaves with it.
        """
        kernel, change, version = guest_kernel.KERNEL, KvmChange(), self._version()
        cache = self.packages.cache

        def build(into: Path) -> None:
            scratch = into.parent
            tools, sources = cache.path(_TOOLS), cache.path(_sources(version))
            if not tools.exists():
                tools = scratch / "tools"
                self._tools(tools)(tools)
            if not sources.exists():
                sources = scratch / "sources"
                self._sources(version, tools)(sources)
            self._build(kernel, tools, sources, _debians(version), change, scratch / "work")(into)

        return self._entry(kernel, f"{version}-{kernel.recipe(change)}", build)

    def host(self, change: KvmChange) -> Kernel:
        """A lab machine's, with these changes. Raises UsageError for what they do wrong."""
        cache = self.packages.cache
        kernel = host_kernel.KERNELS[self.packages.architecture.name]
        version = self._version() if change.source is None else None
        origin = str(change.source) if version is None else _debians(version)

        def build(into: Path) -> None:
            tools = cache.entry(_TOOLS, self._tools(cache.path(_TOOLS)))
            sources = None
            if version is not None:
                sources = cache.entry(_sources(version), self._sources(version, tools))
            work = work_name(kernel, origin)
            with cache.lock(work):
                self._build(kernel, tools, sources, origin, change, cache.path(work))(into)

        name = f"{change.name()}-{version or 'tree'}-{kernel.recipe(change)}"
        built = self._entry(kernel, name, build)
        cache.prune_folders(f"packages/{kernel.name}-", keep=_KEPT)
        return built

    def _entry(self, kernel: SmallKernel, name: str, build: Callable[[Path], None]) -> Kernel:
        try:
            entry = self.packages.cache.entry(f"packages/{kernel.name}-{name}", build)
        except PackagesUnavailable as error:
            wanted = (
                f"a compiler and Linux's sources for {kernel.label} (if the archive has a newer "
                f"{HOST_SERIES} by now, remove {self.packages.kernel_tree(HOST_SERIES)})"
            )
            raise MissingFiles([wanted], self.packages.cache.root, str(error)) from error
        return Kernel(entry / kernel.image, None)

    def _version(self) -> str:
        """The version of Debian's package of the lab's stock kernel."""
        stock = self.packages.host_kernel(None, None).image
        version = debian_version(stock)
        if version is None:
            raise HostError(
                f"{stock} doesn't say which version it is; remove "
                f"{self.packages.kernel_tree(HOST_SERIES)} to download it again"
            )
        return version

    def _tools(self, place: Path) -> KernelTools:
        def download(packages: Sequence[str], into: Path) -> None:
            with self._apt():
                self.packages.apt.download_closure(packages, QEMU_SUITE, into)

        return KernelTools(self.packages.progress, download, place)

    def _sources(self, version: str, tools: Path) -> KernelSources:
        def download(packages: Sequence[str], into: Path) -> None:
            with self._apt():
                self.packages.apt.download(packages, into)

        return KernelSources(version, self.packages.progress, download, tools)

    def _build(
        self,
        kernel: SmallKernel,
        tools: Path,
        sources: Path | None,
        origin: str,
        change: KvmChange,
        work: Path,
    ) -> KernelBuild:
        cross = None if self.compilers is None else self.compilers()
        progress = self.packages.progress
        return KernelBuild(kernel, tools, cross, sources, origin, change, progress, work)

    def _apt(self) -> AbstractContextManager[None]:
        if self.packages.offline:
            raise PackagesUnavailable("--lab-offline")
        return self.packages.cache.lock("apt")


def _sources(version: str) -> str:
    return f"packages/linux-sources-{version}-{TREES_RECIPE}"


def _debians(version: str) -> str:
    return f"Debian's Linux {version}"
