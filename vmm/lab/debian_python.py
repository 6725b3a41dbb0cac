"""Debian's Python for a machine of another architecture, with wheels for it and our extension.

Nothing of that architecture is run here: its packages and wheels are unpacked, the extension is
cross-compiled, and modules are compiled by Debian's Python of the same version for this machine,
whose compiled files are the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmm.core.errors import HostError
from vmm.lab import interpreter
from vmm.lab.apt import QEMU_SUITE, PackagesUnavailable
from vmm.lab.cross import CrossCompiler
from vmm.lab.packages import Packages
from vmm.lab.programs import run_unpacked

PIP = (sys.executable, "-m", "pip")
VERSION = "3.13"  # of Debian trixie; wheels are asked for by it
_TAG = VERSION.replace(".", "")
# pyvmm's dependencies and its tests'. What is there costs an image some space, no start any time.
_DISTRIBUTIONS = interpreter.DISTRIBUTIONS
# Platforms whose wheels this Python takes, newest first (PEP 600: by the C library's version).
_PLATFORMS = ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
_LEFT_OUT = ("share", "include")  # of usr; nothing in them is run or imported
_ROOT_LINKS = ("bin", "lib", "sbin", "lib64")


@dataclass(slots=True)
class DebianPython:
    """Debian's Python and what pyvmm imports, for `packages.architecture`."""

    packages: Packages
    compiler: CrossCompiler
    executable: Path = Path(f"/usr/bin/python{VERSION}")
    bytecode: str = f"cpython-{_TAG}"
    _trees: list[Path] = field(default_factory=list)

    def key(self) -> str:
        """Packages and wheels are unpacked once and never change: paths and times stand for them.

        Everything that `fill` takes is downloaded here. An entry's own times tell of its use.
        """
        trees = [self._tree(), self._wheels()]
        text = "".join(f"{t} {max(p.stat().st_ctime_ns for p in t.iterdir())}\n" for t in trees)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def lay_out_links(self, stage: Path) -> None:
        for name in _ROOT_LINKS:
            (stage / "usr" / name).mkdir(parents=True, exist_ok=True)
            (stage / name).symlink_to(f"usr/{name}")

    def fill(self, stage: Path, site: Path) -> None:
        tree = self._tree()
        for source in sorted(tree.glob("usr/*")):
            if source.name not in _LEFT_OUT:
                shutil.copytree(
                    source,
                    stage / "usr" / source.name,
                    symlinks=True,
                    dirs_exist_ok=True,
                    ignore=interpreter.stdlib_filter,
                )
        for name in ("python3", "python"):
            link = stage / "usr" / "bin" / name
            link.unlink(missing_ok=True)
            link.symlink_to(self.executable)
        shutil.copytree(self._wheels(), site, dirs_exist_ok=True)

    def compile(self, stage: Path) -> None:
        tree = self.packages.tree(
            f"python-{VERSION}",
            f"downloading a compiler of Python {VERSION} modules (Debian {QEMU_SUITE})",
            lambda path: self.packages.apt.download_closure([f"python{VERSION}"], QEMU_SUITE, path),
            f"Debian's Python {VERSION}, which compiles the lab machine's modules",
        )
        program = tree / "usr" / "bin" / f"python{VERSION}"
        arguments = ["-I", "-m", "compileall", "-qq", "-j0", "--invalidation-mode=unchecked-hash"]
        arguments += ["-s", str(stage), "-p", "/", str(stage)]
        # Status 1: some file does not compile (libraries have tests of that). It stays a source.
        run_unpacked(tree, program, arguments, statuses=(0, 1))

    def add_extension(self, bindings: Path) -> None:
        source = Path(next(iter(_package_folder("kvm_bindings"))))
        for built in bindings.glob("*.so"):
            built.unlink()
        shutil.copy2(self._extension(source), bindings)

    def _tree(self) -> Path:
        architecture = self.packages.architecture
        return self.packages.tree(
            f"python-{VERSION}{architecture.suffix()}",
            f"downloading Python {VERSION} for {architecture.label} into the cache",
            lambda path: self.packages.machine_apt.download_closure(
                [f"python{VERSION}"], QEMU_SUITE, path
            ),
            f"Debian's Python {VERSION} for {architecture.label}",
        )

    def _wheels(self) -> Path:
        architecture = self.packages.architecture
        names = hashlib.sha256(" ".join(_DISTRIBUTIONS).encode()).hexdigest()[:8]
        return self.packages.tree(
            f"wheels-{VERSION}-{names}{architecture.suffix()}",
            f"downloading pyvmm's dependencies for {architecture.label}",
            self._download_wheels,
            f"wheels of {', '.join(_DISTRIBUTIONS)} for Python {VERSION} on {architecture.name}",
        )

    def _download_wheels(self, into: Path) -> None:
        folder = into.parent / "wheels"
        platforms = [f"--platform={p}_{self.packages.architecture.name}" for p in _PLATFORMS]
        command = [*PIP, "download", "--quiet", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--no-input"]
        command += ["--implementation=cp", f"--python-version={VERSION}", *platforms]
        result = subprocess.run(
            [*command, "--dest", str(folder), *_DISTRIBUTIONS],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if result.returncode != 0:
            raise PackagesUnavailable(f"`pip download` failed: {_last_line(result.stderr)}")
        into.mkdir()
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(into)

    def _extension(self, source: Path) -> Path:
        """Compiled once for each state of the bindings' sources."""
        architecture = self.packages.architecture
        files = sorted(p for p in source.rglob("*") if p.suffix in (".c", ".h") or p.name == _BUILD)
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.relative_to(source)}\0".encode() + file.read_bytes())
        headers = self.packages.tree(
            f"python-{VERSION}-headers{architecture.suffix()}",
            f"downloading Python {VERSION}'s headers for {architecture.label}",
            lambda path: self.packages.machine_apt.download(
                [f"libpython{VERSION}-dev/{QEMU_SUITE}"], path
            ),
            f"Debian's libpython{VERSION}-dev for {architecture.label}",
        )
        name = f"packages/extension-{digest.hexdigest()[:16]}{architecture.suffix()}"

        def build(path: Path) -> None:
            self.packages.progress.step(f"compiling pyvmm's extension for {architecture.label}")
            path.mkdir()
            include = headers / "usr" / "include"
            command = [sys.executable, str(source / _BUILD), "--machine", architecture.name]
            command += ["--compiler", str(self.compiler.program()), "--output", str(path)]
            for folder in (include / f"python{VERSION}", include):
                command += ["--python-include", str(folder)]
            result = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            if result.returncode != 0:
                raise HostError(
                    f"compiling the extension for {architecture.label} failed: "
                    f"{_last_line(result.stderr)}"
                )

        folder = self.packages.cache.entry(name, build)
        return next(iter(sorted(folder.glob("*.so"))))


_BUILD = "build.py"


def _package_folder(name: str) -> Sequence[str]:
    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations or []) if spec is not None else []


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
