"""What differs by the lab machine's architecture: names, packages, QEMU's words, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.core.test_kmodules import write
from tests.unit.lab.test_packages import FakeApt, bzimage
from vmm.core.errors import HostError, UsageError
from vmm.core.kernel_file import debian_version, kernel_release
from vmm.lab import hosts, qemu
from vmm.lab.apt import Apt
from vmm.lab.architecture import AMD64, ARCHITECTURES, ARM64, foreign_kernel
from vmm.lab.cache import Cache
from vmm.lab.command import run
from vmm.lab.emulator import Assets
from vmm.lab.initramfs import applets, host_initramfs
from vmm.lab.job import Drive, Job, Surroundings, lay_out
from vmm.lab.machine import Lab, with_kernel
from vmm.lab.options import LabOptions
from vmm.lab.packages import Packages, Qemu
from vmm.lab.progress import Silent

ARM_HOSTS = [host for host in hosts.HOSTS.values() if host.architecture is ARM64]
BANNER = (
    "Linux version 7.3.4+deb13-cloud-arm64 (x@y) (gcc (Debian 14.2.0-19) 14.2.0, GNU ld) "
    "#1 SMP PREEMPT Debian 7.3.4-1~bpo13+1 (2026-11-15)\n"
)


def arm_image(path: Path, banner: str = BANNER) -> Path:
    """What an arm64 kernel's first bytes are, and its first message further on."""
    path.write_bytes(bytes(0x38) + b"ARM\x64" + bytes(0x1000) + banner.encode() + bytes(0x100))
    return path


def x86_image(path: Path) -> Path:
    return bzimage(path, "6.12")


class ArmArchive(FakeApt):
    """Knows arm64 kernels beside others."""

    def package_names(self, pattern: str) -> list[str]:
        names = [f"linux-image-6.12.107+deb13-cloud-{name}" for name in ("arm64", "amd64")]
        parts = ("image", "binary", "modules")
        names += [f"linux-{part}-7.3.4+deb13-cloud-arm64" for part in parts]
        return [name for name in names if re.search(pattern, name)]


@pytest.fixture
def arm_packages(tmp_path: Path) -> Packages:
    return Packages(
        Cache(tmp_path / "cache"),
        Silent(),
        FakeApt(tmp_path / "apt"),
        architecture=ARM64,
        other_apt=ArmArchive(tmp_path / "other"),
    )


def qemu_words(host: hosts.Host, tmp_path: Path) -> list[str]:
    file = tmp_path / "f"
    file.touch()
    assets = Assets(host, Qemu(file), file, file, file, file, None, Cache(tmp_path))
    with closing(qemu.launch(Qemu(file), assets, LabOptions(), [Drive(file, True)], [])) as launch:
        return launch.command


@pytest.mark.parametrize("host", ARM_HOSTS, ids=lambda host: host.name)
def test_arm_machine_has_virtualization_and_the_processor_that_kvm_needs(
    host: hosts.Host, tmp_path: Path
) -> None:
    words = qemu_words(host, tmp_path)

    assert words[words.index("-machine") + 1] == "virt,virtualization=on,gic-version=3"
    assert words[words.index("-cpu") + 1] == "neoverse-n1"
    assert words[words.index("-smp") + 1] == "1"
    assert "console=ttyAMA0" in words[words.index("-append") + 1].split()


def test_only_the_pkvm_host_has_protected_kvm(tmp_path: Path) -> None:
    protected = [h for h in hosts.HOSTS.values() if "kvm-arm.mode=protected" in h.command_line]

    assert [host.name for host in protected] == ["pkvm"]
    words = qemu_words(protected[0], tmp_path)
    assert "kvm-arm.mode=protected" in words[words.index("-append") + 1].split()


def test_x86_machine_stays_what_it_is(tmp_path: Path) -> None:
    words = qemu_words(hosts.DEFAULT, tmp_path)

    assert words[words.index("-machine") + 1] == "pc"
    assert words[words.index("-cpu") + 1] == "EPYC,+svm"


