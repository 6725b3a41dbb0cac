"""A C compiler that makes another architecture's code: the system's, or Debian's, unpacked."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from vmm.lab.apt import QEMU_SUITE
from vmm.lab.compiling import run_by_own_loader
from vmm.lab.packages import Packages

# Never asked for, a fifth of the tree.
_LEFT_OUT = ("usr/share", "usr/bin/*-lto-dump*", "usr/libexec/gcc-cross/*/*/lto1*")


@dataclass(slots=True)
class CrossCompiler:
    """gcc for `packages.architecture`."""

    packages: Packages

    @property
    def prefix(self) -> str:
        """What its programs' names begin with."""
        return f"{self.packages.architecture.triplet}-"

    def program(self) -> Path:
        """The compiler, which finds the architecture's C library by itself."""
        on_path = shutil.which(f"{self.prefix}gcc")
        if on_path is not None:
            return Path(on_path)
        return self.unpacked() / "usr" / "bin" / f"{self.prefix}cc"

    def unpacked(self) -> Path:
        """The tree of Debian's, from the cache; its programs run as they lie."""
        architecture = self.packages.architecture
        name = f"gcc{architecture.suffix()}"
        place = self.packages.cache.path(f"packages/{name}")
        packages = [f"gcc-{architecture.triplet}", f"libc6-dev-{architecture.debian}-cross"]

        def build(path: Path) -> None:
            self.packages.apt.download_closure(packages, QEMU_SUITE, path)
            for pattern in _LEFT_OUT:
                for found in list(path.glob(pattern)):
                    shutil.rmtree(found) if found.is_dir() else found.unlink()
            run_by_own_loader(path, place)
            compiler = path / "usr" / "bin" / f"{self.prefix}cc"
            # Headers and libraries have their places below / built in.
            words = [f"{place}/usr/bin/{self.prefix}gcc", f"--sysroot={place}"]
            compiler.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            compiler.chmod(0o755)

        return self.packages.tree(
            name,
            f"downloading a compiler for {architecture.label} (Debian {QEMU_SUITE})",
            build,
            f"{self.prefix}gcc (put it on PATH)",
        )
