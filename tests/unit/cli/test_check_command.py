"""`pyvmm check` as the user sees it, on hosts made up here."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.x86 import X86
from tests.unit.cli.conftest import Command
from vmm.cli import check as shown
from vmm.cli.main import main
from vmm.host.capability import MAIN_JOB
from vmm.host.check import Choice, HostCheck, Row, judge
from vmm.host.probes.finding import broken, yes
from vmm.lab import command as lab_command

ROOT = Path(__file__).resolve().parents[3]
CAPABILITIES = X86.capabilities()
FINE = yes("works", "seen it")
CHOICES = {
    MAIN_JOB: Choice("cbit", "memfd", "policy-refused", {}),
    "payload_private": Choice("cbit", "x", "kernel-refused", {"attributes": "no \x1b[2Jtype"}),
}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the host one where everything works but hypercalls, which never return."""
    hang = broken("never return", "tried [red]it[/red]\x1b[2J")
    rows = tuple(Row(e, hang if e.key == "hypercall_exits" else FINE) for e in CAPABILITIES)
    monkeypatch.setattr(
        shown, "check_host", lambda arch: HostCheck(rows, judge(rows, CHOICES), None)
    )


def test_host_without_kvm_gets_the_whole_table_and_status_3(command: Command) -> None:
    result = command("check", "-v")

    words = " ".join(result.out.split())
    table = result.out.partition("\n\n")[2].splitlines()
    assert result.status == 3
    assert result.err == ""
    assert words.count("cannot run here (KVM: cannot be used); pyvmm lab") == 3
    assert table[0] == "no       KVM: cannot be used"
    assert "no-kvm does not exist: this machine has no KVM" in words
    heads = [line for line in table if not line.startswith(" ")]
    assert len(heads) == len(CAPABILITIES)
    assert all(line.startswith("unknown  ") for line in heads[1:])


def test_host_without_kvm_gets_complete_json(command: Command) -> None:
    result = command("check", "--json")

    data = json.loads(result.out)
    assert result.status == data["exit_status"] == 3
    assert "does not exist" in data["error"]
    assert len(data["capabilities"]) == len(CAPABILITIES)


@pytest.mark.usefixtures("pretend")
def test_verdict_comes_first_and_every_line_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    status = main(["check"])

    lines = capsys.readouterr().out.splitlines()
    end = lines.index("")
    table = lines[end + 1 : lines.index("", end + 1)]
    assert status == 3
    assert lines[0].startswith("a stock kernel with --private-mem: cannot run here (hypercalls: ")
    assert lines[end - 1] == "a stock kernel without --private-mem: can run"
    assert max(map(len, lines)) <= 80
    assert len(table) == len(CAPABILITIES)
    column = table[0].index("works")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in table)
    (hang,) = [line for line in table if line.endswith("never return")]
    assert hang.startswith("broken ")
    assert "tried" not in "\n".join(lines) and "not scheme" not in "\n".join(lines)
    assert "check -v" in lines[-1]


@pytest.mark.usefixtures("pretend")
def test_verbose_has_evidence_use_and_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    assert main(["check", "-v"]) == 3

    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert "hypercalls: never return tried [red]it[/red]\\x1b[2J good for: " in words
    assert "without it: " in words and "pyvmm lab" in words
    assert (
        "(the kernel keeps the host out), scheme cbit not scheme attributes: no \\x1b[2J" in words
    )
    assert "with --iommu:" not in words  # no kernel with private memory runs
    for each in CAPABILITIES:
        assert f"{each.title}: " in out
        assert f"good for: {each.enables}" in words


@pytest.mark.parametrize(
    ("lends", "told"),
    [
        (True, "  with --iommu: lends private pages to devices"),
        (False, "  with --iommu: cannot lend its pages to devices, as the host reaches none"),
    ],
)
def test_kernels_backing_is_told_to_lend_pages_or_not(
    lends: bool, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tuple(Row(each, FINE) for each in CAPABILITIES)
    choice = Choice("cbit", "some", "policy-refused", {}, lends)
    found = HostCheck(rows, judge(rows, {MAIN_JOB: choice}), None)
    monkeypatch.setattr(shown, "check_host", lambda arch: found)

    monkeypatch.setenv("COLUMNS", "200")
    assert main(["check"]) == 0
    assert told in capsys.readouterr().out
    assert main(["check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["jobs"][MAIN_JOB]["lends"] is lends


@pytest.mark.usefixtures("pretend")
def test_terminal_gets_the_same_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    assert main(["check", "-v"]) == 3

    out = capsys.readouterr().out
    assert "\x1b[2J" not in out
    assert "tried [red]it[/red]" in out
    assert all(each.title in out for each in CAPABILITIES)
    assert "a stock kernel without --private-mem: can run" in out


def test_protected_memory_is_the_hypervisors_word_and_devices_are_left_out_of_it() -> None:
    choice = Choice("pkvm", "memfd-protected", "kernel-refused", {})
    found = HostCheck((), judge((), {MAIN_JOB: choice}), None)

    line = shown.job_line(found, found.jobs[MAIN_JOB])

    assert "the hypervisor keeps the host's processors out" in line
    assert "not its devices" in line and "kernel keeps" not in line


def test_unknown_option_ends_with_status_2(command: Command) -> None:
    result = command("check", "--jsn")

    assert result.status == 2
    assert "--jsn" in result.complaint


def test_lab_takes_check_and_refuses_its_bad_options_before_it_boots(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab_command, "_run", lambda *_: 42)

    assert command("lab", "check", "--json").status == 42
    refused = command("lab", "check", "--jsn")
    assert refused.status == 2
    assert "--jsn" in refused.complaint


def test_help_names_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", "--help"])

    assert ended.value.code == 0
    assert "exit status: 0 a stock" in capsys.readouterr().out


def test_reader_that_goes_away_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)

    done = subprocess.run(
        [sys.executable, "-m", "vmm", "check"],
        cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, timeout=60, check=False,
    )  # fmt: skip

    os.close(write_end)
    assert done.stderr == b""
    assert done.returncode in (0, 3)


def test_way_to_a_guest_imports_nothing_of_it() -> None:
    script = (
        "import sys, vmm.cli.main, vmm.machine.machine, vmm.arch.x86_64.probes.hypercall\n"
        "print([n for n in sys.modules if n in ('rich', 'statistics')"
        " or '.probes' in n or n.startswith(('vmm.host.check', 'vmm.cli.check'))])"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )

    allowed = {"vmm.host.probes", "vmm.arch.x86_64.probes", "vmm.arch.x86_64.probes.hypercall",
               "vmm.host.probes.micro_guest"}  # fmt: skip
    assert set(ast.literal_eval(done.stdout)) <= allowed


NOBODY = """
import contextlib, io, os, sys
from vmm.cli import main
from vmm.host import kvm as host
host.open_kvm.__defaults__ = (sys.argv[1],)
with contextlib.redirect_stdout(io.StringIO()):
    main.main(["check", "--json"])  # imports everything, which a user without rights may not read
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(main.main(["check", "--json"]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to drop its privileges")
def test_user_without_permission_gets_the_whole_answer(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.touch(0o600)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)

    done = subprocess.run(
        [sys.executable, "-c", NOBODY, str(device)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (3, "")
    data = json.loads(done.stdout)
    assert "permission denied; run as root, or as a member of the group" in data["error"]
    assert len(data["capabilities"]) == len(CAPABILITIES)
