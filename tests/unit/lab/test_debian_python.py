"""Debian's Python for another architecture: what is asked for, compiled and laid out.

Packages are small trees, their programs are scripts; no apt and no pip is run.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.lab.test_packages import FakeApt
from vmm.core.errors import HostError
from vmm.lab.architecture import ARM64, HERE
from vmm.lab.cache import Cache
from vmm.lab.cross import CrossCompiler
from vmm.lab.debian_python import VERSION, DebianPython
from vmm.lab.packages import MissingFiles, Packages
from vmm.lab.progress import Silent

# As the C library's loader is called here: --library-path LIBRARIES --argv0 NAME PROGRAM WORDS...
LOADER = """#!/bin/sh
shift 4
exec "$@"
"""
# Notes its words, and makes the wheel that it is asked for.
PIP = """#!{python}
import sys, zipfile
open({arguments!r}, "w").write("\\n".join(sys.argv))
folder = sys.argv[sys.argv.index("--dest") + 1]
import os; os.makedirs(folder)
with zipfile.ZipFile(folder + "/thing-1-py3-none-any.whl", "w") as archive:
    archive.writestr("thing/__init__.py", "x = 1\\n")
    archive.writestr("thing-1.dist-info/METADATA", "Name: thing\\n")
"""


class Tools(FakeApt):
    """Programs that run here: a compiling Python, and gcc for the other architecture."""

    __slots__ = ("status",)

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.status = 0

    def download_closure(self, packages: Sequence[str], suite: str, into: Path) -> None:
        self.asked += packages
        programs, libraries = into / "usr" / "bin", HERE.libraries(into)
        for folder in (programs, libraries, into / "usr" / "share" / "doc"):
            folder.mkdir(parents=True)
        _script(libraries / HERE.loader, LOADER)
        arguments = f"{self.root}.words"
        script = f'#!/bin/sh\necho "$*" >{arguments}\necho sorry >&2\nexit {self.status}\n'
        _script(programs / f"python{VERSION}", script)
        shutil.copy2("/bin/true", programs / "aarch64-linux-gnu-gcc")


class Machine(FakeApt):
    """The lab machine's packages: Python with its library, and its headers."""

    __slots__ = ()

    def download_closure(self, packages: Sequence[str], suite: str, into: Path) -> None:
        self.asked += packages
        for name in (
            f"usr/bin/python{VERSION}",
            f"usr/lib/python{VERSION}/os.py",
            f"usr/lib/python{VERSION}/test/test_os.py",
            "usr/lib/aarch64-linux-gnu/libc.so.6",
            "usr/share/doc/python/README",
            "etc/python.conf",
        ):
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            (into / name).touch()

    def download(self, packages: Sequence[str], into: Path) -> None:
        self.asked += packages
        (into / "usr" / "include" / f"python{VERSION}").mkdir(parents=True)


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    pip = tmp_path / "pip"
    _script(pip, PIP.format(python=sys.executable, arguments=str(tmp_path / "pip.words")))
    monkeypatch.setattr("vmm.lab.debian_python.PIP", (str(pip),))
    monkeypatch.setenv("PATH", "/usr/sbin:/sbin:/nonexistent")
    return Packages(
        Cache(tmp_path / "cache"),
        Silent(),
        Tools(tmp_path / "apt"),
        architecture=ARM64,
        other_apt=Machine(tmp_path / "other"),
    )


@pytest.fixture
def python(packages: Packages) -> DebianPython:
    return DebianPython(packages, CrossCompiler(packages))


def test_root_gets_interpreter_library_and_wheels_and_nothing_to_read(
    python: DebianPython, tmp_path: Path
) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()

    python.lay_out_links(stage)
    python.fill(stage, stage / "lab" / "site")

    assert (stage / "lib" / f"python{VERSION}" / "os.py").is_file()
    assert (stage / "lab" / "site" / "thing" / "__init__.py").is_file()
    assert (stage / "bin" / "python3").readlink() == Path(f"/usr/bin/python{VERSION}")
    left_out = (f"usr/lib/python{VERSION}/test", "usr/share/doc", "etc/python.conf")
    assert not any((stage / name).exists() for name in left_out)


def test_wheels_are_asked_for_by_the_other_machines_names(
    python: DebianPython, tmp_path: Path
) -> None:
    python.key()

    words = (tmp_path / "pip.words").read_text().splitlines()
    assert f"--python-version={VERSION}" in words and "--only-binary=:all:" in words
    assert "--platform=manylinux_2_28_aarch64" in words
    assert {"cffi", "lz4"} <= set(words)


