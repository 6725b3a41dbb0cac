"""`pyvmm measure`: from files and options alone."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.images import Part as Segment
from tests.support.images import build_elf
from tests.unit.cli.conftest import Command
from vmm.machine.config import MachineConfig
from vmm.machine.peripherals import device_names, open_devices

KERNEL_GPA = 16 << 20


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    file = tmp_path / "vmlinux"
    file.write_bytes(build_elf((Segment(KERNEL_GPA, b"k" * 5000),), KERNEL_GPA))
    return str(file)


def test_measurement_comes_first_and_then_each_part(command: Command, kernel: str) -> None:
    found = command("measure", "--kernel", kernel, "--mem", "64M")

    lines = found.out.splitlines()
    assert (found.status, found.err) == (0, "")
    assert lines[0].startswith("measurement ") and len(lines[0].split()[1]) == 64
    assert lines[1].endswith("5000 bytes at 0x01000000  kernel")


def test_json_is_what_a_report_has(command: Command, kernel: str) -> None:
    plain = command("measure", "--kernel", kernel)
    data = json.loads(command("measure", "--json", "--kernel", kernel).out)

    assert set(data) == {"measurement", "c_bit", "parts"}
    assert data["c_bit"] == 38
    assert plain.out.splitlines()[0] == f"measurement {data['measurement']}"
    assert data["parts"][0].keys() == {"name", "gpa", "bytes", "sha256"}


def test_run_may_be_measured_with_all_of_its_words(command: Command, kernel: str) -> None:
    without = command("measure", "--kernel", kernel)
    words = ("--private-mem=guest_memfd", "--report", "r", "--kernel", kernel)

    assert command("measure", *words).out == without.out
    assert not Path("r").exists()


def test_another_c_bit_is_another_measurement(command: Command, kernel: str) -> None:
    first = command("measure", "--kernel", kernel)
    second = command("measure", "--c-bit", "37", "--kernel", kernel)

    assert second.status == 0
    assert first.out.splitlines()[0] != second.out.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "measure needs --kernel"),
        (("--c-bit", "64"), "--c-bit 64: use 32 to 51"),
        (("--kernel", "K", "--iommu"), "measure: --iommu lends devices private memory"),
        (("--kernel", "missing"), "kernel missing: no such file"),
        (("--kernel", "K", "--scheme", "remap"), "--scheme remap: Linux tells private"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_reason(
    words: tuple[str, ...], complaint: str, command: Command, kernel: str
) -> None:
    given = [kernel if word == "K" else word for word in words]

    found = command("measure", *given)

    assert found.status == 2
    assert found.complaint.startswith(complaint)


def test_devices_are_named_as_they_are_opened(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    config = MachineConfig(
        kernel="k",
        private_memory="auto",
        disks=(f"{tmp_path}/disk,ro",),
        vsock=f"path={tmp_path}/vsock",
        consoles=(f"file={tmp_path}/console",),
        rng=True,
        balloon="",
        iommu=True,
    )

    with ExitStack() as opened:
        assert device_names(config) == list(open_devices(config, opened))
