"""Cache entries, library listings, initramfs contents and ext4 images."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import firmware
from tests.support.cpio import entries
from tests.unit.core.test_kmodules import module, write
from tests.unit.core.test_root_disk import ext4
from vmm.core.errors import HostError
from vmm.lab import hosts, image, interpreter, machine, qemu
from vmm.lab.cache import Cache
from vmm.lab.closure import libraries_of, parse_listing
from vmm.lab.emulator import Assets
from vmm.lab.initramfs import guest_initramfs, host_initramfs
from vmm.lab.job import Drive
from vmm.lab.machine import Lab, runs_several_vcpus
from vmm.lab.options import LabOptions
from vmm.lab.packages import Kernel, Qemu


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    """Has what a busybox has somewhere in it: the table of its commands' names."""
    program = tmp_path / "busybox"
    program.write_bytes(b"\x7fELF" + bytes(60) + b"[\0[[\0busybox\0ls\0sh\0\0rest\0\0")
    return program


def test_cache_entry_whose_building_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fail(path: Path) -> None:
        path.mkdir()
        raise HostError("no")

    with pytest.raises(HostError):
        cache.entry("a/b", fail)

    assert list((tmp_path / "a").iterdir()) == []


def test_cache_entry_is_built_once(tmp_path: Path) -> None:
    built = []

    def build(path: Path) -> None:
        built.append(path)
        path.write_text("x")

    first = Cache(tmp_path).entry("a/b", build)
    second = Cache(tmp_path).entry("a/b", build)

    assert first == second == tmp_path / "a" / "b"
    assert len(built) == 1


def test_cache_prune_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for age, name in enumerate(("a/other", "a/root-3", "a/root-2", "a/root-1")):
        entry = cache.entry(name, Path.touch)
        os.utime(entry, (1000 - age, 1000 - age))
    cache.entry("a/root-1", Path.touch)

    cache.prune("a/root-", keep=2)

    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["other", "root-1", "root-3"]


def test_cache_in_an_impossible_place_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(HostError, match="--lab-cache DIR"):
        Cache(tmp_path / "file" / "cache")


def test_library_listing_gives_the_paths_and_leaves_out_the_rest() -> None:
    text = (
        "\tlinux-vdso.so.1 (0x00007ffc)\n"
        "\tlibz.so.1 => /lib/x/libz.so.1 (0x00007f01)\n"
        "\tlibgone.so => not found\n"
        "\t/lib64/ld-linux-x86-64.so.2 (0x00007f02)\n"
        "\tstatically linked\n"
    )

    assert parse_listing(text) == {Path("/lib/x/libz.so.1"), Path("/lib64/ld-linux-x86-64.so.2")}


def test_libraries_of_this_python_hold_a_c_library() -> None:
    names = [p.name for p in libraries_of([interpreter.executable()])]

    assert any(name.startswith("libc") for name in names)


def test_standard_library_holds_os_and_compiled_modules() -> None:
    folders = interpreter.standard_library()

    assert any((p / "os.py").is_file() for p in folders)
    assert all(p.is_dir() and p.name.startswith("python3") for p in folders)


def test_distribution_closure_follows_requirements() -> None:
    found = interpreter.distribution_closure(["pytest", "not-there-at-all"])

    assert {"pytest", "pluggy", "iniconfig"} <= set(found)
    assert "not-there-at-all" not in found


@pytest.mark.parametrize(
    ("requirement", "name"),
    [("a>=1; python_version<'3'", "a"), ("B.c_d[x]~=2", "B.c_d"), ("numpy", "numpy")],
)
def test_requirement_name_is_without_version_and_marker(requirement: str, name: str) -> None:
    assert interpreter.requirement_name(requirement) == name


def modules(root: Path) -> Path:
    for name, depends in (
        ("virtio", ""),
        ("virtio_blk", "virtio"),
        ("overlay", ""),
        ("irqbypass", ""),
        ("kvm", "irqbypass"),
        ("kvm-amd", "kvm"),
    ):
        write(root / "modules", name, depends)
    return root / "modules"


