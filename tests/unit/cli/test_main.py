"""The frame around a run: help, hosts that can't, --debug, unexpected errors, the entry point."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Command
from vmm.cli import main as cli
from vmm.cli.run_options import build_parser
from vmm.exits.outcome import Outcome
from vmm.host import kvm as host
from vmm.machine.machine import Machine

ROOT = Path(__file__).resolve().parents[3]
THRESHOLDS = gc.get_threshold()


def pyvmm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command as a process of its own."""
    command = [sys.executable, "-m", "vmm", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


# -- help -----------------------------------------------------------------------------------------


def test_help_ends_with_status_0_and_mentions_every_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])

    text = capsys.readouterr().out
    assert ended.value.code == 0
    options = {text for action in build_parser()._actions for text in action.option_strings}
    assert {"--kernel", "--disk", "--report", "--debug"} <= options
    for option in options:
        assert re.search(rf"(?m)(^|[ ,]){option}\b", text), option
    for also in ("pyvmm lab", "Ctrl-A x", "exit status"):
        assert also in text


def test_run_is_the_default_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])

    assert "usage: pyvmm [run]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", ["check", "selftest", "bench", "report", "replay", "sweep", "measure"]
)
def test_help_with_a_command_is_the_commands_help(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["help", command])

    assert ended.value.code == 0
    assert f"usage: pyvmm {command} " in capsys.readouterr().out


def test_version_is_the_installed_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--private-mem", "--version"])

    assert ended.value.code == 0
    assert capsys.readouterr().out == f"pyvmm {metadata.version('pyvmm')}\n"


# -- hosts that can't -----------------------------------------------------------------------------


def test_host_without_kvm_ends_with_status_3(command: Command) -> None:
    result = command("--private-mem")

    assert re.search("no-kvm does not exist: this machine has no KVM.*pyvmm lab", result.complaint)
    assert result.status == 3


def test_device_that_is_no_kvm_ends_with_status_3(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.open_kvm, "__defaults__", ("/dev/null",))

    result = command()

    assert "/dev/null is not a working KVM" in result.complaint
    assert result.status == 3


NOBODY = """
import os, sys
from vmm.cli import main
from vmm.host import kvm as host
host.open_kvm.__defaults__ = (sys.argv[1],)
errors, sys.stderr = sys.stderr, open(os.devnull, "w")
main.main(sys.argv[2:])  # imports everything, which a user without rights may not read here
sys.stderr = errors
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(main.main(sys.argv[2:]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to drop its privileges")
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 3, "/device: permission denied; run as root, or as a member of the group"),
        (["--kernel", "{}/locked"], 2, "permission denied; make it readable for this user"),
        (["--disk", "{}/locked"], 2, "cannot be read and written: Permission denied.*,ro"),
        (["--disk", "{}/readable"], 2, "cannot be read and written: Permission denied.*,ro"),
        (["--disk", "{}/readable,ro"], 3, "/device: permission denied"),
        (["--report", "{}/r.json"], 2, "cannot be written: Permission denied; give another path"),
    ],
)
def test_user_without_permission_is_told_so(
    tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    for name, mode in (("device", 0o600), ("locked", 0o600), ("readable", 0o644)):
        (tmp_path / name).write_bytes(bytes(4096))
        (tmp_path / name).chmod(mode)
    # pytest makes its directories 0700.
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    filled = [text.format(tmp_path) for text in arguments]

    done = subprocess.run(
        [sys.executable, "-c", NOBODY, str(tmp_path / "device"), *filled],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert re.fullmatch(f"pyvmm: .*{message}.*\n", done.stderr), done.stderr
    assert done.returncode == status


# -- errors that nobody expected ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("odd\nthing"), 1, r"internal error: ValueError\('odd.*--debug shows where"),
        (OSError(12, "Cannot allocate memory"), 3, "the host refused: .*Cannot allocate memory"),
        (KeyboardInterrupt(), 1, "interrupted while no guest was running"),
    ],
)
def test_unexpected_error_is_one_line(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def fail(self: Machine) -> Outcome:
        raise error

    monkeypatch.setattr(Machine, "run", fail)

    result = command()

    assert re.search(message, result.complaint)
    assert result.status == status


def test_debug_shows_a_traceback_and_keeps_line_and_status(command: Command) -> None:
    result = command("--debug", "--mem", "x")

    assert "Traceback (most recent call last)" in result.err
    assert result.err.splitlines()[-1].startswith("pyvmm: --mem 'x' is not a memory size")
    assert result.status == 2


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("stopped", "the run was stopped: why"),
        ("panic", "the guest panicked: why"),
        ("failed", "the guest failed: why"),
        ("triple-fault", "the guest crashed: why"),
        ("internal-error", "the guest cannot go on: why"),
    ],
)
def test_bad_end_of_a_guest_is_one_line_and_status_1(
    command: Command, monkeypatch: pytest.MonkeyPatch, word: str, line: str
) -> None:
    monkeypatch.setattr(Machine, "run", lambda self: Outcome(word, "why"))

    result = command()

    assert result.complaint == line
    assert result.status == 1


@pytest.mark.parametrize("word", ["poweroff", "reset", "quit"])
def test_good_end_of_a_guest_says_nothing(
    command: Command, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setattr(Machine, "run", lambda self: Outcome(word))

    result = command()

    assert (result.status, result.out, result.err) == (0, "", "")


# -- the process ----------------------------------------------------------------------------------


def test_command_as_a_process_ends_with_its_status_and_line() -> None:
    done = pyvmm("--mem", "x")

    assert done.stderr.startswith("pyvmm: --mem 'x' is not a memory size")
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (2, "")


SHOW_FDS = """
import os, sys
from vmm.cli import main
def show(arguments):
    targets = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
    os.write(int(arguments[0]), "\\n".join(targets).encode())
