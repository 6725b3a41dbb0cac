"""Which packages are asked for, and what is said when they can't be had. No apt is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmm.core.errors import HostError, UsageError
from vmm.core.kernel_file import kernel_release, modules_beside
from vmm.lab.apt import Apt, PackagesUnavailable, newest
from vmm.lab.cache import Cache
from vmm.lab.machine import Lab
from vmm.lab.options import LabOptions
from vmm.lab.packages import Packages
from vmm.lab.progress import Silent

ARCHIVE = (
    "linux-image-6.1.0-50-cloud-amd64",
    "linux-image-6.12.94+deb13-cloud-amd64",
    "linux-image-6.12.107+deb13-cloud-amd64",
    "linux-image-7.3.4+deb13-cloud-amd64",
    "linux-binary-7.3.4+deb13-cloud-amd64",
    "linux-modules-7.3.4+deb13-cloud-amd64",
    "linux-image-7.3.4+deb13-amd64",
)


class FakeApt(Apt):
    """An archive of names; downloads make the files that the packages would hold."""

    __slots__ = ("asked",)

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    def package_names(self, pattern: str) -> list[str]:
        return [name for name in ARCHIVE if re.search(pattern, name)]

    def download(self, packages: Sequence[str], into: Path) -> None:
        self.asked += packages
        (into / "usr" / "bin").mkdir(parents=True)
        (into / "usr" / "bin" / "busybox").touch()
        (into / "boot").mkdir()
        (into / "boot" / "vmlinuz-1").touch()
        (into / "lib" / "modules" / "1").mkdir(parents=True)


@pytest.fixture
def packages(tmp_path: Path) -> Packages:
    return Packages(Cache(tmp_path / "cache"), Silent(), FakeApt(tmp_path / "apt"))


def asked(packages: Packages) -> list[str]:
    assert isinstance(packages.apt, FakeApt)
    return packages.apt.asked


def test_newest_compares_numbers_as_numbers() -> None:
    assert newest(["a-6.12.94-x", "a-6.12.107-x"]) == "a-6.12.107-x"
    assert newest([]) is None


def test_kernel_of_a_series_is_its_newest_and_no_other_series(packages: Packages) -> None:
    kernel = packages.debian_kernel("debian:6.12")

    assert asked(packages) == ["linux-image-6.12.107+deb13-cloud-amd64"]
    assert kernel.image.name == "vmlinuz-1"
    assert kernel.modules is not None and kernel.modules.name == "1"


def test_kernel_with_split_packages_takes_both_parts(packages: Packages) -> None:
    packages.host_kernel(None, None)

    assert asked(packages) == [
        "linux-binary-7.3.4+deb13-cloud-amd64",
        "linux-modules-7.3.4+deb13-cloud-amd64",
    ]


def test_kernel_in_the_cache_is_not_downloaded_again(packages: Packages) -> None:
    packages.debian_kernel("debian:6.1")
    packages.debian_kernel("debian:6.1")

    assert asked(packages) == ["linux-image-6.1.0-50-cloud-amd64"]


def test_kernel_series_that_is_absent_is_answered_with_those_there(packages: Packages) -> None:
    with pytest.raises(HostError, match=r"no cloud kernel 5\.10 .*6\.1, 6\.12, 7\.3"):
        packages.debian_kernel("debian:5.10")


def test_kernel_name_of_another_form_is_refused(packages: Packages) -> None:
    with pytest.raises(UsageError, match="debian:SERIES"):
        packages.debian_kernel("debian:trixie")


def test_host_kernel_by_file_needs_its_modules(packages: Packages) -> None:
    with pytest.raises(UsageError, match="--lab-host-modules DIR"):
        packages.host_kernel("/boot/vmlinuz", None)


def test_given_file_that_is_absent_is_named_with_its_option(packages: Packages) -> None:
    with pytest.raises(UsageError, match="--lab-busybox /nonexistent: no such file"):
        packages.busybox("/nonexistent")


def test_qemu_on_the_path_comes_before_a_download(
    packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "qemu-system-x86_64"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert packages.qemu(None).command() == [str(program)]


def test_offline_with_an_empty_cache_names_every_file_and_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    lab = Lab(LabOptions(cache=tmp_path, offline=True))

    with pytest.raises(HostError) as caught:
        lab.prepare()

    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message
    for option in ("--lab-qemu FILE", "--lab-busybox FILE", "--lab-host-kernel FILE", "offline"):
        assert option in message


def test_machine_without_apt_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")

    with pytest.raises(PackagesUnavailable, match=r"apt-get.* not found"):
        Apt(tmp_path).package_names("x")


def test_machine_with_other_sources_says_so(tmp_path: Path) -> None:
    with pytest.raises(PackagesUnavailable, match=f"no Debian archive .* {tmp_path}"):
        Apt(tmp_path / "state", etc=tmp_path).package_names("x")


def bzimage(path: Path, release: str) -> Path:
    """A setup header that names its release, and nothing else."""
    head = bytearray(0x1000)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x600).to_bytes(2, "little")
    text = f"{release} (someone) #1\0".encode()
    head[0x800 : 0x800 + len(text)] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head)
    return path


def test_modules_are_found_where_distributions_put_them(tmp_path: Path) -> None:
    image = bzimage(tmp_path / "boot" / "vmlinuz", "6.12.1-test")
    modules = tmp_path / "lib" / "modules" / "6.12.1-test"
    (modules / "kernel").mkdir(parents=True)

    assert modules_beside(image) == modules


def test_modules_of_another_release_are_not_taken(tmp_path: Path) -> None:
    image = bzimage(tmp_path / "boot" / "vmlinuz", "6.12.2-test")
    (tmp_path / "lib" / "modules" / "6.12.1-test" / "kernel").mkdir(parents=True)

    assert modules_beside(image) is None


def test_release_of_what_is_no_kernel_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")

    assert kernel_release(tmp_path / "text") is None
    assert kernel_release(tmp_path / "absent") is None
