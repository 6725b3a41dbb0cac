"""Guests dumped, saved and restored by the real command, in its sandbox, on this machine's KVM."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvm_bindings import KvmError
from kvm_bindings.x86_64 import System
from tests.support import command, guests
from tests.support.command import Session
from tests.support.saved import refuses_what_is_wrong
from vmm.arch.x86_64.vcpu_state import ChipState
from vmm.core.saved import Saved
from vmm.snapshot.folder import packed

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

MIB = 1 << 20
SAID = b"hello\r\n"
MARK = 0x1122_3344_5566_7788
# mov rbx, MARK; then say something, and send back what is typed for ever.
CODE = b"\x48\xbb" + struct.pack("<Q", MARK) + guests.say(SAID) + guests.echo()
PAYLOAD = ["--mem", "64M", "--private-mem=memfd"]


@pytest.fixture
def kernel(tmp_path: Path) -> list[str]:
    (tmp_path / "kernel").write_bytes(guests.kernel(CODE))
    return ["--kernel", str(tmp_path / "kernel"), "--mem", "16M"]


class Machine:
    """A run with a control socket."""

    def __init__(self, session: Session, path: Path) -> None:
        self.session = session
        self._path = path

    def ctl(self, *words: str) -> Any:
        """The answer, and the exit status in "exit"."""
        done = command.run("ctl", str(self._path), *words)
        assert done.returncode != 2, done.stderr.decode()
        return {**json.loads(done.stdout), "exit": done.returncode}

    def echoes(self, text: bytes) -> None:
        self.session.type(text)
        self.session.expect(text)


@contextmanager
def running(path: Path, *options: str, until: bytes = b"") -> Iterator[Machine]:
    with Session([*options, "--control", str(path)]) as session:
        while not path.exists():
            assert session.process.poll() is None, session.wait()
        machine = Machine(session, path)
        machine.ctl("status")  # answered when the terminal is the guest's
        session.expect(until)
        yield machine


@contextmanager
def payload(path: Path, *options: str, until: bytes) -> Iterator[Machine]:
    """The embedded payload, stopped some time after it has said `until`."""
    with running(path, *options, "--report", "/dev/null", until=until) as machine:
        machine.ctl("pause")
        yield machine


def gdb(core: Path, *commands: str) -> str:
    program = shutil.which("gdb")
    if program is None:
        pytest.skip("no gdb: install Debian's package gdb")
    words = [program, "-nx", "-batch", "-ex", "set pagination off"]
    words += ["-ex", "set architecture i386:x86-64", "-ex", f"target core {core}"]
    for each in commands:
        words += ["-ex", each]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=60, check=False, text=True,
    )  # fmt: skip
    return done.stdout


def data_extents(path: Path) -> Iterator[tuple[int, int]]:
    """Where the file has bytes."""
    fd, at = os.open(path, os.O_RDONLY), 0
    size = os.fstat(fd).st_size
    try:
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                return
            at = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, at
    finally:
        os.close(fd)


# --- dump ---


def test_gdb_opens_a_dump_and_the_guest_goes_on(kernel: list[str], tmp_path: Path) -> None:
    with running(tmp_path / "ctl", *kernel, "--cpus", "2", until=SAID) as machine:
        answer = machine.ctl("dump", str(tmp_path / "core"))
        again = command.run("ctl", str(tmp_path / "ctl"), "dump", str(tmp_path / "core"))
        machine.echoes(b"x")

    said = gdb(
        tmp_path / "core",
        "info registers",
        "info threads",
        f"x/2xg {guests.BASE:#x}",
        "x/1xg 0xf0000000",
    )
    assert answer == {
        "ok": True, "exit": 0, "vcpus": 2, "shared_bytes": 16 * MIB, "private_bytes": 0,
        "left_out_bytes": 0, "vmcoreinfo": False,
    }  # fmt: skip
    assert again.returncode == 2
    assert one_line(again.stderr).endswith("core is there already; name a file that isn't")
    assert f"rbx            {MARK:#x}" in said
    assert "Id   Target Id" in said and said.count("LWP") >= 2
    assert f"{guests.BASE:#x}:\t{int.from_bytes(CODE[:8], 'little'):#018x}" in said
    assert "Cannot access memory at address 0xf0000000" in said


class Written(NamedTuple):
    """What a guest with private memory has left, and the answers."""

    core: Path
    whole: Path
    saved: Path
    pages: list[tuple[int, int, str]]
    dumped: dict[str, Any]
    snapped: dict[str, Any]
    state: str


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, kvm: System) -> Written:
    folder = tmp_path_factory.mktemp("private")
    core, whole, saved = folder / "core", folder / "whole", folder / "saved"
    with payload(folder / "ctl", *PAYLOAD, until=b"ok 3") as machine:
        pages = machine.ctl("dump-state")["pages"]
        dumped = machine.ctl("dump", str(core))
        machine.ctl("dump", str(whole), "--with-private")
        snapped = machine.ctl("snapshot", str(saved))
        state = machine.ctl("status")["state"]
    return Written(core, whole, saved, pages, dumped, snapped, state)


def test_private_pages_are_no_part_of_a_dump(written: Written) -> None:
    core, pages, answer = written.core, written.pages, written.dumped
    private = sum(size for _, size, state in pages if state == "private")
    assert answer["left_out_bytes"] == private > 16 * MIB
    assert answer["shared_bytes"] == 64 * MIB - private
    said = gdb(core, "x/1xw 0x100000", "x/1xw 0x3000000", "info files")
    assert "0x100000:\t0x" in said
    assert "Cannot access memory at address 0x3000000" in said
    # Not as zeros, nor as bytes that no header mentions: the file has none there.
    (end,) = [gpa + size for gpa, size, state in pages if state == "shared" and gpa == 0]
    offset = core.stat().st_size - 64 * MIB
    shared_end = max(gpa + size for gpa, size, state in pages if state == "shared")
    assert end == 2 * MIB
    assert all(stop <= offset + shared_end for _, stop in data_extents(core))


def test_private_pages_are_in_a_dump_where_they_are_asked_for(written: Written) -> None:
    said = gdb(written.whole, "x/1xw 0x100000", "x/2xw 0x3000000", "info files")

    assert "0x100000:\t0x" in said and "0x3000000:\t0x" in said
    assert "Cannot access memory" not in said


# --- snapshot and restore ---


def test_restored_guest_goes_on_where_it_was(kernel: list[str], tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    with running(tmp_path / "ctl", *kernel, "--cpus", "2", until=SAID) as machine:
        machine.echoes(b"a")
        answer = machine.ctl("snapshot", saved)
        machine.echoes(b"b")  # it goes on here, too
    assert answer["ok"] and answer["left_out_bytes"] == 0

    with running(tmp_path / "other", "--restore", saved) as machine:
        machine.echoes(b"c")
        assert machine.ctl("status")["shared_bytes"] == 16 * MIB
        core = machine.ctl("dump", str(tmp_path / "core"))
        assert core["vcpus"] == 2
        machine.session.type(b"\x01x")
        status, said = machine.session.wait()

    assert (status, said) == (0, "")
    assert SAID not in machine.session.output
    assert f"rbx            {MARK:#x}" in gdb(tmp_path / "core", "info registers rbx")


def test_private_guest_with_a_disk_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    disk, saved = tmp_path / "disk", str(tmp_path / "saved")
    content = os.urandom(MIB)
    disk.write_bytes(content)
    words = ["--disk", str(disk)]
    with payload(tmp_path / "ctl", *PAYLOAD, *words, until=b"ok 3") as machine:
        answer = machine.ctl("snapshot", saved, "--with-private", "--then-quit")
        assert machine.session.wait() == (0, "")
    assert answer["private_bytes"] > 16 * MIB and answer["left_out_bytes"] == 0

    done = command.run("--restore", saved, *words)

    assert (done.returncode, done.stderr) == (0, b"")
    assert b"payload: all 26 checks passed" in done.stdout
    assert disk.read_bytes() == content


def test_snapshot_of_the_shared_side_has_no_private_byte_and_does_not_run(written: Written) -> None:
    saved, pages, answer = written.saved, written.pages, written.snapped

    done = command.run("--restore", str(saved))

    assert written.state == "paused", "as it was before"
    assert answer["private_bytes"] == 0 and answer["left_out_bytes"] > 16 * MIB
    assert sorted(path.name for path in saved.iterdir()) == ["memory", "state"]
    private = [(gpa, gpa + size) for gpa, size, state in pages if state == "private"]
    for start, end in data_extents(saved / "memory"):
        assert not any(start < stop and begin < end for begin, stop in private)
    assert done.returncode == 2
    assert one_line(done.stderr).endswith("the host's kernel gives away no other private memory)")


PAGE = ("0x3000000", "0x1000")
"""Private at first."""
DENY = ["--policy", "vmm.policy.builtin:DenyAfterBoot"]


def test_restored_guest_is_refused_what_its_policy_refused_before(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    with running(tmp_path / "ctl", "-S", *PAYLOAD, *DENY) as machine:
        before = [machine.ctl("convert", kind, *PAGE)["ok"] for kind in ("share", "unshare")]
        refused = machine.ctl("convert", "share", *PAGE)
        assert machine.ctl("snapshot", saved, "--with-private", "--then-quit")["ok"]
        assert machine.session.wait() == (0, "")

    with running(tmp_path / "same", "-S", "--restore", saved, *DENY) as machine:
        after = machine.ctl("convert", "share", *PAGE)
        machine.ctl("quit")
        quietly = machine.session.wait()
    with running(tmp_path / "other", "-S", "--restore", saved) as machine:
        without = machine.ctl("convert", "share", *PAGE)
        machine.ctl("quit")
        told = machine.session.wait()

    assert before == [True, True]
    assert "policy DenyAfterBoot refused it" in refused["error"]
    assert after == refused
    assert quietly == (0, "")
    assert without["ok"]
    assert told[0] == 0
    assert one_line(told[1].replace("\r\n", "\n").encode()).endswith(
        "its guest goes on without the policies that it had: DenyAfterBoot"
    )


FORGETFUL = """
from vmm.policy import Policy