def test_key_stays_until_packages_are_unpacked_anew(python: DebianPython) -> None:
    first = python.key()
    assert python.key() == first

    shutil.rmtree(python.packages.cache.path(f"packages/python-{VERSION}-arm64"))

    assert python.key() != first


def test_wheels_that_cannot_be_had_are_named_with_pips_words(
    python: DebianPython, tmp_path: Path
) -> None:
    _script(tmp_path / "pip", "#!/bin/sh\necho warning >&2; echo 'ERROR: no network' >&2; exit 1\n")

    with pytest.raises(MissingFiles, match=r"wheels of cffi.*aarch64.*ERROR: no network"):
        python.key()


def test_modules_are_compiled_by_python_of_the_same_version_unchecked(
    python: DebianPython, tmp_path: Path
) -> None:
    python.compile(tmp_path / "stage")

    words = (tmp_path / "apt.words").read_text().split()
    assert "--invalidation-mode=unchecked-hash" in words
    assert words[-1] == str(tmp_path / "stage")
    assert words[words.index("-s") + 1] == str(tmp_path / "stage")


@pytest.mark.parametrize(("status", "fails"), [(1, False), (2, True)])
def test_module_that_does_not_compile_is_no_failure_but_a_broken_compiler_is(
    status: int, fails: bool, python: DebianPython, tmp_path: Path
) -> None:
    assert isinstance(python.packages.apt, Tools)
    python.packages.apt.status = status

    if not fails:
        python.compile(tmp_path)
        return
    with pytest.raises(HostError, match="failed: sorry"):
        python.compile(tmp_path)


def compiler_of(folder: Path, script: str) -> Path:
    folder.mkdir()
    _script(folder / "aarch64-linux-gnu-gcc", f"#!/bin/sh\n{script}")
    return folder


# The extension's compiler: its output gets the words that it was called with.
COMPILER = """
echo called >>"$(dirname "$0")/calls"
words="$*"
while [ "$1" != -o ]; do shift; done
echo "$words" >"$2"
"""


def test_extension_is_compiled_once_and_replaces_this_machines(
    python: DebianPython, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compiler_of(tmp_path / "bin", COMPILER)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    bindings = tmp_path / "kvm_bindings"
    bindings.mkdir()
    (bindings / "_kvm.abi3.so").write_text("this machine's")

    python.add_extension(bindings)
    python.add_extension(bindings)

    words = (bindings / "_kvm.abi3.so").read_text()
    assert f"/usr/include/python{VERSION} " in words and "-shared" in words
    assert (folder / "calls").read_text() == "called\n"


def test_extension_that_does_not_compile_is_one_line_and_leaves_nothing(
    python: DebianPython, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compiler_of(tmp_path / "bin", "echo 'kvm.c:1: error: no' >&2; exit 1\n")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    (tmp_path / "kvm_bindings").mkdir()

    with pytest.raises(HostError, match=r"extension for arm64 failed: .*status 1") as caught:
        python.add_extension(tmp_path / "kvm_bindings")

    assert "\n" not in str(caught.value)
    entries = (tmp_path / "cache" / "packages").iterdir()
    assert not any("extension" in entry.name for entry in entries)


def test_compiler_on_the_path_is_taken(
    packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compiler_of(tmp_path / "bin", "")
    monkeypatch.setenv("PATH", str(folder))

    assert CrossCompiler(packages).program() == folder / "aarch64-linux-gnu-gcc"
    assert isinstance(packages.apt, FakeApt) and packages.apt.asked == []


def test_compiler_is_downloaded_otherwise_and_finds_its_own_tree(packages: Packages) -> None:
    compiler = CrossCompiler(packages)

    program = compiler.program()

    tree = packages.cache.path("packages/gcc-arm64")
    assert isinstance(packages.apt, FakeApt)
    assert packages.apt.asked == ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"]
    assert program.is_relative_to(tree) and f"--sysroot={tree}" in program.read_text()
    # Made elsewhere and renamed: what its programs name is where they lie now.
    assert (
        f"{tree}/usr/bin/aarch64-linux-gnu-gcc.elf"
        in (tree / "usr" / "bin" / "aarch64-linux-gnu-gcc").read_text()
    )
    assert not (tree / "usr" / "share").exists()


def test_offline_names_python_and_wheels(packages: Packages) -> None:
    packages.offline = True
    python = DebianPython(packages, CrossCompiler(packages))

    with pytest.raises(MissingFiles, match=rf"Debian's Python {VERSION} for arm64.*--lab-offline"):
        python.key()
