"""The running Python, taken along: interpreter, standard library, and installed distributions.

Works for venvs, pyenv's and distributions' Pythons: everything but the distributions keeps its
absolute path, so the interpreter finds itself in the lab as it does here.
"""

from __future__ import annotations

import compileall
import contextlib
import hashlib
import importlib.metadata
import io
import os
import py_compile
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from vmm.lab.closure import is_elf, libraries_of, place_in

# What pyvmm imports, and what its tests need where they are installed.
DISTRIBUTIONS = (
    "cffi",
    "ioctl-opt",
    "mmap-ninja",
    "backports.zstd",
    "lz4",
    "rich",
    "pytest",
    "pytest-timeout",
    "hypothesis",
)
_LEFT_OUT_OF_STDLIB = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
    }
)


def executable() -> Path:
    """The interpreter itself, behind any virtual environment."""
    base: str = getattr(sys, "_base_executable", "") or sys.executable
    return Path(base).resolve()


def standard_library() -> list[Path]:
    """Its directories: pure and compiled parts are separate on some distributions."""
    found = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    # In a venv both paths may name the venv's own, empty lib directory.
    base = Path(sys.base_exec_prefix)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found |= {base / sys.platlibdir / version, base / "lib" / version}
    return sorted(p for p in found if (p / "os.py").is_file() or (p / "lib-dynload").is_dir())


def distribution_closure(
    names: Iterable[str],
) -> dict[str, importlib.metadata.Distribution]:
    """The installed ones among `names`, and what they require, by normalised name.

    Requirements whose marker doesn't hold here are simply not installed, so none is evaluated.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    pending = list(names)
    while pending:
        name = normalised(pending.pop())
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = distribution
        for requirement in distribution.requires or []:
            if "extra ==" not in requirement:
                pending.append(requirement_name(requirement))
    return found


def normalised(name: str) -> str:
    """PEP 503: case and the kind of separator don't matter."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    return match.group(1) if match else ""


def content_key(distributions: dict[str, importlib.metadata.Distribution]) -> str:
    """Changes when the interpreter or one of the distributions is another."""
    digest = hashlib.sha256()
    program = executable()
    status = program.stat()
    digest.update(f"{program} {sys.version} {status.st_size} {status.st_mtime_ns}\n".encode())
    digest.update(f"{sys.executable}\n".encode())
    for name, distribution in sorted(distributions.items()):
        where = distribution.locate_file("")
        digest.update(f"{name} {distribution.version} {where}\n".encode())
    return digest.hexdigest()[:16]


def copy_interpreter(root: Path) -> list[Path]:
    """Interpreter and standard library below `root`, at their own paths; returns the ELF files."""
    program = executable()
    _copy(program, place_in(root, program))
    for name in _names_of_the_interpreter(program):
        link = place_in(root, name)
        if not link.exists() and not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(program)
    elf_files = [program]
    for folder in standard_library():
        target = place_in(root, folder)
        shutil.copytree(folder, target, ignore=stdlib_filter, dirs_exist_ok=True, symlinks=False)
        elf_files += [p for p in folder.glob("lib-dynload/*.so") if is_elf(p)]
    return elf_files


def _names_of_the_interpreter(program: Path) -> list[Path]:
    """Paths by which scripts may call it: the way it was started here, and the usual ones."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    beside = [program.parent / n for n in (f"python{version}", "python3", "python")]
    return [*beside, Path(sys.executable).absolute(), Path("/usr/local/bin/python3")]


def stdlib_filter(folder: str, names: list[str]) -> set[str]:
    left_out = {n for n in names if n in _LEFT_OUT_OF_STDLIB or n.startswith("config-")}
    # numpy and others have `tests` packages; only whole directories are meant.
    return {n for n in left_out if os.path.isdir(os.path.join(folder, n))}


def copy_distributions(
    target: Path, distributions: dict[str, importlib.metadata.Distribution]
) -> list[Path]:
    """The distributions' files below `target`, which goes on the path; returns the ELF files."""
    elf_files = []
    for distribution in distributions.values():
        for file in distribution.files or []:
            # Scripts lie outside ("../../bin/x"); compiled files are made anew; tests stay here.
            if ".." in file.parts or file.suffix == ".pyc" or "tests" in file.parts[:-1]:
                continue
            source = Path(str(file.locate()))
            if source.is_file():
                _copy(source, target / file)
                if ".so" in source.name and is_elf(source):
                    elf_files.append(source)
    return elf_files


def copy_libraries(root: Path, elf_files: Iterable[Path], within: Iterable[Path]) -> None:
    """The libraries that the ELF files need, except those that lie `within` what was copied."""
    skipped = tuple(str(p.resolve()) + os.sep for p in within)
    for library in sorted(libraries_of(elf_files)):
        if not str(library.resolve()).startswith(skipped):
            _copy(library, place_in(root, library))


class RunningPython:
    """The Python that runs this, as a lab machine of this machine's architecture has it."""

    def __init__(self) -> None:
        self._distributions = distribution_closure(DISTRIBUTIONS)

    @property
    def executable(self) -> Path:
        return executable()

    @property
    def bytecode(self) -> str:
        return sys.implementation.cache_tag or "none"

    def key(self) -> str:
        return content_key(self._distributions)

    def lay_out_links(self, stage: Path) -> None:
        """As on this machine, so that the libraries' paths are good in both."""
        for name in ("bin", "sbin", "lib", "lib64", "lib32"):
            here = Path("/") / name
            if here.is_symlink():
                target = os.readlink(here).lstrip("/")
                (stage / target).mkdir(parents=True, exist_ok=True)
                (stage / name).symlink_to(target)
            else:
                (stage / name).mkdir()
        for name in ("etc/ld.so.cache", "etc/ld.so.conf"):
            if (Path("/") / name).is_file():
                _copy(Path("/") / name, stage / name)

    def fill(self, stage: Path, site: Path) -> None:
        elf_files = copy_interpreter(stage)
        elf_files += copy_distributions(site, self._distributions)
        sites = {Path(str(d.locate_file(""))) for d in self._distributions.values()}
        copy_libraries(stage, elf_files, within=sites)

    def compile(self, stage: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            compileall.compile_dir(
                str(stage),
                quiet=2,
                workers=0,
                stripdir=str(stage),
                prependdir="/",
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )

    def add_extension(self, bindings: Path) -> None:
        """The one that this Python has is copied with the rest."""
        del bindings


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