class Forgetful(Policy):
    saves = 0

    def on_save(self, view):
        self.saves += 1
        if self.saves == 1:
            raise OSError("not now")
        return {"saves": self.saves}

    def on_restore(self, state, view):
        if state["saves"] != 2:
            raise ValueError(f"{state['saves']} saves")
        1 // (state["saves"] - 2)
"""


def test_policy_that_can_t_save_refuses_the_snapshot_and_the_guest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FORGETFUL)
    saved, policy = tmp_path / "saved", ["--policy", str(tmp_path / "own.py") + ":Forgetful"]
    with running(tmp_path / "ctl", "-S", *PAYLOAD, *policy) as machine:
        refused = machine.ctl("snapshot", str(saved), "--with-private")
        left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert machine.ctl("snapshot", str(saved), "--with-private")["ok"]
        machine.ctl("resume")
        assert machine.session.wait() == (0, "")

    broken = command.run("--restore", str(saved), *policy)
    changed = json.loads((saved / "state").read_bytes().partition(b"\n")[2])
    changed["state"]["policies"][0]["state"]["saves"] = 3
    (saved / "state").write_bytes(packed(changed))
    status, said = restore(saved, *policy)

    assert refused["exit"] == 1 and left == []
    assert refused["error"] == (
        "policy Forgetful: on_save raised OSError('not now'); the snapshot is not made, and the "
        "guest goes on"
    )
    assert status == 2
    assert said == (
        f"pyvmm: {saved}/state.state.policies[0]: policy Forgetful can't go on from its state: "
        "ValueError: 3 saves"
    )
    assert broken.returncode == 1
    assert b"in on_restore" in broken.stderr
    assert b"pyvmm: policy Forgetful: on_restore raised ZeroDivisionError" in broken.stderr


@pytest.mark.usefixtures("guest_memfd_flags")
def test_private_memory_that_the_kernel_keeps_is_refused(tmp_path: Path) -> None:
    words = ["--mem", "64M", "--private-mem=guest_memfd"]
    with payload(tmp_path / "ctl", *words, until=b"ok 3") as machine:
        refused = machine.ctl("snapshot", str(tmp_path / "saved"), "--with-private")
        core = machine.ctl("dump", str(tmp_path / "core"), "--with-private")
        shared = machine.ctl("snapshot", str(tmp_path / "shared"))
        left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]

    assert refused["exit"] == 1
    assert "the host's kernel keeps pyvmm out of guest_memfd" in refused["error"]
    assert core["exit"] == 1 and not (tmp_path / "core").exists()
    assert "keeps pyvmm out of guest_memfd; a dump of the shared side needs no" in core["error"]
    assert shared["ok"] is True
    assert not (tmp_path / "saved").exists()
    assert left == []


# --- what is refused ---


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, kvm: System) -> Path:
    """A folder with a snapshot, and its disk beside it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "kernel").write_bytes(guests.kernel(CODE))
    (folder / "disk").write_bytes(os.urandom(MIB))
    words = ["--kernel", str(folder / "kernel"), "--mem", "16M"]
    words += ["--disk", str(folder / "disk"), "--rng"]
    with running(folder / "ctl", *words, until=SAID) as machine:
        assert machine.ctl("snapshot", str(folder / "saved"), "--then-quit")["ok"]
    return folder


