"""A case that fails, as a C program: what it did, with what was seen; on the model and for real."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.fake_kvm import FakeKernel
from tests.support.fake_platform import FakePlatform
from vmm.arch import architecture
from vmm.cli.selftest import emit
from vmm.host.kvm import open_kvm
from vmm.selftest.case import Case, Cell, Failed
from vmm.selftest.entries import Combination
from vmm.selftest.from_trace import case_of, cell_of
from vmm.selftest.platform import KvmPlatform
from vmm.selftest.recorder import Inexpressible, as_c
from vmm.selftest.runner import run_case
from vmm.trace.layout import ROW, Kind
from vmm.trace.reader import Trace
from vmm.trace.store import TraceStore

CBIT = Combination("cbit", "memfd")
IN_PLACE = Combination("in-place", "guest_memfd-in-place")


def share_and_fail(cell: Cell) -> None:
    rig = cell.rig(pages=4)
    rig.write(1, 0x1234)
    rig.share(1, 2)
    rig.host_write(1, 0x77)
    if rig.read(1) == 0x77:
        raise Failed("this case */ always fails")


def several_vcpus(cell: Cell) -> None:
    cell.rig(vcpus=2)
    raise Failed("and this one")


FAILING = Case("room.share_and_fail", "a share that never works", share_and_fail)
PARALLEL = Case("room.several_vcpus", "two at once", several_vcpus)


def model() -> FakePlatform:
    return FakePlatform(FakeKernel.with_in_place())


def test_two_aliases_become_two_memslots_and_a_share_the_private_sides_hole() -> None:
    text = as_c(model(), CBIT, FAILING)

    head, _, body = text.partition("*/")
    assert "room.share_and_fail in cbit/memfd: a share that never works." in head
    assert "Failed: this case * / always fails." in head
    alias = body.partition("alias_bit = ")[2].partition(";")[0]
    assert 'check("new_memfd(' in body
    assert f'guest_store({int(alias, 16) + 0x1000:#x}, 0x1234),\n\t      "ok"' in body
    assert 'hole(0, 0x401000, 0x2000),\n\t      "ok"' in body
    assert 'host_store(1, 0x401000, 0x8, 0x77),\n\t      "ok"' in body
    assert 'guest_load(0x1000),\n\t      "0x77"' in body


def test_conversion_in_place_is_the_ioctl_on_the_guest_memfd() -> None:
    body = as_c(model(), IN_PLACE, FAILING)

    assert 'convert(0, 0x401000, 0x2000, 0x0),\n\t      "ok"' in body


def test_case_with_several_vcpus_cannot_be_said_in_c() -> None:
    with pytest.raises(Inexpressible, match="2 vCPUs"):
        as_c(model(), CBIT, PARALLEL)


def test_each_failure_is_written_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    platform = model()
    results = [run_case(platform, CBIT, case) for case in (FAILING, PARALLEL)]

    emit(platform, results, tmp_path / "c")

    written = tmp_path / "c" / "room_share_and_fail_cbit_memfd.c"
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"pyvmm: room.share_and_fail in cbit/memfd as C: cc -o {written.with_suffix('')} {written}",
        "pyvmm: --emit-c: room.several_vcpus in cbit/memfd can't be said in C: 2 vCPUs",
    ]
    assert sorted(path.name for path in written.parent.iterdir()) == [
        "kvm_replay.h",
        written.name,
    ]


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="there is no /dev/kvm")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is here")
@pytest.mark.timeout(120)
def test_program_sees_on_this_kvm_what_the_case_saw(tmp_path: Path) -> None:
    arch = architecture()
    with open_kvm(arch, complete=False) as system:
        platform = KvmPlatform(arch, system)
        emit(platform, [run_case(platform, CBIT, FAILING)], tmp_path)
    (source,) = tmp_path.glob("*.c")
    program = source.with_suffix("")
    subprocess.run(["cc", "-Wall", "-Werror", "-o", str(program), str(source)], check=True)

    first = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    source.write_text(source.read_text().replace('"0x77"', '"0x78"'))
    subprocess.run(["cc", "-o", str(program), str(source)], check=True)
    second = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)

    assert (first.returncode, first.stdout.count("FAIL")) == (0, 0)
    assert (second.returncode, second.stdout.count("FAIL")) == (1, 1)


def test_conversions_of_a_trace_become_a_program_on_memory_laid_out_as_it_was(
    tmp_path: Path,
) -> None:
    store = TraceStore(str(tmp_path / "t"))
    store.open_columns()
    rows = [
        (Kind.SHARE, 0x300000, 0x2000, 0),
        (Kind.UNSHARE, 0x301000, 0x1000, errno.EPERM),
        (Kind.UNSHARE, 0x300000, 0x1000, 0),
        (Kind.EXIT, 0x3F8, 1, 0),
    ]
    packed = b"".join(
        ROW.pack(time, gpa, size, 0, 0, number, 0, kind, 0)
        for time, (kind, gpa, size, number) in enumerate(rows)
    )
    store.append(memoryview(packed), len(rows))
    store.write_sidecar(
        {
            "scheme": "cbit",
            "backings": {"private": "memfd", "shared": "memfd"},
            "states": [[0, 0x200000, "shared"], [0x200000, 0x400000, "private"]],
            "names": [""],
            "rows": len(rows),
        }
    )
    store.close()
    with closing(Trace(tmp_path / "t")) as trace:
        cell, case = cell_of(trace), case_of(trace)

    text = as_c(model(), cell, case)

    assert cell == CBIT
    assert text.count("hole(") == 2 * 2  # each as words, and as a call
    assert 'hole(0, 0x700000, 0x2000),\n\t      "ok"' in text
    assert 'hole(1, 0x700000, 0x1000),\n\t      "ok"' in text
