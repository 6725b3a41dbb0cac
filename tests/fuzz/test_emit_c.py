"""A random program as C: complete, and taken by a compiler."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fuzz import emit_c
from tests.fuzz import kernel_ops as ops
from tests.fuzz.kernel_worlds import World
from tests.support.fake_kvm import FakeKernel
from tests.support.fake_platform import FakePlatform
from vmm.selftest.emit_c import RUNTIME

OPERATIONS: ops.Program = [
    ops.CreateGuestMemfd(0x8000, 3),
    ops.SetSlot(1, 0, 0x8000, 0, 4, 0, 0, False),
    ops.SetAttributes(0, 0x1000, 8),
    ops.ConvertInPlace(0, 0, 0x1000, 8),
    ops.VmIo("pread", 1, 0),
    ops.VmIo("pwrite", 1, 5),
    ops.Fallocate(0, 3, 0, 0x1000),
    ops.GuestMemfdIo(0, "pread", 0, 0),
    ops.GuestMemfdIo(0, "pwrite", 0, 7),
    ops.GuestMemfdIo(0, "map", 0, 0),
    ops.GuestMemfdIo(0, "load", 0, 0),
    ops.GuestMemfdIo(0, "store", 0, 9),
    ops.GuestMemfdIo(0, "resident", 0, 0),
    ops.HostRead(2),
    ops.HostWrite(2, 11),
    ops.GuestRead(3),
    ops.GuestWrite(3, 13),
    ops.CloseGuestMemfd(0),
]


def test_every_operation_becomes_a_check_with_what_the_model_says(
    tmp_path: Path,
) -> None:
    expected = World(FakePlatform(FakeKernel()), 0).run(OPERATIONS)

    text = emit_c.write(tmp_path, 0, OPERATIONS, expected).read_text()

    assert text.count("\tcheck(") == len(OPERATIONS)
    assert 'set_slot(0x1, 0x0, 0x8000, 0x0, 0x4, 0, 0x0, 0),\n\t      "ok");' in text
    assert 'convert(0, 0x0, 0x1000, 0x8),\n\t      "ENOTTY");' in text
    assert (tmp_path / RUNTIME.name).read_bytes() == RUNTIME.read_bytes()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is here")
def test_compiler_takes_the_program_without_a_warning(tmp_path: Path) -> None:
    program = ops.Generator(random.Random(3)).program(40)
    expected = World(FakePlatform(FakeKernel()), 0).run(program)
    source = emit_c.write(tmp_path, 0, program, expected)

    result = subprocess.run(
        ["cc", "-Wall", "-Werror", "-o", str(tmp_path / "program"), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is here")
def test_compiler_takes_the_driver_of_many_programs_without_a_warning(tmp_path: Path) -> None:
    source = Path(emit_c.__file__).with_name("emitted") / "kvm_replay_many.c"

    result = subprocess.run(
        ["cc", "-Wall", "-Werror", f"-I{RUNTIME.parent}", "-o", str(tmp_path / "x"), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr


def test_program_for_the_driver_is_a_line_for_each_operation() -> None:
    expected = World(FakePlatform(FakeKernel()), 0).run(OPERATIONS)

    lines = emit_c.text_program(0, OPERATIONS, expected).splitlines()

    assert lines[0] == "program 0 0x400000 12"
    assert lines[2] == "set_slot 0x1 0x0 0x8000 0x0 0x4 0 0x0 0 | ok"
    assert len(lines) == len(OPERATIONS) + 1
