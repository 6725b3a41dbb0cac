"""What pyvmm makes for a guest that boots from a disk or runs a command: words and an initramfs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import firmware
from tests.unit.core.test_kmodules import write
from tests.unit.core.test_root_disk import ROOT_X86, ext4, gpt, xfs
from vmm.boot.source import Source
from vmm.core.errors import UsageError
from vmm.machine.config import MachineConfig
from vmm.machine.own_init import complete

RELEASE = "7.3.4-mine"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A kernel's header, with its modules where distributions put them."""
    head = bytearray(0x1000)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x400).to_bytes(2, "little")
    head[0x600 : 0x600 + len(RELEASE)] = RELEASE.encode()
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot" / "vmlinuz").write_bytes(head)
    tree = tmp_path / "lib" / "modules" / RELEASE
    for name, needs in (("virtio_blk", ""), ("libcrc", ""), ("xfs", "libcrc"), ("virtio_net", "")):
        write(tree, name, needs)
    return tmp_path / "boot" / "vmlinuz"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(gpt((ROOT_X86, 1, "", xfs())))
    return path


class Made:
    """A configuration that is complete, and the names in its archive."""

    def __init__(self, config: MachineConfig) -> None:
        self.config, self.source = complete(config, "x86_64")
        self.content = self.source.read(0, self.source.size, "all")

    def has(self, name: str) -> bool:
        return f"{name}\0".encode() in self.content


@pytest.fixture
def made(kernel: Path) -> Iterator[list[Source]]:
    opened: list[Source] = []
    yield opened
    for source in opened:
        source.close()


def make(made: list[Source], kernel: Path, **options: object) -> Made:
    config = MachineConfig(kernel=str(kernel), **options)  # type: ignore[arg-type]
    result = Made(config)
    made.append(result.source)
    return result


def test_root_disk_gets_words_and_the_modules_that_it_needs(
    made: list[Source], kernel: Path, disk: Path
) -> None:
    result = make(made, kernel, root="", disks=(str(disk),), append="loglevel=7")

    assert result.config.append == "root=/dev/vda1 rootfstype=xfs rw loglevel=7"
    assert result.has("init") and result.has("modules/xfs.ko")
    assert b"virtio_blk.ko\nlibcrc.ko\nxfs.ko\n" in result.content
    assert not result.has("modules/virtio_net.ko")


def test_disk_that_is_read_only_is_mounted_so(made: list[Source], kernel: Path, disk: Path) -> None:
    result = make(made, kernel, root="", disks=(f"{disk},ro",))

    assert result.config.append == "root=/dev/vda1 rootfstype=xfs ro"


def test_command_is_announced_and_devices_have_their_drivers(
    made: list[Source], kernel: Path
) -> None:
    result = make(made, kernel, execute="true", share="d", nets=("tap=t",))

    assert result.config.append == "quiet pyvmm.exec pyvmm.share"
    assert result.has("modules/virtio_net.ko")
    assert Path(firmware.init_path()).read_bytes() in result.content


def test_initrd_of_the_users_keeps_its_files_behind_our_init(
    made: list[Source], kernel: Path, tmp_path: Path
) -> None:
    (tmp_path / "initrd").write_bytes(b"theirs!")

    result = make(made, kernel, execute="true", initrd=str(tmp_path / "initrd"))

    assert result.content.startswith(b"theirs!\0" + b"070701")
    assert b".ko\0" not in result.content


def test_initrd_of_the_users_finds_the_root_by_itself(
    made: list[Source], kernel: Path, disk: Path, tmp_path: Path
) -> None:
    (tmp_path / "initrd").write_bytes(b"theirs!")

    result = make(made, kernel, root="part=1", disks=(str(disk),), initrd=str(tmp_path / "initrd"))

    assert result.content == b"theirs!"
    assert result.config.append == "root=/dev/vda1 rootfstype=xfs rw"


def test_kernel_without_modules_beside_it_gets_an_init_alone(
    made: list[Source], tmp_path: Path
) -> None:
    (tmp_path / "other").write_bytes(b"kernel")
    (tmp_path / "disk").write_bytes(ext4().ljust(1 << 17, b"\0"))

    result = make(made, tmp_path / "other", root="", disks=(str(tmp_path / "disk"),))

    assert result.has("init") and b".ko\0" not in result.content


@pytest.mark.parametrize(
    ("root", "said"), [("UUID=12", "no disk has it"), ("part=9", "no such partition")]
)
def test_root_that_is_not_there_is_refused(root: str, said: str, kernel: Path, disk: Path) -> None:
    with pytest.raises(UsageError, match=said):
        complete(MachineConfig(kernel=str(kernel), root=root, disks=(str(disk),)), "x86_64")


def test_disk_that_can_not_be_read_is_refused(kernel: Path, tmp_path: Path) -> None:
    config = MachineConfig(kernel=str(kernel), root="", disks=(str(tmp_path / "absent"),))

    with pytest.raises(UsageError, match="cannot be read: No such file"):
        complete(config, "x86_64")
