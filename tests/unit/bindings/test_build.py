"""Building the extension: for another architecture, and what goes wrong, in one line each."""

from __future__ import annotations

import platform
import runpy
import shutil
import struct
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.compilers import compiler_for

BINDINGS = Path(__file__).resolve().parents[3] / "kvm_bindings"
EM_AARCH64 = 183
CROSS_COMPILER = "aarch64-linux-gnu-gcc"


@dataclass(frozen=True, slots=True)
class Done:
    status: int
    out: str
    err: str


Build = Callable[..., Done]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Build:
    """Runs the script with these options, and its compiler."""

    def run(*options: str, script: Path = BINDINGS / "build.py") -> Done:
        monkeypatch.setattr(sys, "argv", [str(script), *options])
        capfd.readouterr()
        try:
            runpy.run_path(str(script), run_name="__main__")
            status = 0
        except SystemExit as exit:
            # As the interpreter ends: a text is printed, with status 1.
            status = exit.code if isinstance(exit.code, int) else 1
            if isinstance(exit.code, str):
                print(exit.code, file=sys.stderr)
        return Done(status, *capfd.readouterr())

    return run


def python_includes(scratch: Path) -> list[str]:
    """Options with Python's headers; skips where there are none.

    Debian's pyconfig.h includes one below a folder named after the architecture: this machine's
    serves for another one, sizes being the same.
    """
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").is_file():
        pytest.skip(f"no {folder}/Python.h: install python3-dev")
    options = [f"--python-include={folder}"]
    here = folder.parent / str(sysconfig.get_config_var("MULTIARCH")) / folder.name
    if here.is_dir():
        there = scratch / "include" / "aarch64-linux-gnu"
        there.mkdir(parents=True)
        (there / folder.name).symlink_to(here)
        options.append(f"--python-include={scratch / 'include'}")
    return options


def test_cross_compiled_extension_is_one_for_arm64(build: Build, tmp_path: Path) -> None:
    if shutil.which(CROSS_COMPILER) is None:
        pytest.skip(f"no {CROSS_COMPILER}: install gcc-aarch64-linux-gnu and libc6-dev-arm64-cross")

    done = build(
        *("--machine", "aarch64", "--compiler", CROSS_COMPILER, "--output", str(tmp_path)),
        *python_includes(tmp_path),
    )

    assert (done.status, done.out) == (0, f"{tmp_path / '_kvm.abi3.so'}\n"), done.err
    content = (tmp_path / "_kvm.abi3.so").read_bytes()
    machine = struct.unpack_from("<H", content, 18)[0]
    assert content[:4] == b"\x7fELF"
    assert machine == EM_AARCH64
    assert b"kvm_vcpu_init" in content
    assert b"kvm_sregs" not in content


def test_structure_of_another_size_does_not_compile(build: Build, tmp_path: Path) -> None:
    compiler = compiler_for(platform.machine())
    if compiler is None:
        pytest.skip(f"no C compiler for {platform.machine()}: install gcc")
    options = ["--compiler", compiler, "--output", str(tmp_path), *python_includes(tmp_path)]
    shutil.copytree(BINDINGS, tmp_path / "kvm_bindings")
    header = tmp_path / "kvm_bindings" / "kvm_abi.h"
    header.write_text(header.read_text().replace("uint64_t pad2[14]", "uint64_t pad2[15]"))

    done = build(*options, script=tmp_path / "kvm_bindings" / "build.py")

    assert done.status == 1
    assert "kvm_userspace_memory_region2 has another size" in done.err
    assert not (tmp_path / "_kvm.abi3.so").exists()


@pytest.mark.parametrize("options", [[], ["--compiler", "riscv64-linux-gnu-gcc"]])
def test_machine_without_declarations_is_one_line(
    build: Build, options: list[str], tmp_path: Path
) -> None:
    done = build("--machine", "riscv64", "--output", str(tmp_path), *options)

    assert done.status == 1
    assert done.err == (
        "kvm_bindings: no KVM declarations for riscv64, only for aarch64 and x86_64; pyvmm doesn't "
        "run there\n"
    )


def test_another_machine_without_a_compiler_asks_for_one(build: Build) -> None:
    machine = "x86_64" if platform.machine() == "aarch64" else "aarch64"

    done = build("--machine", machine)

    assert done.status == 2
    assert f"--machine {machine} on a {platform.machine()} needs --compiler" in done.err


def test_compiler_that_is_not_there_is_one_line(build: Build, tmp_path: Path) -> None:
    done = build("--compiler", "no-such-gcc", "--output", str(tmp_path))

    assert done.status == 1
    assert done.err.splitlines()[-1] == "kvm_bindings: there is no compiler no-such-gcc"
    assert list(tmp_path.iterdir()) == []
