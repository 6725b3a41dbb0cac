"""An initramfs of ours for guests: one static program (firmware/init), modules, and no shell.

The program loads the modules in the order in which they lie there, mounts the root disk that the
kernel's command line names, and starts its init, or a command (see firmware/init/init.c).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vmm.core.cpio import CpioWriter
from vmm.core.kmodules import ModuleTree, without_signature

EXEC_WORD, SHARE_WORD = "pyvmm.exec", "pyvmm.share"
"""On the kernel's command line: run a command; unpack a folder for it first."""
_ALWAYS = ("virtio_pci", "virtio_blk")
# A system hears of its power button by the first two (SIGTERM to pyvmm presses it); systemd loads
# the third by name, and the root disk has no modules.
_OF_SYSTEMS = ("button", "evdev", "autofs4")
_OF_OPTIONS = {
    "--exec": "virtio_console",
    "--console": "virtio_console",
    "--net": "virtio_net",
    "--fs": "virtiofs",
    "--rng": "virtio_rng",
    "--balloon": "virtio_balloon",
    "--vsock": "vmw_vsock_virtio_transport",
    "--iommu": "virtio_iommu",
}


def modules_for(
    tree: Path | None, file_system: str | None, options: Iterable[str]
) -> list[tuple[str, bytes]]:
    """(name, content) of the modules that a guest with these of pyvmm's options needs, in order.

    `tree` is lib/modules/RELEASE of its kernel; without one, everything has to be built in. Those
    that aren't in the tree are built in.
    """
    if tree is None:
        return []
    given = set(options)
    devices = [name for option, name in _OF_OPTIONS.items() if option in given]
    # The IOMMU's first: other devices wait for it.
    devices.sort(key=lambda name: name != "virtio_iommu")
    wanted = [*_ALWAYS, *dict.fromkeys(devices)]
    if file_system is not None:
        wanted += [file_system, *(() if "--exec" in given else _OF_SYSTEMS)]
    return [(name, without_signature(data)) for name, data in ModuleTree(tree).in_order(wanted)]


def add_init(archive: CpioWriter, init: bytes, modules: Sequence[tuple[str, bytes]] | None) -> None:
    """Puts the program and its modules into an archive; None leaves those of an earlier one."""
    for folder in ("dev", "proc", "sys"):
        archive.directory(folder)
    archive.character_device("dev/console", 5, 1)
    archive.file("init", init, 0o755)
    if modules is not None:
        for name, content in modules:
            archive.file(f"modules/{name}.ko", content)
        order = "".join(f"{name}.ko\n" for name, _ in modules)
        archive.file("modules/order", order.encode())


def initramfs(init: bytes, modules: Sequence[tuple[str, bytes]] | None) -> bytes:
    """The whole archive; it may follow another one, whose /init it replaces."""
    archive = CpioWriter()
    add_init(archive, init, modules)
    return archive.finish()