main.main = show
main.entry_point()
"""
CLOSE = {0: "<&-", 1: ">&-", 2: "2>&-"}


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_closed_standard_fds_are_filled_before_anything_else_is_opened(
    closed: tuple[int, ...],
) -> None:
    # Else a disk becomes fd 1, and the guest's console output goes into it.
    read_end, write_end = os.pipe()
    shell = ["sh", "-c", 'exec "$@" ' + " ".join(CLOSE[fd] for fd in closed), "sh"]
    child = [sys.executable, "-c", SHOW_FDS, str(write_end)]

    subprocess.run(
        [*shell, *child], cwd=ROOT, pass_fds=[write_end], capture_output=True, input=b"",
        timeout=60, check=True,
    )  # fmt: skip

    os.close(write_end)
    with os.fdopen(read_end) as stream:
        targets = stream.read().split("\n")
    assert [target == "/dev/null" for target in targets] == [fd in closed for fd in range(3)]


def test_missing_stderr_keeps_the_status(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)

    result = command("--mem", "x")

    assert (result.status, result.out, result.err) == (2, "", "")


# -- the lab --------------------------------------------------------------------------------------


class NoLab:
    """Stands for the lab where none may be made."""

    def __init__(self, *_: object) -> None:
        raise AssertionError("a lab machine was about to be made")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bad-option"], "unrecognized arguments: --bad-option; see pyvmm --help"),
        (["run", "--kernel"], "argument --kernel: expected one argument"),
        (["--lab-quiet", "--mem", "lots"], "--mem 'lots' is not a memory size"),
        (["--kernel", "debian:6.12", "--scheme", "cbit"], "--scheme cbit needs --private-mem"),
        (["lab"], "unrecognized arguments: lab"),
        (["selftst"], "there is no command selftst; did you mean selftest?"),
    ],
)
def test_lab_refuses_bad_usage_before_a_machine_is_made(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("vmm.lab.command.Lab", NoLab)

    result = command("lab", *arguments)

    assert message in result.complaint
    assert result.status == 2


def test_lab_asks_nothing_about_the_words_of_a_program(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.lab.command.Lab", NoLab)

    result = command("lab", "--lab-exec", "ls", "--bad-option")

    assert "a lab machine was about to be made" in result.complaint


INTERRUPTED_IMPORT = """
import os, sys
import _signal as signal  # imports nothing that pyvmm is to import

signal.signal(signal.SIGINT, signal.{before})

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "{at}":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
import vmm.__main__
"""


@pytest.mark.parametrize("at", ["vmm.cli", "contextlib", "vmm.cli.run_options"])
@pytest.mark.parametrize(
    ("before", "status"), [("default_int_handler", -signal.SIGINT), ("SIG_IGN", 0)]
)
def test_interrupt_while_pyvmm_is_being_imported_shows_no_traceback(
    before: str, status: int, at: str
) -> None:
    script = INTERRUPTED_IMPORT.format(before=before, at=at)

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)

    assert (done.returncode, done.stderr) == (status, b"")


def test_interrupts_are_errors_again_once_pyvmm_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def handled(arguments: list[str]) -> int:
        del arguments
        return 5 if signal.getsignal(signal.SIGINT) is signal.default_int_handler else 6

    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    monkeypatch.setattr(cli, "main", handled)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.entry_point()
    finally:
        signal.signal(signal.SIGINT, before)
        gc.set_threshold(*THRESHOLDS)

    assert ended.value.code == 5


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--exec", "ls"], 125),
        (["--exec=ls"], 125),
        (["lab", "--exec", "ls", "--no-such-option"], 125),
        (["lab", "--lab-mem", "x", "--lab-exec", "sh", "--exec"], 2),
        (["--mem", "x"], 2),
    ],
)
def test_own_failure_with_a_command_has_a_status_of_its_own(
    command: Command, words: list[str], status: int
) -> None:
    assert command(*words).status == status