def test_host_initramfs_loads_storage_before_kvm(busybox: Path, tmp_path: Path) -> None:
    files = {e.name: e for e in entries(host_initramfs(busybox, modules(tmp_path)))}

    script = files["init"].content.decode()
    assert "load virtio virtio_blk overlay\nload irqbypass kvm kvm_amd &" in script
    assert files["modules/kvm_amd.ko"].content and files["bin/ls"].content == b"busybox"
    assert files["init"].mode & 0o111


def test_host_initramfs_takes_compiled_kvm_modules_over_the_stock_ones(
    busybox: Path, tmp_path: Path
) -> None:
    compiled = module("kvm", "irqbypass") + b"ours"
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "kvm.ko").write_bytes(compiled)

    archive = host_initramfs(busybox, modules(tmp_path), tmp_path / "compiled")
    files = {e.name: e.content for e in entries(archive)}

    assert files["modules/kvm.ko"] == compiled
    assert files["modules/kvm_amd.ko"]


def test_host_initramfs_without_kvm_amd_is_refused(busybox: Path, tmp_path: Path) -> None:
    write(tmp_path / "modules", "virtio_blk")

    with pytest.raises(HostError, match="kvm-amd"):
        host_initramfs(busybox, tmp_path / "modules")


def test_guest_initramfs_without_modules_still_ends_in_a_shell(busybox: Path) -> None:
    files = {e.name: e.content for e in entries(guest_initramfs(busybox, None))}

    assert b"setsid -c sh" in files["init"] and b"poweroff -f" in files["init"]
    assert not any(name.startswith("modules") for name in files)


@pytest.mark.parametrize("kind", ["host", "guest"])
def test_init_scripts_are_valid_shell(kind: str, busybox: Path, tmp_path: Path) -> None:
    tree = modules(tmp_path)
    archive = host_initramfs(busybox, tree) if kind == "host" else guest_initramfs(busybox, tree)
    script = next(e.content for e in entries(archive) if e.name == "init")

    checked = subprocess.run(["sh", "-n"], input=script, capture_output=True, check=False)

    assert checked.stderr == b""


def test_ext4_image_holds_the_folders_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_bytes(b"x" * 300_000)

    image.make_ext4(folder, tmp_path / "image")

    superblock = (tmp_path / "image").read_bytes()[1024:2048]
    assert superblock[0x38:0x3A] == b"\x53\xef"
    assert b"x" * 4096 in (tmp_path / "image").read_bytes()


