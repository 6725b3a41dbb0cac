"""How Bochs is configured, booted and spoken to. No Bochs is run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.core.errors import HostError, UsageError
from vmm.lab import bochs
from vmm.lab.devices import PC
from vmm.lab.emulator import Launch
from vmm.lab.hosts import named
from vmm.lab.job import Drive, Job, Surroundings, lay_out
from vmm.lab.machine import Lab
from vmm.lab.options import LabOptions, parse
from vmm.lab.packages import Bochs
from vmm.lab.streams import Pieces, Pump, Stream, TerminalEnd

STREAMS = ["serial", "in", "out", "error"]


WITHOUT = tuple(map(bytes.fromhex, bochs._DECODE_ASSISTS))


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[tuple[Launch, str]]:
    drives = [
        Drive(Path(f"/images/{name}"), name != "results") for name in ("a", "b", "c", "results")
    ]
    program = tmp_path / "tree" / "usr" / "bin" / "bochs-bin"
    program.parent.mkdir(parents=True)
    program.write_bytes(b"ELF".join(WITHOUT))
    emulator = Bochs(tmp_path / "tree", Path("/images/floppy"))
    launch = bochs.launch(emulator, LabOptions(memory_mib=512), drives, STREAMS, tmp_path)
    yield launch, (tmp_path / "bochsrc").read_text()
    for stream in launch.streams.values():
        stream.socket.close()


def test_processors_get_decode_assists_wherever_they_say_what_they_have(tmp_path: Path) -> None:
    program, copy = tmp_path / "bochs-bin", tmp_path / "copy"
    program.write_bytes(b"--".join([*WITHOUT, *WITHOUT]))

    bochs.give_decode_assists(program, copy)

    having = list(map(bytes.fromhex, bochs._DECODE_ASSISTS.values()))
    assert [len(code) for code in having] == [len(code) for code in WITHOUT]
    assert copy.read_bytes() == b"--".join([*having, *having])
    assert os.access(copy, os.X_OK)


@pytest.mark.parametrize("there", WITHOUT)
def test_bochs_that_is_built_differently_is_refused(there: bytes, tmp_path: Path) -> None:
    program = tmp_path / "bochs-bin"
    program.write_bytes(there)

    with pytest.raises(HostError, match="this Bochs doesn't say what its processors have"):
        bochs.give_decode_assists(program, tmp_path / "copy")


def test_shared_images_are_never_opened_for_writing(
    launched: tuple[Launch, str], tmp_path: Path
) -> None:
    lines = launched[1].splitlines()

    assert (
        f'ata0-master: type=disk, path="/images/a", mode=volatile, journal="{tmp_path}/journal0"'
        in lines
    )
    assert (
        f'ata0-slave: type=disk, path="/images/b", mode=volatile, journal="{tmp_path}/journal1"'
        in lines
    )
    assert 'ata1-slave: type=disk, path="/images/results", mode=flat' in lines


def test_each_stream_is_a_serial_line_in_order(launched: tuple[Launch, str]) -> None:
    launch, configuration = launched

    assert list(launch.streams) == STREAMS
    for number, stream in enumerate(launch.streams.values(), start=1):
        assert isinstance(stream.socket, TerminalEnd)
        assert f"com{number}: enabled=1, mode=term, dev={stream.socket.name}\n" in configuration
    assert launch.streams["in"].pieces is not None and launch.streams["out"].pieces is None


def test_command_runs_the_unpacked_program_with_its_own_libraries(
    launched: tuple[Launch, str], tmp_path: Path
) -> None:
    launch, configuration = launched

    tree = tmp_path / "tree"
    assert launch.command[0] == f"{tree}/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    assert f"{tmp_path}/bochs-bin" in launch.command
    assert launch.environment["LTDL_LIBRARY_PATH"].startswith(f"{tree}/")
    assert "memory: guest=512, host=512\n" in configuration


@pytest.mark.parametrize(
    ("job", "options", "named_in_it"),
    [
        (Job([], Path("/"), drives=[Drive(Path("/d.img"), True)]), LabOptions(), "/d.img.*--disk"),
        (Job([], Path("/")), LabOptions(with_qemu=True), "--lab-with-qemu"),
        (Job([], Path("/")), LabOptions(cpus=2), "--lab-cpus 2: .*one processor"),
    ],
)
def test_what_the_machine_has_no_place_for_is_refused(
    job: Job, options: LabOptions, named_in_it: str
) -> None:
    with pytest.raises(UsageError, match=named_in_it):
        bochs.refuse(job, options)


def test_disk_is_refused_before_anything_is_downloaded(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(512))
    lab = Lab(LabOptions(cache=tmp_path / "cache", offline=True, host="bochs"))

    with pytest.raises(UsageError, match=r"disk\.img: the bochs host has no place for disks"):
        lab.start(["--disk", "disk.img"], directory=tmp_path)


def test_one_processor_and_no_disks_are_not_refused() -> None:
    bochs.refuse(Job([], Path("/")), LabOptions(cpus=1))

    assert named(parse(["--host", "bochs"]).options.host).cpus == 1


def test_being_switched_off_is_no_complaint(launched: tuple[Launch, str]) -> None:
    said = "====\nBochs is exiting with the following message:\n[X     ] {}\n====\n"

    assert launched[0].complaint(said.format("ACPI control: soft power off")) is None
    assert launched[0].complaint(said.format("no ROM")) == "Bochs said: [X     ] no ROM"
    assert launched[0].complaint("") is None


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """GRUB's boot sector, and a grub-mkimage that makes an image of three sectors."""
    modules = tmp_path / "usr" / "lib" / "grub" / "i386-pc"
    modules.mkdir(parents=True)
    (modules / "boot.img").write_bytes(b"B" * 512)

    def make(tree: Path, program: Path, arguments: list[str]) -> None:
        script = Path(arguments[arguments.index("-c") + 1]).read_text()
        core = b"C" * 1024 + script.encode().ljust(512, b"\0")
        Path(arguments[arguments.index("-o") + 1]).write_bytes(core)

    monkeypatch.setattr(bochs, "run_unpacked", make)
    return tmp_path