def test_packages_of_the_machine_come_from_its_own_archive(arm_packages: Packages) -> None:
    kernel = arm_packages.debian_kernel("debian:7.3")
    arm_packages.busybox(None)

    here, other = arm_packages.apt, arm_packages.machine_apt
    assert isinstance(here, FakeApt) and isinstance(other, FakeApt)
    assert here.asked == []
    assert other.asked == [
        "linux-binary-7.3.4+deb13-cloud-arm64",
        "linux-modules-7.3.4+deb13-cloud-arm64",
        "busybox-static/trixie",
    ]
    assert "packages/linux-7.3-arm64/" in str(kernel.image)


def test_entries_of_two_architectures_never_have_one_name(
    arm_packages: Packages, tmp_path: Path
) -> None:
    ours = Packages(arm_packages.cache, Silent(), FakeApt(tmp_path / "apt"))

    assert arm_packages.busybox(None) != ours.busybox(None)
    assert arm_packages.debian_kernel("debian:6.12") != ours.debian_kernel("debian:6.12")
    assert len({a.suffix() for a in ARCHITECTURES}) == len(ARCHITECTURES)


def test_qemu_of_the_architecture_is_looked_for(
    arm_packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("qemu-system-x86_64", "qemu-system-aarch64"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert arm_packages.qemu(None).command() == [str(tmp_path / "qemu-system-aarch64")]


def test_host_kernel_by_file_asks_for_the_modules_that_this_machine_needs(
    arm_packages: Packages,
) -> None:
    with pytest.raises(UsageError, match=r"needed too, virtio_blk and overlay"):
        arm_packages.host_kernel("/boot/vmlinuz", None)


def test_apt_is_told_the_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    etc, tools = tmp_path / "etc", tmp_path / "tools"
    for folder in (etc, tools):
        folder.mkdir()
    (etc / "sources.list").write_text("deb copy:/archive bookworm main\n")
    for name in ("apt-get", "apt-cache", "apt-config", "dpkg-deb"):
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")

    Apt(tmp_path / "apt", etc=etc, architecture="arm64").package_names("x")

    lines = (tmp_path / "apt" / "etc" / "sources.list").read_text().splitlines()
    assert "deb [arch=arm64] copy:/archive trixie main" in lines
    settings = (tmp_path / "apt" / "apt.conf").read_text().splitlines()
    assert 'APT::Architecture "arm64";' in settings
    assert 'APT::Architectures { "arm64"; };' in settings


def test_kernel_of_another_architecture_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    x86 = bzimage(tmp_path / "x86", "6.12")
    arm = arm_image(tmp_path / "arm")
    (tmp_path / "text").write_text("no kernel")

    assert foreign_kernel(x86, ARM64) is AMD64
    assert foreign_kernel(arm, AMD64) is ARM64
    for path in (arm, tmp_path / "text", tmp_path / "absent"):
        assert foreign_kernel(path, ARM64) is None
    assert foreign_kernel(x86, AMD64) is None


@pytest.mark.parametrize(
    ("host", "make", "said"),
    [
        (
            "arm64",
            x86_image,
            "a kernel for x86, and --host arm64 is arm64",
        ),
        ("pkvm", x86_image, "use --host stock or sw-protected or experimental or bochs"),
        ("stock", arm_image, "a kernel for arm64, and --host stock is x86; use --host arm64 or"),
    ],
)
def test_guest_kernel_of_another_architecture_is_refused_before_anything_is_made(
    host: str,
    make: Callable[[Path], Path],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = make(tmp_path / "kernel")
    lab = Lab(LabOptions(host=host, cache=tmp_path / "cache", offline=True))
    monkeypatch.setattr(lab, "guest_initramfs", lambda kernel: Path("/i"))

    with pytest.raises(UsageError, match=said):
        lab.pyvmm_words(["--kernel", str(kernel)])


def test_kernel_for_protected_guests_is_refused_on_x86(tmp_path: Path) -> None:
    lab = Lab(LabOptions(cache=tmp_path))

    with pytest.raises(UsageError, match=r"--kernel pkvm-guest: an arm64 .* use --host arm64 or"):
        lab.pyvmm_words(["--kernel", "pkvm-guest"])


def test_qemu_inside_is_refused_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--lab-with-qemu: the pkvm host"):
        Lab(LabOptions(host="pkvm", with_qemu=True, cache=tmp_path))


@pytest.mark.parametrize(
    ("host", "words", "expected"),
    [
        ("pkvm", "", "--kernel pkvm-guest"),
        ("pkvm", "--private-mem --disk d", "--private-mem --disk d --kernel pkvm-guest"),
        ("pkvm", "run --cpus 2", "run --cpus 2 --kernel pkvm-guest"),
        ("pkvm", "--kernel debian:7.3", "--kernel debian:7.3"),
        ("pkvm", "--kernel payload --private-mem", "--private-mem"),
        ("pkvm", "--private-mem --kernel=payload", "--private-mem"),
        ("pkvm", "check --json", "check --json"),
        ("pkvm", "selftest", "selftest"),
        ("arm64", "--private-mem", "--private-mem"),
        ("stock", "--kernel payload", ""),
        ("stock", "--disk d", "--disk d"),
    ],
)
def test_run_without_a_kernel_gets_the_hosts_own(host: str, words: str, expected: str) -> None:
    assert with_kernel(words.split(), hosts.named(host)) == expected.split()


@pytest.mark.parametrize(
    ("host", "machine", "words"),
    [
        ("pkvm", "aarch64", ["--private-mem", "--kernel", "pkvm-guest"]),
        ("stock", "x86_64", ["--private-mem"]),
    ],
)
def test_words_are_checked_for_the_machine_that_runs_them(
    host: str, machine: str, words: list[str]
) -> None:
    class Seen(Exception):
        pass

    def check(arguments: list[str], architecture: str) -> None:
        raise Seen(arguments, architecture)

    with pytest.raises(Seen) as caught:
        run(["--host", host, "--private-mem"], check=check)

    assert caught.value.args == (words, machine)


def test_initramfs_of_a_kernel_with_kvm_built_in_loads_none(tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"[\0[[\0sh\0\0")
    write(tmp_path / "modules", "virtio_blk")

    host_initramfs(busybox, tmp_path / "modules", architecture=ARM64)
    with pytest.raises(HostError, match="kvm-amd"):
        host_initramfs(busybox, tmp_path / "modules", architecture=AMD64)


def test_job_waits_for_the_hosts_word_on_the_machines_serial_line(tmp_path: Path) -> None:
    surroundings = Surroundings({}, "/bin", "token", names=ARM64.devices)

    lay_out(Job(["true"], tmp_path), surroundings, tmp_path)

    assert "read -t 20 answer </dev/ttyAMA0" in (tmp_path / "run").read_text()


def test_commands_of_a_busybox_for_another_machine_are_read_from_it(tmp_path: Path) -> None:
    program = tmp_path / "busybox"
    program.write_bytes(b"\x7fELF\0x\0[\0[[\0ash\0busybox\0sh\0\0more\0sh\0\0")

    assert applets(program) == ["[", "[[", "ash", "sh"]

    program.write_bytes(b"\x7fELF and nothing else")
    with pytest.raises(HostError, match="no table of commands"):
        applets(program)


def test_version_of_an_arm_kernel_is_what_it_prints_first(tmp_path: Path) -> None:
    image = arm_image(tmp_path / "Image")

    assert kernel_release(image) == "7.3.4+deb13-cloud-arm64"
    assert debian_version(image) == "7.3.4-1~bpo13+1"
    assert kernel_release(arm_image(tmp_path / "other", "no banner")) is None
