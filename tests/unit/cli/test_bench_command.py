"""`pyvmm bench`'s options, its comparison, and what it says where nothing can be measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.bench import accessors as measured
from vmm.bench import results
from vmm.bench.series import Series
from vmm.cli import bench
from vmm.cli.main import main
from vmm.core.errors import HostError


def written(path: Path, *samples: float) -> str:
    one = Series("exits", "OUT", "run loop", "us", list(samples))
    path.write_text(json.dumps(results.as_json({}, {}, [one])))
    return str(path)


def test_compare_prints_both_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = written(tmp_path / "a", 10.0), written(tmp_path / "b", 15.0)

    assert main(["bench", "--compare", before, after]) == 0

    assert "10.0 us  15.0 us  +50 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds 0 is no number of rounds"),
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--compare", "a", "b"], "--compare a cannot be read: No such file"),
        (["--json", "/no/such/directory/x", "--only", "exits"], "cannot be written"),
        (["--qemu", "/no/such/qemu", "--only", "disk"], "--qemu /no/such/qemu: no such program"),
        (["--only", "linux", "--rounds", "1"], "--only linux needs --kernel and --initrd"),
        (["--only", "iommu", "--kernel", "k"], "--only iommu needs --kernel and --initrd"),
        (
            ["--only", "linux", "--kernel", __file__, "--initrd", __file__, "--fio", "/no/fio"],
            "--fio /no/fio: no such file",
        ),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def without_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **named: object) -> None:
        raise HostError("/dev/kvm: no such device")

    monkeypatch.setattr(bench, "open_kvm", refuse)


@pytest.mark.usefixtures("without_kvm")
def test_section_that_breaks_off_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken(*_: object) -> Iterator[Series]:
        yield Series("accessors", "read", "C", "us", [1.0])

    monkeypatch.setattr(measured, "measure", taken)
    out = tmp_path / "out.json"

    status = main(["bench", "--only", "exits", "--only", "accessors", "--json", str(out)])

    said = capsys.readouterr()
    assert status == 1
    assert "bench: exits broke off: /dev/kvm: no such device" in said.err
    assert "1.00 (1.00..1.00)" in said.out
    data = json.loads(out.read_text())
    assert [one["subject"] for one in data["series"]] == ["C"]
    assert data["host"]["cpus"] == os.cpu_count()


@pytest.mark.usefixtures("without_kvm")
def test_nothing_measured_is_the_hosts_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--only", "exits"]) == 3
    assert "nothing could be measured here" in capsys.readouterr().err
