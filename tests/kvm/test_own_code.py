"""Devices, exit handlers, schemes and backings of the user's own, in real guests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vmm
from firmware import bench_path
from kvm_bindings import exits as kvm_exits
from tests.support.guests import SPIN, kernel, say
from vmm import Kind, Machine, MachineConfig, Outcome, Range
from vmm.conversion.schemes.remap import RemapScheme
from vmm.examples import events_to_csv, side_by_side
from vmm.examples.costly_scheme import Costly
from vmm.examples.post_codes import PostCodes
from vmm.examples.ram_disk import RamDisk
from vmm.machine.report_keys import objection
from vmm.memory.backings.memfd import MemfdBacking
from vmm.policy import Allow, Decision, IoEvent, View

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

ROOT = Path(__file__).parents[2]
SECONDS = 60
PRIVATE = MachineConfig(private_memory="auto", scheme="cbit")
POWER_OFF = bytes.fromhex("66ba0406 66b80034 66ef") + SPIN  # mov dx, 0x604; mov ax, 0x3400; out
PORT = 0x510


def bench(words: str) -> MachineConfig:
    return MachineConfig(kernel=bench_path(), append=f"-- {words}", memory=256 << 20)


def guest(tmp_path: Path, code: str) -> MachineConfig:
    """A guest that executes `code`, says so, and powers off."""
    path = tmp_path / "guest.elf"
    path.write_bytes(kernel(bytes.fromhex(code) + say(b"done\r\n") + POWER_OFF))
    return MachineConfig(kernel=str(path))


# -- devices --------------------------------------------------------------------------------------


def test_ports_of_ones_own_see_what_the_guest_writes() -> None:
    device = PostCodes()

    with Machine(bench("e1000"), devices=[device]) as machine:
        machine.run(SECONDS)

    assert device.codes == {0: 1000}
    counts = machine.report["io"]["postcodes"]
    assert (counts["requests"], counts["bytes_written"]) == (1000, 1000)
    assert counts["codes"] == {"0x0": 1000}  # type: ignore[typeddict-item]  # the device's own key
    assert objection(machine.report) is None


def test_virtio_disk_of_ones_own_is_driven_like_ours() -> None:
    disk, output = RamDisk(), bytearray()
    disk.content[:8] = b"the disk"

    with Machine(PRIVATE, devices=[disk], console=output.extend) as machine:
        machine.run(SECONDS)

    assert b"disk-restore: its old content written back" in output
    assert b"all 26 checks passed" in output
    assert disk.content[:8] == b"the disk"
    assert machine.report["io"]["blk-ram"]["requests"] > 0


def test_io_policy_is_asked_about_a_device_of_ones_own() -> None:
    class Watching(vmm.Policy):
        seen: set[tuple[str, str | None]] = set()

        def on_io(self, event: IoEvent, view: View) -> Decision:
            self.seen.add((event.device, event.named))
            return Allow()

    with Machine(PRIVATE, devices=[RamDisk()], policies=[Watching()]) as machine:
        machine.run(SECONDS)

    assert Watching.seen == {("blk-ram", "ring"), ("blk-ram", "descriptor")}


class Shouting(vmm.PciDevice):
    """Reads a word of the guest's memory that it is told of, and interrupts."""

    def __init__(self) -> None:
        self.told = b""

    def read(self, offset: int, size: int) -> int:
        return 0x5A

    def write(self, offset: int, size: int, value: int) -> None:
        self.told = self.memory.pread(4, value)
        self.interrupt()


@pytest.mark.parametrize(("gpa", "told", "refused"), [(0x20_0000, 4, 0), (0xF000_0000, 0, 1)])
def test_pci_function_of_ones_own_is_found_and_reads_guest_memory(
    gpa: int, told: int, refused: int, tmp_path: Path
) -> None:
    # Command register of 0:1.0: I/O on. BAR 0 into dx, read one byte, print it, write `gpa` there.
    code = (
        "66baf80c b804080080 ef 66bafc0c b801000000 ef"  # 0xcf8: 0x80000804; 0xcfc: 1
        "66baf80c b810080080 ef 66bafc0c ed 83e0fc 89c3"  # ebx = BAR 0 & ~3
        "89da ec 66baf803 ee"  # in al, (bx); out 0x3f8, al
        f"89da b8{gpa.to_bytes(4, 'little').hex()} ef"  # out (bx), gpa
    )
    device, output = Shouting(), bytearray()

    with Machine(guest(tmp_path, code), devices=[device], console=output.extend) as machine:
        outcome = machine.run(SECONDS)

    assert outcome == Outcome("poweroff")
    assert output.startswith(b"\x5adone")
    assert len(device.told) == told
    assert machine.report["io"]["shouting"]["refused"] == refused
    assert device.is_asserted == bool(told)


