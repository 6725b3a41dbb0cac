"""A disk that a guest in the lab reads, writes and leaves, seen from both sides."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from tests.lab.test_linux import Shell, ext4_image

_WRITTEN = 40 * 4096
_SECONDS = 60


class Ext4Disk:
    """An ext4 image with a file from here; the guest adds one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "disk.ext4"
        self._copy = folder / "copy"
        content = os.urandom(300_000 + 321)
        (folder / "root").mkdir()
        (folder / "root" / "from-host").write_bytes(content)
        self._from_host = hashlib.sha256(content).hexdigest()
        self._from_guest = ""
        ext4_image(self.path, folder / "root")

    def use(self, shell: Shell) -> None:
        """In the guest: reads what is there, writes, syncs, and reads back past the cache."""
        shell.type("mount -t ext4 /dev/vda /mnt")
        read = shell.type("sha256sum /mnt/from-host").split()[0]
        blocks = _WRITTEN // 4096
        shell.type(
            f"dd if=/dev/urandom of=/mnt/from-guest bs=4096 count={blocks} 2>/dev/null; sync"
        )
        shell.type("echo 3 >/proc/sys/vm/drop_caches")
        self._from_guest = shell.type("sha256sum /mnt/from-guest").split()[0]
        shell.type("umount /mnt")
        assert read == self._from_host

    def check(self) -> None:
        """Afterwards: the file system is whole, and what the guest wrote is here."""
        subprocess.run(
            ["e2fsck", "-fn", str(self.path)], check=True, timeout=_SECONDS, capture_output=True
        )
        subprocess.run(
            ["debugfs", "-R", f"dump from-guest {self._copy}", str(self.path)],
            check=True,
            timeout=_SECONDS,
            capture_output=True,
        )
        content = self._copy.read_bytes()
        assert len(content) == _WRITTEN
        assert hashlib.sha256(content).hexdigest() == self._from_guest
