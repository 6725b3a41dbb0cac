"""How the kernel for protected guests is compiled, with a small make and sources. No apt is run."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.lab.test_architecture import arm_image
from tests.unit.lab.test_kvm_build import Noted
from tests.unit.lab.test_packages import FakeApt
from vmm.core.errors import HostError
from vmm.lab import guest_kernel
from vmm.lab.apt import PackagesUnavailable
from vmm.lab.architecture import ARM64
from vmm.lab.built_kernels import BuiltKernels
from vmm.lab.cache import Cache
from vmm.lab.packages import Packages

VERSION = "7.3.4-1~bpo13+1"
# Configures by taking the wanted options as they are, compiles by copying a source.
GOOD_MAKE = """
while [ $# -gt 0 ]; do
    case "$1" in -C) cd "$2"; shift;; esac
    echo "$1" >>"$ARGUMENTS"
    last=$1
    shift
done
case "$last" in
    KCONFIG_ALLCONFIG=*) cp "${last#*=}" .config;;
    Image) echo "  CC      kernel/fork.o"; echo "  AS      arch/arm64/kernel/head.o"
           mkdir -p arch/arm64/boot; cp kernel/fork.c arch/arm64/boot/Image;;
esac
"""
FILES = ("kernel/fork.c", "drivers/gpu/a/b.c", "drivers/gpu/Kconfig", "init/m.c")


class Archive(FakeApt):
    """Gives compiler and sources: a make that is a script, an xz that unpacks nothing."""

    __slots__ = ("make",)

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.make = GOOD_MAKE

    def download_closure(self, packages: Sequence[str], suite: str, into: Path) -> None:
        self.asked += packages
        programs = into / "usr" / "bin"
        programs.mkdir(parents=True)
        for name, text in (("make", self.make), ("xz", 'exec cat "$3"\n')):
            (programs / name).write_text(f"#!/bin/sh\n{text}")
            (programs / name).chmod(0o755)

    def download(self, packages: Sequence[str], into: Path) -> None:
        self.asked += packages
        sources = into / "usr" / "src"
        sources.mkdir(parents=True)
        with tarfile.open(sources / "linux-source-7.3.tar.xz", "w") as archive:
            for file in FILES:
                member = tarfile.TarInfo(f"linux-source-7.3/{file}")
                member.size = len(file)
                archive.addfile(member, io.BytesIO(file.encode()))


class MachineArchive(FakeApt):
    """Gives the stock kernel, which says its version."""

    __slots__ = ()

    def package_names(self, pattern: str) -> list[str]:
        return ["linux-image-7.3.4+deb13-cloud-arm64"]

    def download(self, packages: Sequence[str], into: Path) -> None:
        into.mkdir(parents=True)
        arm_image(into / "vmlinuz")


Builder = Callable[[str], Path]


@pytest.fixture
def progress() -> Noted:
    return Noted()


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path / "apt")


@pytest.fixture
def packages(tmp_path: Path, progress: Noted, archive: Archive) -> Packages:
    other = MachineArchive(tmp_path / "other")
    cache = Cache(tmp_path / "cache")
    return Packages(cache, progress, archive, architecture=ARM64, other_apt=other)


@pytest.fixture
def build(packages: Packages, archive: Archive, tmp_path: Path) -> Builder:
    def with_make(make: str) -> Path:
        archive.make = make.replace("$ARGUMENTS", str(tmp_path / "arguments"))
        return BuiltKernels(packages, lambda: tmp_path / "cross").guest().image

    return with_make


def left_in_cache(tmp_path: Path) -> set[str]:
    return {p.name for p in (tmp_path / "cache" / "packages").iterdir()}


def test_kernel_is_compiled_once_and_nothing_else_is_kept(
    build: Builder, tmp_path: Path, progress: Noted, archive: Archive
) -> None:
    image = build(GOOD_MAKE)

    assert image.read_text() == "kernel/fork.c"
    assert {p.name for p in image.parent.iterdir()} == {"Image", "config"}
    assert left_in_cache(tmp_path) == {image.parent.name, "linux-7.3-arm64"}
    assert progress.told[-2:] == ["1 files of about 900, fork.o", "2 files of about 900, head.o"]
    assert f"linux-source-7.3={VERSION}" in archive.asked

    archive.asked.clear()
    assert build("exit 1") == image
    assert archive.asked == []


def test_entry_is_named_by_version_and_configuration(
    build: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(GOOD_MAKE)
    changed = tmp_path / "other.config"
    changed.write_text("CONFIG_FUSE_FS=y\n")
    kernel = guest_kernel.KERNEL
    more = replace(kernel, configurations=(*kernel.configurations, changed))
    monkeypatch.setattr(guest_kernel, "KERNEL", more)

    second = build(GOOD_MAKE)

    assert first.parent.name.startswith(f"pkvm-guest-{VERSION}-")
    assert second.parent.name.startswith(f"pkvm-guest-{VERSION}-")
    assert first != second


def test_make_is_told_architecture_compiler_and_configuration(
    build: Builder, tmp_path: Path
) -> None:
    build(GOOD_MAKE)

    words = (tmp_path / "arguments").read_text().splitlines()
    assert "ARCH=arm64" in words
    assert f"CROSS_COMPILE={tmp_path}/cross/usr/bin/aarch64-linux-gnu-" in words
    assert words.index("allnoconfig") < words.index("Image")


def test_sources_that_are_not_compiled_are_not_unpacked(build: Builder, tmp_path: Path) -> None:
    build(GOOD_MAKE.replace('cd "$2"', f'cd "$2"; find . >{tmp_path}/found'))

    found = (tmp_path / "found").read_text().splitlines()
    assert "./drivers/gpu/Kconfig" in found and "./init/m.c" in found
    assert "./drivers/gpu/a/b.c" not in found


def test_sources_without_a_needed_option_are_refused_before_compiling(
    build: Builder, tmp_path: Path
) -> None:
    make = GOOD_MAKE.replace('cp "${last#*=}" .config', 'grep -v PKVM "${last#*=}" >.config')

    with pytest.raises(HostError, match=r"doesn't take ARM_PKVM_GUEST of .*--kernel FILE"):
        build(make)

    assert "Image" not in (tmp_path / "arguments").read_text().splitlines()
    assert left_in_cache(tmp_path) == {"linux-7.3-arm64"}


def test_compilation_that_fails_is_one_line_and_leaves_nothing(
    build: Builder, tmp_path: Path
) -> None:
    with pytest.raises(HostError) as caught:
        build("echo 'fork.c:1:1: error: no such thing'; echo 'make: *** Error 2'; exit 2")

    assert "failed: fork.c:1:1: error: no such thing" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_in_cache(tmp_path) == {"linux-7.3-arm64"}


def test_version_that_left_the_archive_says_what_to_remove(
    build: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PackagesUnavailable("Version '7.3.4-1' was not found")

    monkeypatch.setattr(Archive, "download_closure", refuse)

    with pytest.raises(HostError, match=r"remove .*packages/linux-7\.3-arm64.*not found"):
        build(GOOD_MAKE)


def test_stock_kernel_without_a_version_says_what_to_remove(
    build: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unnamed(self: object, packages: Sequence[str], into: Path) -> None:
        into.mkdir(parents=True)
        arm_image(into / "vmlinuz", "none")

    monkeypatch.setattr(MachineArchive, "download", unnamed)

    with pytest.raises(HostError, match=r"which version it is; remove .*linux-7\.3-arm64"):
        build(GOOD_MAKE)