def test_memory_bar_of_ones_own_is_page_of_registers(tmp_path: Path) -> None:
    class Page(vmm.PciDevice):
        in_memory = True
        written: list[tuple[int, int, int]] = []

        def write(self, offset: int, size: int, value: int) -> None:
            self.written.append((offset, size, value))

    # Memory on; ebx = BAR 0 & ~15; mov dword [rbx + 0x10], 7
    code = (
        "66baf80c b804080080 ef 66bafc0c b802000000 ef"
        "66baf80c b810080080 ef 66bafc0c ed 83e0f0 89c3 c7431007000000"
    )

    with Machine(guest(tmp_path, code), devices=[Page()]) as machine:
        machine.run(SECONDS)

    assert Page.written == [(0x10, 4, 7)]


class Broken(vmm.PortDevice):
    ports = range(0x80, 0x81)

    def write(self, offset: int, size: int, value: int) -> None:
        raise FileNotFoundError(2, "no such code in my book")


def test_what_a_device_raises_ends_the_run_and_is_the_programs(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with (
        Machine(bench("e10"), devices=[Broken()]) as machine,
        pytest.raises(vmm.ExtensionError, match=r"Broken: write raised .*no such code") as caught,
    ):
        machine.run(SECONDS)

    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert machine.report["guest"]["exit"] == "extension-error"
    assert capfd.readouterr() == ("", "")


def test_what_a_virtio_device_raises_ends_the_run_on_the_loops_thread() -> None:
    class Fails(RamDisk):
        def answer(self, queue: int, request: bytes, room: int) -> bytes:
            raise OSError(5, "not a guest's business")

    with (
        Machine(PRIVATE, devices=[Fails()]) as machine,
        pytest.raises(vmm.ExtensionError, match="Fails: answer raised OSError"),
    ):
        machine.run(SECONDS)

    assert machine.report["guest"]["exit"] == "extension-error"


def test_command_shows_the_users_own_frames_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import vmm\n\n\nclass Mine(vmm.PortDevice):\n    ports = range(0x80, 0x81)\n\n"
        "    def write(self, offset, size, value):\n        raise LookupError('my own')\n"
    )

    done = subprocess.run(
        [sys.executable, "-m", "vmm", "--kernel", bench_path(), "--append", "-- e10",
         "--device", f"{tmp_path}/mine.py:Mine"],
        cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "Traceback (most recent call last):",
        f'  File "{tmp_path}/mine.py", line 8, in write',
        "    raise LookupError('my own')",
        "LookupError: my own",
        "pyvmm: Mine: write raised LookupError('my own')",
    ]


