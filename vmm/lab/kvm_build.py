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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmm.core.errors import HostError
from vmm.lab.compiling import (
    first_error,
    require_plain,
    run_by_own_loader,
    running,
    unpack_sources,
)
from vmm.lab.progress import Progress

MODULES = ("kvm", "kvm-amd")
# Counts up when modules would come out differently, so that older cached ones aren't used.
RECIPE = 1
_SYMBOLS = ("CONFIG_KVM_SW_PROTECTED_VM", "CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES")
# The lab's processors are AMD's; nobody asks for type information of these modules.
_SETTINGS = ("CONFIG_KVM_INTEL=n", "CONFIG_DEBUG_INFO_BTF_MODULES=")
_SOURCES = ("arch/x86/kvm", "virt")


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
        require_plain(into.parent)
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
        unpack_sources(tree, common, [f"{{top}}/{folder}" for folder in _SOURCES])
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
            raise HostError(
                f"compiling KVM for Linux {self.release} failed: {first_error(output)}; "
                "the lab's stock host needs no compiler"
            )
