"""Every kind of bad input: exit status 2 and one line that says what, and what to do."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.support.images import build_bzimage, build_elf, patch
from tests.unit.cli.conftest import Command
from vmm.devices.virtio.net_backend import Tap

HIGHEST_STATUS = 3


def refused(command: Command, arguments: str | list[str], message: str) -> None:
    """The command ends with status 2 and a line that matches `message`."""
    result = command(*(arguments.split() if isinstance(arguments, str) else arguments))

    assert re.search(message, result.complaint), result.complaint
    assert result.status == 2


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exec", "ls"], "--exec needs --kernel"),
        (["--kernel", "k", "--share", "d"], "--share needs --exec"),
        (["--root", "disk.img"], "--root needs --kernel"),
        (["--kernel", "k", "--root", "disk.img,part=x"], "no partition's number, as in part=1"),
    ],
)
def test_root_and_command_without_what_they_need(
    command: Command, arguments: list[str], message: str
) -> None:
    result = command(*arguments)

    assert re.search(message, result.complaint), result.complaint
    assert result.status == (125 if "--exec" in arguments else 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--frobnicate", "unrecognized arguments: --frobnicate; see pyvmm --help"),
        ("--dsk x", "unrecognized arguments: --dsk .did you mean --disk.. x; see pyvmm --help"),
        ("vmlinuz", "there is no command vmlinuz; the commands are run, check, "),
        ("chek --json", "there is no command chek; did you mean check."),
        ("help chek", "there is no command chek; did you mean check."),
        ("check --jsn", "unrecognized arguments: --jsn .did you mean --json.."),
        ("lab --lab-quite", "--lab-quite: no such option of the lab; did you mean --lab-quiet."),
        ("--kern x", "unrecognized arguments: --kern .did you mean --kernel.. x"),
        ("run run", "unrecognized arguments: run"),
        ("--mem", "argument --mem: expected one argument"),
        ("--mem nonsense", "--mem 'nonsense' is not a memory size.*512M"),
        ("--mem -1", "--mem"),
        ("--mem 1", "--mem 1 is out of range; use 4M to 256G; 1 without a unit is bytes"),
        ("--mem 1T", "--mem 1024G is out of range"),
        ("--mem 512", "write 512M for MiB"),
        ("--disk x,seria=1", "unknown option 'seria' .did you mean serial"),
        ("--mem 300K", "--mem 300K is out of range; use 4M to 256G$"),
        ("--mem 4097K", "not a multiple of 4096; write 4100K"),
        ("--balloon size=64", "not a multiple of 4096; 64 without a unit is bytes"),
        ("--mem 12M", "--mem 12M: the embedded payload needs 16M or more"),
        ("--cpus 0", "--cpus 0.*use 1 to 64"),
        ("--cpus 65", "--cpus 65.*use 1 to 64"),
        ("--cpus x", "--cpus 'x' is not a number of vCPUs; use 1 to 64"),
        ("--private-mem=tmpfs", "--private-mem=tmpfs is unknown; use one of auto, guest_memfd"),
        ("--private-mem tmpfs", "--private-mem=tmpfs is unknown"),
        ("--private-mem --scheme tdx", "--scheme tdx is unknown; use one of auto, attributes, in-"),
        ("--private-mem --scheme=", "--scheme  is unknown"),
        (
            "--private-mem=memfd --scheme attributes",
            "use --private-mem=auto .it takes guest_memfd-",
        ),
        ("--private-mem --kernel x --scheme remap", "--scheme remap: Linux .*use --scheme cbit"),
        ("--scheme cbit", "--scheme cbit needs --private-mem"),
        ("--initrd x", "--initrd needs --kernel"),
        ("--append quiet", "--append needs --kernel"),
        ("--policy p.py:P", "--policy needs --private-mem"),
        ("--policy-arg x=1", "--policy-arg x=1 has no --policy before it"),
        ("--policy-arg x=1 --policy p.py:P", "--policy-arg x=1 has no --policy before it"),
        ("--private-mem --policy vmm.policy.builtin:Quota", "Quota needs limit"),
        ("--private-mem --policy vmm.policy.builtin:Quota --policy-arg limit=x", "wants int"),
        (
            "--private-mem --policy vmm.policy.builtin:Quota --policy-arg limit=1"
            " --policy vmm.policy:Policy --policy-arg limit=1",
            "--policy vmm.policy:Policy: --policy-arg limit=1: Policy takes none at all",
        ),
        ("run --mem x", "--mem 'x'"),
    ],
)
def test_bad_option_is_refused(command: Command, arguments: str, message: str) -> None:
    refused(command, arguments, message)


def test_kernel_without_its_option_is_told_the_option(command: Command, tmp_path: Path) -> None:
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(b"")

    refused(command, [str(kernel)], f"there is no command {kernel}; a kernel is given as --kernel ")


@pytest.mark.parametrize("text", ["1\n2", "\x1b[2J", "\u202e", "\udcff"])
def test_hostile_text_in_an_option_stays_on_one_line(command: Command, text: str) -> None:
    result = command("--mem", text)

    assert text not in result.complaint
    assert result.status == 2


# -- kernel and initrd ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"kernel vmlinuz: is empty \(0 bytes\); get a fresh copy"),
        (b"\x7fELF", "kernel vmlinuz: .*truncated"),
        (os.urandom(4096), "kernel vmlinuz: is no known kernel image"),
        (patch(build_elf(), e_machine=183), "for arm64.*give an x86-64 vmlinux or bzImage"),
        (patch(build_elf(), e_machine=243), "not for x86-64"),
        (b"#!/bin/sh\n" + bytes(2000), "is a script, not a kernel"),
        (build_bzimage()[:-64], "kernel vmlinuz: "),
        (build_bzimage(payload=b"\xff" * 100), "kernel vmlinuz: "),
    ],
    ids=["empty", "stub", "noise", "arm64", "riscv", "script", "cut", "bad payload"],
)
def test_file_that_is_no_kernel_is_refused(
    command: Command, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "vmlinuz").write_bytes(content)

    refused(command, "--kernel vmlinuz", message)


def test_missing_kernel_is_refused(command: Command) -> None:
    refused(command, "--kernel nowhere", "kernel nowhere: no such file; check the path")


@pytest.mark.parametrize("option", ["--kernel", "--initrd"])
def test_directory_in_place_of_an_image_is_refused(
    command: Command, tmp_path: Path, option: str
) -> None:
    (tmp_path / "vmlinuz").write_bytes(build_bzimage())
    (tmp_path / "directory").mkdir()

    refused(command, f"--kernel vmlinuz {option} directory", "directory: is a directory; name the")


def test_fifo_in_place_of_a_kernel_is_refused_without_waiting(
    command: Command, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")

    refused(command, "--kernel fifo", "is not a regular file; copy it")


def test_memory_below_the_kernels_need_names_what_is_enough(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "vmlinuz").write_bytes(build_bzimage())

    refused(command, "--kernel vmlinuz --mem 16M", "RAM ends at 0x1000000; use --mem 17M or more")

    assert command(*["--kernel", "vmlinuz", "--mem", "17M"]).status == HIGHEST_STATUS


@pytest.mark.parametrize("kernel", [build_bzimage(), build_elf()], ids=["bzImage", "vmlinux"])
def test_initrd_larger_than_ram_names_what_is_enough(
    command: Command, tmp_path: Path, kernel: bytes
) -> None:
    (tmp_path / "vmlinuz").write_bytes(kernel)
    (tmp_path / "initrd").touch()
    os.truncate(tmp_path / "initrd", 1 << 30)
    start = ["--kernel", "vmlinuz", "--initrd", "initrd", "--mem"]

    result = command(*start, "64M")

    assert "its 1073741824 bytes do not fit in guest RAM" in result.complaint
    assert result.status == 2
    enough = re.search(r"use --mem (\d+M) or more", result.complaint)
    assert enough is not None
    assert command(*start, enough[1]).status == HIGHEST_STATUS


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_initrd_that_cannot_be_used_is_refused(command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "vmlinuz").write_bytes(build_bzimage())
    (tmp_path / "empty").touch()

    refused(command, f"--kernel vmlinuz --initrd {name}", f"initrd {name}: ")


def test_command_line_that_is_too_long_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(build_bzimage())

    refused(command, ["--kernel", "vmlinuz", "--append", "x" * 3000], "command line")


def test_host_side_load_into_unreachable_memory_is_refused(command: Command) -> None:
    refused(
        command,
        "--kernel x --private-mem=guest_memfd-plain",
        "use --private-mem alone, .* or one of guest_memfd-mmap, memfd, ",
    )


# -- disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "--disk nowhere: no such file; make one, for example"),
        ("directory", "--disk directory is a directory; name a file or block device"),
        ("empty", "0 bytes are less than one sector of 512; make it larger"),
        ("/dev/null", "is neither a file nor a block device"),
        ("disk,rw", "unknown option 'rw'; write --disk FILE"),
        ("disk,io=dma", "io=dma is none of auto, .*; write --disk FILE.*fd2fd"),
        (
            "disk,io=mmap",
            "io=mmap reads and writes guest memory itself.*use io=hva.*--allow-mapped-io",
        ),
        (",ro", "names no file"),
    ],
)
def test_bad_disk_is_refused(command: Command, tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "disk").write_bytes(bytes(512))

    refused(command, f"--disk {spec}", message)


# -- other devices --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--disk disk,queues=0", "queues=0 is not in the range 1 to 16; write --disk FILE"),
        ("--disk disk,queues=many", "queues=many is no number"),
        ("--disk disk,ro,ro", "'ro' is given twice"),
        ("--net eth0", "exactly one of passt, tap is needed; write --net tap=NAME"),
        ("--net tap=tap0,passt=s", "exactly one of passt, tap"),
        ("--net tap=", "'tap' has no value"),
        ("--net tap=a-name-that-is-too-long", "not the name of an interface; use 1 to 15"),
        ("--net tap=a/b", "not the name of an interface"),
        ("--net tap=tap0,mac=1", "mac=1 is no address such as 02:00:00:00:00:01"),
        ("--net tap=tap0,mac=01:00:00:00:00:00", "a multicast or empty address"),
        ("--net tap=tap0,speed=9", "unknown option 'speed'"),
        ("--net passt=nowhere", "no passt to connect to: No such file.*passt --socket nowhere"),
        ("--vsock cid=3", "path= is missing; write --vsock path=PATH"),
        ("--vsock path=v,cid=0", "cid=0 is not in the range 3 to"),
        ("--vsock path=nowhere/v", "--vsock path=nowhere/v: cannot listen there: No such file"),
        ("--console stdio", "exactly one of file, pty, socket is needed; write --console pty"),
        ("--console file=nowhere/f", "--console file=nowhere/f cannot be written: No such file"),
        ("--console socket=nowhere/s", "--console socket=nowhere/s: cannot listen there"),
        ("--console file=f,name=x", "the first one is a console; put one without name= first"),
        ("--balloon size=much", "size=much is no size such as 64M; write --balloon"),
        ("--balloon size=1G", "size=1G is more than the guest's 512M"),
        ("--balloon 64M", "unknown option '64M'"),
        ("--rng=fast", "ignored explicit argument"),
    ],
)
def test_bad_device_is_refused(command: Command, tmp_path: Path, words: str, message: str) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))

    refused(command, words, message)


def test_more_devices_than_slots_are_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))

    refused(command, ["--disk=disk,ro"] * 32, "32 virtio devices are asked for; .* slots for 31")


def test_good_devices_get_as_far_as_the_host_and_leave_no_sockets(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))
    words = (
        "--disk disk,queues=4 --vsock path=v,cid=9 --console file=out --console socket=s,name=x "
        "--rng --balloon size=64M,control=c"
    )

    assert command(*words.split()).status == HIGHEST_STATUS
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"]


def test_tap_without_a_tun_driver_names_the_way_out(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tap.__init__, "__defaults__", ("/nowhere/tun",))

    result = command("--net", "tap=tap0")

    assert result.status == HIGHEST_STATUS
    assert "load the kernel's tun module, or use --net passt=SOCKET" in result.complaint


# -- policies -------------------------------------------------------------------------------------

POLICIES = """
from __future__ import annotations
from dataclasses import dataclass
from vmm.policy import Policy
class Good(Policy): pass
@dataclass
class Counting(Policy):
    shares: int = 0