def test_signal_ends_a_run_whose_device_never_returns(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import threading\nfrom vmm.examples.ram_disk import RamDisk\n\n\nclass Mine(RamDisk):\n"
        "    def answer(self, queue, request, room):\n"
        "        print('answering', flush=True)\n        threading.Event().wait()\n"
    )
    words = ["--private-mem", "--device", f"{tmp_path}/mine.py:Mine"]

    with subprocess.Popen(
        [sys.executable, "-m", "vmm", *words],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as running:  # fmt: skip
        assert running.stdout is not None and running.stderr is not None
        while "answering" not in running.stdout.readline():
            assert running.poll() is None
        running.terminate()

        assert running.wait(SECONDS) == 1
        assert running.stderr.read() == "pyvmm: the run was stopped: received SIGTERM\n"


# -- exits ----------------------------------------------------------------------------------------


class Ports(vmm.ExitHandler):
    """Answers reads of one port, and leaves the rest to pyvmm."""

    exits = (kvm_exits.IoExit,)

    def __init__(self) -> None:
        self.seen = 0

    def handle(self, vcpu: Any, exit: Any) -> bool:
        self.seen += 1
        if exit.port != PORT or exit.is_write:
            return False
        vcpu.answer_io(b"!" * exit.size)
        return True


def test_exit_handler_comes_first_and_leaves_the_rest(tmp_path: Path) -> None:
    code = "66ba1005 ec 66baf803 ee"  # in al, 0x510; out 0x3f8, al
    handler, output = Ports(), bytearray()

    with Machine(guest(tmp_path, code), exits=[handler], console=output.extend) as machine:
        machine.run(SECONDS)

    assert output == b"!done\r\n"
    assert handler.seen == machine.report["exits"]["io"]


def test_hypercall_handler_gets_its_numbers_alone() -> None:
    class Never(vmm.ExitHandler):
        hypercalls = (99,)

        def handle(self, vcpu: Any, exit: Any) -> bool:
            raise AssertionError(exit)

    with Machine(PRIVATE, exits=[Never()]) as machine:
        assert machine.run(SECONDS) == Outcome("poweroff")


def test_exit_handler_that_says_neither_ends_the_run(tmp_path: Path) -> None:
    class Silent(Ports):
        def handle(self, vcpu: Any, exit: Any) -> bool:
            return None  # type: ignore[return-value]  # the mistake

    with (
        Machine(guest(tmp_path, "66ba1005 ec"), exits=[Silent()]) as machine,
        pytest.raises(vmm.ExtensionError, match="Silent: handle returned None; return True"),
    ):
        machine.run(SECONDS)


# -- schemes and backings -------------------------------------------------------------------------


class Noting(RemapScheme):
    name = "noting"
    like = "remap"

    def __init__(self, parked: Any) -> None:
        super().__init__(parked)
        NOTED.clear()

    def apply(self, area: Range, kind: Kind) -> None:
        NOTED.append((kind, area))
        super().apply(area, kind)


NOTED: list[tuple[Kind, Range]] = []


def test_scheme_of_ones_own_carries_conversions_out() -> None:
    with Machine(MachineConfig(private_memory="auto"), scheme=Noting) as machine:
        assert machine.run(SECONDS) == Outcome("poweroff")

    conversions = machine.report["conversions"]
    assert conversions is not None
    shared = sum(area.size for kind, area in NOTED if kind is Kind.SHARE)
    assert machine.report["scheme"] == "noting"
    assert shared >= conversions["share"]["bytes"] > 0


@pytest.mark.parametrize(
    ("raised", "exit"), [(OSError(28, "no room"), "failed"), (KeyError(1), "extension-error")]
)
def test_scheme_may_refuse_with_an_oserror_and_nothing_else(raised: Exception, exit: str) -> None:
    class Refusing(Costly):
        def apply(self, area: Range, kind: Kind) -> None:
            raise raised

    with Machine(MachineConfig(private_memory="auto"), scheme=Refusing) as machine:
        try:
            machine.run(SECONDS)
        except vmm.ExtensionError as error:
            assert "Refusing: apply raised KeyError(1)" in str(error)

    conversions = machine.report["conversions"]
    assert conversions is not None
    assert conversions["share"]["failed"] >= 1
    assert (machine.report["guest"]["exit"] == "extension-error") == (exit == "extension-error")


class Mine(MemfdBacking):
    name = "mine"
    punched: list[tuple[int, int]] = []

    def punch(self, offset: int, size: int) -> None:
        self.punched.append((offset, size))
        super().punch(offset, size)


def test_backing_of_ones_own_stands_behind_the_private_side() -> None:
    with Machine(MachineConfig(private_memory="auto"), backing=Mine) as machine:
        assert machine.run(SECONDS) == Outcome("poweroff")

    assert machine.report["backings"]["private"] == "mine"
    assert "by the word of a backing of the user's own (Mine)" in machine.report["isolation"]
    assert Mine.punched


def test_backing_that_raises_ends_the_run() -> None:
    class Broken(Mine):
        def punch(self, offset: int, size: int) -> None:
            raise ValueError("my mistake")

    with (
        Machine(MachineConfig(private_memory="auto"), backing=Broken) as machine,
        pytest.raises(vmm.ExtensionError, match="Broken: punch raised ValueError"),
    ):
        machine.run(SECONDS)


# -- by name --------------------------------------------------------------------------------------

MODULE = """
import vmm
from kvm_bindings.exits import IoExit
from vmm.conversion.schemes.cbit import CbitScheme
from vmm.examples.ram_disk import RamDisk
from vmm.memory.backings.memfd import MemfdBacking
from vmm.policy import Deny

class Scheme(CbitScheme):
    name, like = "theirs", "cbit"

class Backing(MemfdBacking):
    name = "their-memfd"

class Disk(RamDisk):
    name = "blk-theirs"

class Exits(vmm.ExitHandler):
    exits = (IoExit,)
    def handle(self, vcpu, exit):
        return False

class No(vmm.Policy):
    def on_share(self, event, view):
        return Deny()
"""
POINTS = """
[pyvmm.devices]
theirs = theirs:Disk
[pyvmm.exits]
theirs = theirs:Exits
[pyvmm.schemes]
theirs = theirs:Scheme
[pyvmm.backings]
theirs = theirs:Backing
[pyvmm.policies]
no-shares = theirs:No
broken = nowhere:Nothing
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """An environment in which a distribution registers all of them."""
    about = tmp_path / "theirs-1.dist-info"
    about.mkdir()
    (tmp_path / "theirs.py").write_text(MODULE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (about / "entry_points.txt").write_text(POINTS)
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


def command(words: list[str], env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmm", *words],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def test_registered_names_are_found_by_the_options(
    installed: dict[str, str], tmp_path: Path
) -> None:
    words = ["--device", "theirs,size=1M", "--scheme", "theirs", "--private-mem=theirs"]

    done = command([*words, "--exit-handler", "theirs", "--report", "r"], installed, tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "r").read_text())
    assert (report["scheme"], report["backings"]["private"]) == ("theirs", "their-memfd")
    assert report["io"]["blk-theirs"]["requests"] > 0


def test_registered_policy_is_found_by_its_name(installed: dict[str, str], tmp_path: Path) -> None:
    words = ["--private-mem", "--policy", "no-shares", "--report", "r"]

    command(words, installed, tmp_path)

    share = json.loads((tmp_path / "r").read_text())["conversions"]["share"]
    assert share["denied"] == share["calls"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--policy", "no-share"], "--policy no-share: write MODULE:CLASS or FILE.py:CLASS, or "
         "one of broken, no-shares"),
        (["--policy", "broken"], "--policy broken: its entry point of theirs, nowhere:Nothing, "
         "failed: ModuleNotFoundError"),
        (["--scheme", "their"], "--scheme their is unknown; use one of auto, attributes"),
        (["--device", "theirs,siz=1"], "--device theirs: siz=1: Disk takes size"),
    ],
)  # fmt: skip
def test_name_that_nobody_registers_is_one_line(
    words: list[str], sentence: str, installed: dict[str, str], tmp_path: Path
) -> None:
    done = command(["--private-mem", *words], installed, tmp_path)

    assert done.returncode == 2
    assert done.stderr.startswith(f"pyvmm: {sentence}")
    assert done.stderr.count("\n") == 1


# -- programs -------------------------------------------------------------------------------------


def test_events_of_a_run_are_its_requests_and_its_end() -> None:
    with Machine(PRIVATE) as machine:
        events = machine.events()
        machine.start()
        seen = list(events)

    conversions = machine.report["conversions"]
    assert conversions is not None
    requests = [event for event in seen if isinstance(event, vmm.Requested)]
    shares = [event for event in requests if event.kind == "share"]
    failed = [event for event in requests if event.errno]
    assert len(shares) == conversions["share"]["calls"] > 0
    assert len(requests) - len(shares) == conversions["unshare"]["calls"]
    assert len(failed) == conversions["share"]["failed"] + conversions["unshare"]["failed"]
    assert any(isinstance(event, vmm.Changed) for event in seen)
    last = seen[-1]
    assert isinstance(last, vmm.Noted)
    assert (last.what, last.details["exit"]) == ("ended", "poweroff")


def test_events_end_with_a_machine_that_does_not_start() -> None:
    machine = Machine(MachineConfig(kernel="/nonexistent"))
    events = machine.events()

    with pytest.raises(vmm.UsageError, match="/nonexistent"):
        machine.start()

    assert list(events) == []


def test_events_to_csv_of_the_examples_has_a_row_for_each_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events_to_csv.main(str(tmp_path / "exposed.csv"))

    heading, *rows = (tmp_path / "exposed.csv").read_text().splitlines()
    assert capsys.readouterr().out == "poweroff 0 events lost\n"
    assert heading == "seconds,shared_bytes,refused"
    assert max(int(row.split(",")[1]) for row in rows) > 2 << 20
    assert rows[-1].split(",")[1:] == ["0", "0"]


def test_side_by_side_of_the_examples_says_what_each_policy_made_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    side_by_side.main()

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("23 shares, 0 denied")
    assert not lines[1].endswith("0 denied")
