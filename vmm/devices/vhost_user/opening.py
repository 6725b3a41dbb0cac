"""What `--disk vhost-user=SOCKET` and `--fs TAG,vhost-user=SOCKET` connect to."""

from __future__ import annotations

import os
import socket
import stat

from vmm.core.errors import UsageError
from vmm.core.suboptions import Suboptions
from vmm.devices.vhost_user.block import VhostUserBlock
from vmm.devices.vhost_user.channel import BackEndError
from vmm.devices.vhost_user.device import MOST_QUEUES
from vmm.devices.vhost_user.file_system import TAG_BYTES, VhostUserFs

DISK_SYNTAX = "vhost-user=SOCKET[,queues=N]"
FS_SYNTAX = "TAG,vhost-user=SOCKET"

_START_DISK = (
    "qemu-storage-daemon --blockdev file,node-name=d,filename=IMAGE --export "
    "vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={path}"
)
_START_FS = "virtiofsd --socket-path={path} --shared-dir DIR"


def is_vhost_user(spec: str) -> bool:
    """Whether a disk's settings name a socket of a back end's."""
    return spec.startswith("vhost-user=")


def open_disk(spec: str, name: str) -> VhostUserBlock:
    """Connect to the back end of `--disk SPEC`, the device `name`. Raises UsageError."""
    words = Suboptions("--disk", spec, DISK_SYNTAX)
    path = words.take("vhost-user")
    queues = words.take_number("queues", 1, MOST_QUEUES) or 1
    words.finish()
    assert path is not None
    _require_socket(f"--disk vhost-user={path}", path, _START_DISK)
    try:
        return VhostUserBlock(name, path, lambda: connect(path), queues)
    except BackEndError as error:
        raise _unusable(f"--disk vhost-user={path}", path, error, _START_DISK) from error


def open_fs(spec: str, name: str) -> VhostUserFs:
    """Connect to the back end of `--fs SPEC`, the device `name`. Raises UsageError."""
    words = Suboptions("--fs", spec, FS_SYNTAX)
    tag = words.first("file system")
    path = words.take("vhost-user")
    words.finish()
    encoded = os.fsencode(tag)
    if len(encoded) > TAG_BYTES:
        raise words.error(f"the tag has {len(encoded)} bytes, {TAG_BYTES} at most fit")
    if path is None:
        raise words.error("it names no socket")
    option = f"--fs {tag},vhost-user={path}"
    _require_socket(option, path, _START_FS)
    try:
        return VhostUserFs(name, path, lambda: connect(path), encoded)
    except BackEndError as error:
        raise _unusable(option, path, error, _START_FS) from error


def connect(path: str, unconnected: socket.socket | None = None) -> socket.socket:
    """A connection to the socket at `path`, by a new socket or by one that is there. Raises
    OSError."""
    flags = socket.SOCK_STREAM | socket.SOCK_CLOEXEC
    connection = unconnected or socket.socket(socket.AF_UNIX, flags)
    try:
        connection.setblocking(False)  # one whose queue is full is not waited for
        connection.connect(path)
    except OSError:
        if unconnected is None:
            connection.close()
        raise
    return connection


def _require_socket(option: str, path: str, start: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"{option}: {reason}; start the back end first: {start.format(path=path)}"
        ) from error
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{option} is not a socket; name the one that the back end listens on")


def _unusable(option: str, path: str, error: BackEndError, start: str) -> UsageError:
    return UsageError(
        f"{option}: no back end that can be used: {error}; it is started so: "
        f"{start.format(path=path)}"
    )