@pytest.fixture
def saved(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(made / "saved", tmp_path / "saved")
    shutil.copy2(made / "disk", tmp_path / "disk")
    return tmp_path / "saved"


def one_line(said: bytes) -> str:
    text = said.decode()
    assert text.startswith("pyvmm: ") and text.count("\n") == 1 and text.endswith("\n"), text
    return text[:-1]


def restore(path: Path, *words: str) -> tuple[int, str]:
    done = command.run("--restore", str(path), *words)
    return done.returncode, one_line(done.stderr)


def test_devices_are_named_again_and_disks_are_as_they_were(saved: Path) -> None:
    disk = saved.parent / "disk"
    words = ["--disk", str(disk)]

    assert re.search(
        r"its machine has blk0; name it again with --disk '/.*disk' \(a snapshot opens nothing by "
        r"itself\)$",
        restore(saved)[1],
    )
    assert "its machine has rng; name it again with --rng" in restore(saved, *words)[1]
    more = restore(saved, *words, "--rng", "--disk", f"{saved}/memory,ro,format=raw")
    assert "its machine has no blk1; leave that out" in more[1]
    assert "--mem" in restore(saved, *words, "--rng", "--mem", "1G")[1]
    assert "--kernel" in restore(saved, *words, "--rng", "--kernel", "x")[1]
    with disk.open("r+b") as file:
        file.seek(300_000)
        file.write(b"another byte")
    status, said = restore(saved, *words, "--rng")
    assert status == 2 and "is not as the guest left" in said and "cp --preserve" in said


HOSTILE: dict[str, Callable[[Any], None]] = {
    "private pages": lambda s: s.update(pages=[[0, 16 << 20, "private"]]),
    "bytes nowhere": lambda s: s["memory"].insert(0, [0, 4096, "00" * 32]),
    "another processor": lambda s: s["state"]["platform"]["cpuid"][0][0].__setitem__(3, 1),
    "policies": lambda s: s["state"].update(policies=[{"policy": "x" * 300, "state": None}]),
    "registers": lambda s: s["state"]["platform"]["chips"]["vcpus"][0].update(xcrs="ff" * 392),
}
"""One for each step of a restore; tests/unit/machine/test_restoring.py has the others."""


def test_state_that_makes_no_sense_is_refused_with_one_line(saved: Path) -> None:
    whole = (saved / "state").read_bytes()
    words = ["--disk", str(saved.parent / "disk"), "--rng"]
    said: dict[str, tuple[int, str]] = {}

    for name, change in HOSTILE.items():
        changed = json.loads(whole.partition(b"\n")[2])
        change(changed)
        (saved / "state").write_bytes(packed(changed))
        said[name] = restore(saved, *words)
    (saved / "state").write_bytes(whole[: len(whole) // 2])
    said["cut short"] = restore(saved, *words)

    for name, (status, line) in said.items():
        assert status == 2, (name, line)
        assert str(saved) in line, (name, line)


def every_other_device(folder: Path) -> list[str]:
    """Options for one of each kind, at places of its own."""
    words = ["--net", f"passt={folder}/passt", "--vsock", f"path={folder}/vsock", "--rng"]
    words += ["--balloon", "size=1M", "--console", f"file={folder}/console"]
    return [*words, "--console", f"socket={folder}/port,name=org.example.port"]


HOSTILE_DEVICES: dict[str, Callable[[Any], None]] = {
    "net": lambda device: device.update(mac="010000000001"),
    "vsock": lambda device: device.update(next_port=1 << 40),
    "console": lambda device: device["ports"][1].update(name="another"),
    "balloon": lambda device: device.update(pages="many"),
    "rng": lambda device: device.update(seed=1),
}


def test_machine_with_every_device_goes_on_and_hostile_states_of_them_do_not(
    kernel: list[str], tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("old", "new")]
    with ExitStack() as passts:
        for folder in folders:
            folder.mkdir()
            listener = passts.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(folder / "passt"))
            listener.listen(16)
        words = every_other_device(folders[0])
        with running(tmp_path / "ctl", *kernel, *words, until=SAID) as machine:
            answer = machine.ctl("snapshot", str(tmp_path / "saved"), "--then-quit")
            assert machine.session.wait() == (0, "")

        words = every_other_device(folders[1])
        whole = (tmp_path / "saved" / "state").read_bytes()
        with running(tmp_path / "other", "--restore", str(tmp_path / "saved"), *words) as machine:
            machine.echoes(b"on")
        said: dict[str, tuple[int, str]] = {}
        for name, change in HOSTILE_DEVICES.items():
            changed = json.loads(whole.partition(b"\n")[2])
            devices = changed["state"]["devices"]["virtio"]
            (found,) = [each for each in devices if each["name"].startswith(name)]
            change(found["transport"]["device"])
            (tmp_path / "saved" / "state").write_bytes(packed(changed))
            said[name] = restore(tmp_path / "saved", *words)

    assert answer["ok"]
    assert {name: status for name, (status, _) in said.items()} == dict.fromkeys(HOSTILE_DEVICES, 2)
    for name, (_, line) in said.items():
        assert str(tmp_path / "saved") in line and "transport.device" in line, name


@pytest.fixture
def chips(kvm: System) -> Iterator[Callable[[], ChipState]]:
    """Makes a VM with one vCPU, and what saves it."""
    opened: list[Any] = []

    def make() -> ChipState:
        while opened:
            opened.pop().close()
        vm = kvm.create_vm()
        opened.append(vm)
        vm.create_irqchip()
        vm.create_pit2()
        vcpu = vm.create_vcpu(0)
        opened.append(vcpu)
        vcpu.set_cpuid2(kvm.supported_cpuid())
        return ChipState(vm, [vcpu], kvm.msr_indices)

    yield make
    while opened:
        opened.pop().close()


def test_processor_that_no_guest_had_is_refused_by_us_or_kvm(
    chips: Callable[[], ChipState],
) -> None:
    state = chips().state()
    other = chips()

    def take(saved: Saved) -> None:
        other.restore(saved)

    assert refuses_what_is_wrong(state, take) > 200


def test_processor_comes_back_as_it_was(kvm: System, chips: Callable[[], ChipState]) -> None:
    first = chips()
    (vcpu,) = first._vcpus
    vcpu.set_regs({"rip": 0x1234, "rbx": MARK, "rflags": 2})
    vcpu.set_msrs({0x2FF: 0x806, 0x174: 77})
    area = bytearray(vcpu.get_xsave())
    area[160:176] = b"\x5a" * 16  # XMM0
    area[512] |= 3  # XSTATE_BV: x87 and SSE are not in their first state
    vcpu.set_xsave(bytes(area))
    state = json.loads(json.dumps(first.state()))

    second = chips()
    second.restore(Saved(state, "here"))

    again = second.state()
    (before,), (after,) = state["vcpus"], again["vcpus"]
    for name in ("regs", "sregs", "xcrs", "xsave", "debugregs", "events", "mp_state"):
        assert after[name] == before[name], name
    clocks = (0x10,)
    values = {index: value for index, value in before["msrs"] if index not in clocks}
    assert values == {index: value for index, value in after["msrs"] if index not in clocks}
    assert values[0x174] == 77 and values[0x2FF] == 0x806
    assert "5a" * 16 in after["xsave"]
    assert again["kvmclock_ns"] > state["kvmclock_ns"], "time goes on while nobody is there"
    with pytest.raises(KvmError, match="KVM_SET_IRQCHIP"):
        second._vm.set_irqchip(b"short")