def test_program_starts_with_the_libraries_beside_it(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()

    image.lay_out_program(stage, Path("/bin/echo"), ["ldd"], None, str(stage), "-n ")

    (loader,) = (stage / "lib").glob("ld-linux-*")
    assert str(loader) in (stage / "run").read_text()
    said = subprocess.run([stage / "run", "some words"], capture_output=True, check=True)
    assert said.stdout == b"some words"


def test_project_sources_name_the_running_package() -> None:
    names = [p.name for p in image.project_sources()]

    assert {"vmm", "tests", "pyproject.toml"} <= set(names)


def test_pyvmm_words_get_an_initrd_for_a_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = tmp_path / "k"
    kernel.touch()
    lab = Lab(LabOptions(cache=tmp_path / "cache"))
    monkeypatch.setattr(lab, "guest_kernel", lambda name: Kernel(kernel, None))
    monkeypatch.setattr(lab, "guest_initramfs", lambda kernel: Path("/i"))

    assert lab.pyvmm_words(["--kernel", "debian:6.12"]) == [
        "--kernel",
        f"{kernel}",
        "--initrd",
        "/i",
        "--append",
        "quiet",
    ]
    assert lab.pyvmm_words(["--kernel=debian:6.12", "--initrd=x", "--append=loglevel=7"]) == [
        f"--kernel={kernel}",
        "--initrd=x",
        "--append=loglevel=7",
    ]
    assert lab.pyvmm_words(["check"]) == ["check"]


@pytest.mark.parametrize(
    ("words", "has_shell"), [(["--exec", "ls"], True), (["--root", "disk.img"], False)]
)
def test_command_and_root_disk_get_a_kernel_and_our_init(
    words: list[str],
    has_shell: bool,
    busybox: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.img").write_bytes(ext4().ljust(1 << 17, b"\0"))
    (tmp_path / "k").touch()
    lab = Lab(LabOptions(cache=tmp_path / "cache", busybox=str(busybox)))
    monkeypatch.setattr(lab, "guest_kernel", lambda name: Kernel(tmp_path / "k", None))

    made = lab.pyvmm_words(words)

    assert made[: len(words) + 2] == [*words, "--kernel", str(tmp_path / "k")]
    archive = Path(made[made.index("--initrd") + 1]).read_bytes()
    assert Path(firmware.init_path()).read_bytes() in archive
    assert (b"bin/busybox\0" in archive) is has_shell


@pytest.mark.parametrize("words", [["bench", "--kernel", "k"], ["run"], ["--private-mem"]])
def test_only_a_run_with_a_kernel_is_made_quiet(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "k").touch()
    lab = Lab(LabOptions(cache=tmp_path / "cache"))
    monkeypatch.setattr(lab, "guest_kernel", lambda name: Kernel(tmp_path / name, None))
    monkeypatch.setattr(lab, "guest_initramfs", lambda kernel: Path("/i"))

    assert "--append" not in lab.pyvmm_words(words)


@pytest.mark.parametrize("only", [["--only", "linux"], ["--only=linux"], ["--only", "iommu"]])
def test_bench_of_a_stock_kernel_gets_fio_where_it_is_to_be_had(
    only: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernel = tmp_path / "k"
    kernel.touch()
    lab = Lab(LabOptions(cache=tmp_path / "cache", offline=True))
    guest = ["--kernel", str(kernel), "--initrd", "i"]

    assert lab.pyvmm_words(["bench", *only, *guest]) == ["bench", *only, *guest]
    assert "goes on without fio: not to be downloaded (--lab-offline)" in capsys.readouterr().err

    monkeypatch.setattr(lab, "fio_image", lambda: Path("/f"))
    for words, added in (
        (["bench", *only, *guest], ["--fio", "/f"]),
        (["bench", *only, *guest, "--fio", "mine"], []),
        (["bench", "--only", "disk", *guest], []),
        (guest, ["--append", "quiet"]),
    ):
        assert lab.pyvmm_words(words) == [*words, *added]


@pytest.mark.parametrize(
    ("words", "several"),
    [
        ("--kernel k --cpus 4", True),
        ("--kernel k --cpus=2", True),
        ("selftest --json r.json", True),
        ("--kernel k --cpus 1", False),
        ("--kernel selftest", False),
        ("check", False),
    ],
)
def test_several_vcpus_are_seen_in_the_command(words: str, several: bool) -> None:
    assert runs_several_vcpus(words.split()) is several


@pytest.mark.parametrize(
    ("words", "given", "cpus"),
    [("--cpus 4", None, "1"), ("--cpus 4", 2, "2"), ("check", None, "2")],
)
def test_guest_with_several_vcpus_gets_a_lab_machine_with_one(
    words: str, given: int | None, cpus: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[LabOptions] = []
    monkeypatch.setattr(machine, "LabRun", lambda assets, options, *rest: started.append(options))
    file = tmp_path / "f"
    file.touch()
    assets = Assets(hosts.DEFAULT, Qemu(file), file, file, file, file, None, Cache(tmp_path))
    monkeypatch.setattr(Lab, "prepare", lambda self: assets)

    Lab(LabOptions(cpus=given)).start(words.split())

    with closing(qemu.launch(Qemu(file), assets, started[0], [Drive(file, True)], [])) as launch:
        command = launch.command
    assert command[command.index("-smp") + 1] == cpus


def test_compiled_files_are_taken_without_a_look_at_their_sources(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("x = 1\n")

    interpreter.RunningPython().compile(tmp_path)

    (compiled,) = (tmp_path / "__pycache__").iterdir()
    assert compiled.name == f"m.{sys.implementation.cache_tag}.pyc"
    assert compiled.read_bytes()[4:8] == (1).to_bytes(4, "little")  # hash-based, unchecked
