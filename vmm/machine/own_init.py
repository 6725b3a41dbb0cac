"""What a guest needs to find its root disk, or to run a command: an initramfs of ours and words.

The disks are only read here, before the guest starts; they are opened for it elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from vmm._firmware import init_path
from vmm.boot.source import Source, open_source
from vmm.core.errors import HostError, UsageError
from vmm.core.guest_init import EXEC_WORD, SHARE_WORD, initramfs, modules_for
from vmm.core.kernel_file import modules_beside
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.root_disk import Root, find_root
from vmm.machine.config import VHOST_USER

if TYPE_CHECKING:
    from vmm.machine.config import MachineConfig

_QUIET = "quiet"
_PIECE = 1 << 20


def complete(config: MachineConfig, architecture: str) -> tuple[MachineConfig, Source]:
    """The configuration with the kernel's words for it, and the initramfs.

    With --initrd and --exec, our init goes in front of what is in that one; with --initrd and
    --root that one is taken as it is: it knows root=. Raises UsageError and HostError.
    """
    words = []
    root = None if config.root is None else _root(config)
    if root is not None:
        words.append(root.kernel_words())
    if config.execute is not None:
        # Nobody sees the console: what is printed there would only cost time.
        words += [_QUIET, EXEC_WORD]
        if config.share is not None:
            words.append(SHARE_WORD)
    config = config._replace(append=" ".join([*words, config.append]).strip())
    if config.initrd is not None and config.execute is None:
        return config, open_source(config.initrd, "initrd")
    try:
        with open(init_path(architecture), "rb") as file:
            init = file.read()
    except LookupError as error:
        raise HostError(str(error)) from error
    assert config.kernel is not None
    modules = None
    if config.initrd is None:
        tree = modules_beside(Path(config.kernel))
        kind = None if root is None else root.file_system.kind
        modules = modules_for(tree, kind, _options(config))
    fd = os.memfd_create("pyvmm initramfs", os.MFD_CLOEXEC)
    source = Source(fd, 0, "initrd made by pyvmm")
    try:
        with open(fd, "wb", closefd=False) as archive:
            if config.initrd is not None:
                with open_source(config.initrd, "initrd") as given:
                    _copy(given, archive.fileno())
            archive.write(initramfs(init, modules))
        source.size = os.fstat(fd).st_size
    except BaseException:
        source.close()
        raise
    return config, source


def _copy(given: Source, target: int) -> None:
    """The whole of it; what follows another archive has to begin at a multiple of four."""
    done = 0
    while done < given.size:
        piece = given.read(done, min(_PIECE, given.size - done), "the archive")
        os.write(target, piece)
        done += len(piece)
    os.write(target, bytes(-done % 4))


def _root(config: MachineConfig) -> Root:
    """Where the root file system is. Raises UsageError."""
    disks: list[tuple[str, int]] = []
    try:
        for spec in config.disks:
            name = spec.replace(",,", "\0").split(",")[0].replace("\0", ",")
            if name.startswith(VHOST_USER):
                name = os.devnull  # what it holds is its back end's to know
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            try:
                disks.append((name, os.open(name, flags)))
            except OSError as error:
                raise UsageError(f"--root {name} cannot be read: {error.strerror}") from error
        assert config.root is not None
        root = find_root(config.root, disks)
        return root._replace(read_only="ro" in config.disks[root.disk].split(",")[1:])
    finally:
        for _, fd in disks:
            os.close(fd)


def _options(config: MachineConfig) -> list[str]:
    """Those that come with a device, by their names on the command line."""
    there = {
        "--exec": config.execute,
        "--console": config.consoles,
        "--net": config.nets,
        "--fs": config.file_systems,
        "--rng": config.rng,
        "--balloon": config.balloon is not None,
        "--vsock": config.vsock,
        "--iommu": config.iommu,
    }
    return [option for option, value in there.items() if value]