def test_floppy_has_the_loader_behind_its_boot_sector(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    bochs.build_floppy(tree, tmp_path / "scratch" / "entry")

    content = (tmp_path / "scratch" / "entry").read_bytes()
    assert len(content) == 1440 * 1024
    assert content[:1536] == b"B" * 512 + b"C" * 1024
    assert b"linux /boot/vmlinuz console=ttyS0" in content[1536:2048]


def test_loader_that_does_not_fit_is_refused(tree: Path, tmp_path: Path) -> None:
    (tree / "usr" / "lib" / "grub" / "i386-pc" / "boot.img").write_bytes(b"B" * 513)

    with pytest.raises(HostError, match="does not fit a floppy"):
        bochs.build_floppy(tree, tmp_path / "entry")


def test_pieces_are_sent_one_for_each_time_they_are_asked_for() -> None:
    pieces = Pieces()
    pieces.waiting += b"x" * 1500

    assert pieces.next() == b""  # nobody is there yet
    pieces.ask()
    assert pieces.next() == b"1024\n" + b"x" * 1024
    assert pieces.next() == b""
    pieces.ended = True
    pieces.ask()
    assert pieces.next() == b"476\n" + b"x" * 476
    pieces.ask()
    assert pieces.next() == b"0\n"


@pytest.fixture
def lines() -> Iterator[dict[str, TerminalEnd]]:
    ends = {name: TerminalEnd() for name in STREAMS}
    yield ends
    for end in ends.values():
        end.close()


def test_terminal_passes_bytes_as_they_are_and_echoes_none(lines: dict[str, TerminalEnd]) -> None:
    end = lines["serial"]
    machine = os.open(end.name, os.O_RDWR | os.O_NOCTTY)
    data = bytes(range(256))
    end.send(bytearray(data))

    assert os.read(machine, 512) == data
    with pytest.raises(BlockingIOError):
        end.recv(1)
    os.write(machine, data)
    os.close(machine)
    assert end.recv(512) == data


def test_script_on_serial_lines_passes_every_byte_and_the_inputs_end(
    lines: dict[str, TerminalEnd], tmp_path: Path
) -> None:
    # The job's script itself, with pseudo-terminals for the machine's serial lines.
    devices = dataclasses.replace(
        PC, input=lines["in"].name, output=lines["out"].name, error=lines["error"].name
    )
    job = Job(["sh", "-c", "cat; [ -p /dev/stdout ] && echo problem >&2; exit 9"], tmp_path)
    lay_out(job, Surroundings({}, "/usr/bin:/bin", "<end>", names=devices), tmp_path)
    script = (tmp_path / "run").read_text()
    begin, end = script.index("for line in"), script.index("cd /\nset --")
    part = script[begin:end].replace("/lab/", f"{tmp_path}/").replace("/dev/console", "/dev/null")
    data = bytes(range(256)) * 8
    received = {"out": bytearray(), "error": bytearray()}
    streams = [Stream("in", lines["in"], pieces=Pieces())]
    streams += [Stream(name, lines[name], received[name].extend) for name in ("out", "error")]

    with subprocess.Popen(["sh", "-c", f"TOKEN='<end>'\n{part}"]) as machine:
        process_fd = os.pidfd_open(machine.pid)
        pump = Pump(streams, process_fd)
        pump.send(streams[0], data)
        pump.close_sending(streams[0])
        while not pump.process_ended:
            pump.pump(1)
        pump.drain()
        os.close(process_fd)

    assert received["out"] == data + b"<end>"
    assert received["error"] == b"problem\n<end>"
    assert (tmp_path / "status").read_text() == "9\n"