class Other: pass
class Picky(Policy):
    def __init__(self, number): pass
class Broken(Policy):
    def __init__(self): raise ValueError("no luck")
class Leaving(Policy):
    def __init__(self): raise SystemExit(0)
"""


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("p", "--policy p: write MODULE:CLASS or FILE.py:CLASS"),
        ("p:", "write MODULE:CLASS"),
        (":P", "write MODULE:CLASS"),
        ("../p:P", "write MODULE:CLASS"),
        ("..p:P", "write MODULE:CLASS"),
        ("no_such_module:P", "no module no_such_module on Python's path; to load a file, write F"),
        ("nowhere.py:P", "loading nowhere.py failed: .*No such file"),
        ("p.py:Nobody", "p.py has no class Nobody"),
        ("p.py:Other", "Other is not a subclass of vmm.policy.Policy"),
        ("p.py:dataclass", "dataclass is not a subclass"),
        ("p.py:Picky", "p.py:Picky: Picky needs number; give it with --policy-arg number=VALUE"),
        ("p.py:Broken", r"Broken\(\) failed: ValueError\('no luck'\)"),
        ("p.py:Leaving", r"Leaving\(\) failed: SystemExit"),
        ("syntax.py:P", r"loading syntax.py failed: .*syntax.*line 2"),
        ("leaving.py:P", "loading leaving.py failed: SystemExit"),
    ],
)
def test_bad_policy_is_refused(command: Command, tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "p.py").write_text(POLICIES)
    (tmp_path / "syntax.py").write_text("x = 1\nthis is no python\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(5)\n")

    refused(command, f"--private-mem --policy {spec}", message)


@pytest.mark.parametrize("name", ["Good", "Counting"])
def test_good_policy_gets_as_far_as_the_host(command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "p.py").write_text(POLICIES)

    assert command("--private-mem", "--policy", f"p.py:{name}").status == HIGHEST_STATUS


# -- report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/r.json", "--report nowhere/r.json cannot be written: No such file.*another path"),
        (".", "--report . cannot be written: Is a directory"),
    ],
)
def test_report_that_cannot_be_written_is_refused(
    command: Command, path: str, message: str
) -> None:
    refused(command, ["--report", path], message)


def test_trace_that_cannot_be_written_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()

    refused(command, ["--trace", "file"], "--trace file is not a folder; give a new folder's name")
    refused(command, ["--trace", "full"], r"--trace full holds something else \(letter.txt\)")
    refused(command, ["--trace", "file/sub"], "--trace file/sub cannot be written: Not a directory")


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ([], "use --mem 17M or more"),
        (["--private-mem"], "use --mem 88M or more"),
        (["--private-mem", "--initrd", "initrd"], "use --mem 92M or more"),
        (["--private-mem", "--initrd", "initrd", "--mem", "20M"], "use --mem 92M or more"),
    ],
)
def test_advice_about_memory_counts_what_private_memory_bounces_through(
    command: Command, tmp_path: Path, options: list[str], advice: str
) -> None:
    # Linux takes 64 MiB for that at the least, and panics where it finds none.
    (tmp_path / "kernel").write_bytes(build_bzimage())
    (tmp_path / "initrd").write_bytes(bytes(4 << 20))

    result = command("--kernel", "kernel", "--mem", "16M", *options)

    assert advice in result.complaint
    assert result.status == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--disk d --report d", "--report d is also --disk d, and would replace it"),
        ("--disk d,ro --report link", "--report link is also --disk d,"),
        ("--disk d --console file=sub/../d", "--console file=sub/../d is also --disk d"),
        ("--kernel k --report k", "--report k is also --kernel k"),
        ("--kernel k --initrd d --report d", "--report d is also --initrd d"),
        ("--private-mem --policy p.py:P --report p.py", "--report p.py is also --policy p.py:P"),
        ("--report new --console file=new", "--console file=new is also --report new"),
        ("--console file=a --console file=a,name=x", "--console file=a,name=x is also --console"),
    ],
)
def test_output_that_would_replace_an_input_is_refused_and_the_input_stays(
    command: Command, tmp_path: Path, options: str, message: str
) -> None:
    (tmp_path / "sub").mkdir()
    contents = {"d": bytes(4096), "k": build_bzimage(), "p.py": b"class P: pass\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to("d")

    result = command(*options.split())

    assert message in result.complaint
    assert result.status == 2
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", ["--report /dev/null --console file=/dev/null", "--report -"])
def test_outputs_may_share_a_device(command: Command, options: str) -> None:
    assert command(*options.split()).status == 3  # no KVM here
