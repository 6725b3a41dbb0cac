"""What is in a wheel, an sdist and an editable install, and what they put into everybody's way."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vmm.cli.manual import manual

ROOT = Path(__file__).resolve().parents[3]
BUILD = """
import sys
from hatchling import build
print(getattr(build, "build_" + sys.argv[1])(sys.argv[2]))
"""
IMAGES = {
    "vmm/_firmware/x86_64/payload.bin",
    "vmm/_firmware/x86_64/bench/bench.elf",
    "vmm/_firmware/x86_64/loader/loader.bin",
    "vmm/_firmware/aarch64/payload.bin",
}


def build(kind: str, tree: Path, into: Path) -> Path:
    """Has hatchling build a "wheel", "sdist" or "editable" of a tree; the file's path."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, into],
        cwd=tree, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return into / done.stdout.split()[-1]


def names(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as wheel:
        return set(wheel.namelist())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From the sdist, as pip makes it where it finds no wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


def test_wheel_puts_two_packages_and_nothing_else_into_site_packages(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in names(wheel)}

    assert {top for top in tops if not top.endswith((".dist-info", ".data"))} == {
        "vmm", "kvm_bindings"
    }  # fmt: skip


def test_wheel_has_what_a_run_needs_and_no_sources_of_firmware(wheel: Path) -> None:
    found = names(wheel)

    assert found >= IMAGES | {"vmm/py.typed", "vmm/library/machine.py", "kvm_bindings/vm.py"}
    assert not {name for name in found if name.endswith((".S", ".inc", ".ld"))}


def test_wheel_has_the_manual_page_of_its_own_parsers(wheel: Path) -> None:
    version = wheel.name.split("-")[1]

    with zipfile.ZipFile(wheel) as archive:
        page = archive.read(f"pyvmm-{version}.data/data/share/man/man1/pyvmm.1").decode()

    assert page == manual(version)
    assert not {name for name in names(wheel) if ".data/" in name and "man1" not in name}


def test_wheel_of_an_sdist_is_that_of_the_tree(wheel: Path, tmp_path: Path) -> None:
    assert names(build("wheel", ROOT, tmp_path)) == names(wheel)


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        about = archive.read(next(n for n in archive.namelist() if n.endswith("/WHEEL"))).decode()

    assert "-cp311-abi3-" in wheel.name
    assert f"Tag: {'-'.join(wheel.stem.split('-')[2:])}" in about
    assert "Root-Is-Purelib: false" in about
    assert "kvm_bindings/_kvm.abi3.so" in names(wheel)


def test_sdist_has_everything_that_tests_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}

    assert found >= {"firmware/build.py", "firmware/x86_64/start.S", "tests/conftest.py", "LICENSE"}
    assert "kvm_bindings/hatch_hook.py" in found


def test_editable_install_is_the_tree_itself(tmp_path: Path) -> None:
    made = build("editable", ROOT, tmp_path)

    with zipfile.ZipFile(made) as archive:
        paths = [archive.read(n).decode().split() for n in archive.namelist() if ".pth" in n]
    assert paths == [[str(ROOT)]]
    assert (ROOT / "vmm" / "_firmware").resolve() == ROOT / "firmware"


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_build_without_a_compiler_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, tmp_path],
        cwd=ROOT, env={**os.environ, "CC": "no-such-cc -pthread"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "pyvmm: its extension is C, and there is no compiler no-such-cc; "
        "install one (Debian: apt install gcc; Fedora: dnf install gcc), or set CC"
    ]
    assert not list(tmp_path.iterdir())
