"""`pyvmm selftest`: what is printed and written, and the exit status."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import vmm.cli.selftest as command
from tests.support.fake_host import FakeHost
from vmm.cli.main import main
from vmm.core.errors import HostError
from vmm.selftest.case import Case
from vmm.selftest.entries import Combination
from vmm.selftest.runner import Result, Status

CELLS = [Combination("cbit", "memfd"), Combination("remap", "memfd")]


def nothing(cell: object) -> None:
    """No case of this file is run."""


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Status, str]]:
    """Cases and how they end, instead of the suite on a KVM."""
    found: dict[str, tuple[Status, str]] = {"a.good": ("pass", "")}

    def run_matrix(
        platform: object, cases: Sequence[Case], cells: Sequence[Combination]
    ) -> Iterator[Result]:
        for cell in cells:
            for case in cases:
                yield Result(case, cell, *found[case.name], 0.25)

    monkeypatch.setattr(command, "run_matrix", run_matrix)
    monkeypatch.setattr(command, "combinations", lambda schemes: CELLS)
    monkeypatch.setattr(
        command, "all_cases", lambda: [Case(name, f"title of {name}", nothing) for name in found]
    )
    monkeypatch.setattr(command, "open_kvm", lambda arch, complete: FakeHost())
    return found


def test_selftest_with_nothing_failed_exits_0_and_prints_the_matrix(
    outcomes: dict[str, tuple[Status, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes["a.skipped"] = ("skip", "no such thing here")

    assert main(["selftest"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[:7] == [
        "  1  cbit/memfd",
        "  2  remap/memfd",
        "",
        "a          1  2",
        "  good    ok ok",
        "  skipped  -  -",
        "",
    ]
    assert lines[-2:] == [
        "skipped a.skipped in 2 cells: no such thing here",
        "2 passed, 0 failed, 2 skipped in 1.0 s",
    ]


def test_selftest_with_a_failure_exits_1_and_says_where_and_why(
    outcomes: dict[str, tuple[Status, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes["a.bad"] = ("fail", "word: 0x1 instead of 0")

    assert main(["selftest"]) == 1

    output = capsys.readouterr().out
    assert "\n  bad  XX XX\n" in output
    assert "FAIL a.bad in remap/memfd: word: 0x1 instead of 0" in output


def test_selftest_lines_fit_and_colours_change_no_word(
    outcomes: dict[str, tuple[Status, str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcomes["a.bad"] = ("fail", "word: " + "0x1 instead of 0, " * 20)
    monkeypatch.setenv("COLUMNS", "80")
    main(["selftest"])
    plain = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")

    main(["selftest"])

    shown = capsys.readouterr().out
    assert max(map(len, plain.splitlines())) <= 80
    assert "\x1b[1;31mXX\x1b[0m" in shown
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == plain


def test_selftest_json_has_every_result_and_the_sum(
    outcomes: dict[str, tuple[Status, str]], tmp_path: Path
) -> None:
    outcomes["a.skipped"] = ("skip", "no such thing here")

    assert main(["selftest", "--json", str(tmp_path / "m.json")]) == 0

    written = json.loads((tmp_path / "m.json").read_text())
    assert written["format"] == 1
    assert written["summary"] == {"pass": 2, "fail": 0, "skip": 2}
    assert written["results"][1] == {
        "case": "a.skipped",
        "title": "title of a.skipped",
        "scheme": "cbit",
        "backing": "memfd",
        "status": "skip",
        "reason": "no such thing here",
        "seconds": 0.25,
    }


def test_selftest_only_runs_the_cells_named(
    outcomes: dict[str, tuple[Status, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selftest", "--only", "remap/memfd", "--only=remap/memfd"]) == 0

    output = capsys.readouterr().out
    assert output.startswith("  1  remap/memfd\n\n")
    assert "1 passed, 0 failed, 0 skipped" in output


def test_selftest_only_an_unknown_cell_is_refused_with_those_that_exist(
    outcomes: dict[str, tuple[Status, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selftest", "--only", "cbit/paper"]) == 2

    assert "--only cbit/paper: no such cell; there are cbit/memfd, remap/memfd" in (
        capsys.readouterr().err
    )


def test_selftest_json_into_no_folder_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["selftest", "--json", str(tmp_path / "no" / "m.json")]) == 2

    assert "No such file or directory; give another path" in capsys.readouterr().err


def test_selftest_without_kvm_exits_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(arch: object, complete: bool) -> None:
        raise HostError("/dev/kvm does not exist")

    monkeypatch.setattr(command, "open_kvm", refuse)

    assert main(["selftest"]) == 3
    assert capsys.readouterr().err == "pyvmm: /dev/kvm does not exist\n"


@pytest.mark.parametrize("words", [["--jsn"], ["--json"], ["now"]])
def test_selftest_with_bad_words_exits_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selftest", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
