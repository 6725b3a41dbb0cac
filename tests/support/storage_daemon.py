"""qemu-storage-daemon with one disk, and a listener between it and pyvmm that sees all it gets."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from vmm.devices.vhost_user.messages import FLAG_REPLY, GET_CONFIG, HEADER

PROGRAM = "qemu-storage-daemon"


class StorageDaemon:
    """Serves `image` to who connects to `path`. It inherits the listening socket, so that nobody
    has to wait for it."""

    def __init__(self, image: Path, path: Path, queues: int = 1) -> None:
        if shutil.which(PROGRAM) is None:
            pytest.skip(f"{PROGRAM} is not installed (Debian's package qemu-system-common has it)")
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            self._process = subprocess.Popen(
                [
                    PROGRAM, "--blockdev", f"file,node-name=d,filename={image}", "--export",
                    f"vhost-user-blk,id=e,node-name=d,writable=on,num-queues={queues},"
                    f"addr.type=fd,addr.str={listener.fileno()}",
                ],
                pass_fds=[listener.fileno()],
            )  # fmt: skip

    def kill(self) -> None:
        """kill -9, any number of times."""
        self._process.kill()
        self._process.wait()


class Between:
    """Passes a front end's messages on to a back end and the answers back, and keeps the
    descriptors that come with them."""

    def __init__(self, path: Path, back_end: Path) -> None:
        self.fds: list[int] = []
        self.greeted = threading.Event()
        """Both have told each other what they have to before there is a guest."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._back_end = str(back_end)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            front, _ = self._listener.accept()
            back = socket.socket(socket.AF_UNIX)
            back.connect(self._back_end)
            answers = threading.Thread(target=self._pass, args=(back, front), daemon=True)
            answers.start()
            self._pass(front, back)
            back.shutdown(socket.SHUT_RDWR)
            answers.join()
            front.close()
            back.close()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                # Message by message: the descriptors are those of its first byte.
                header, fds, _, _ = socket.recv_fds(source, HEADER.size, 32)
                if not header:
                    return
                self.fds += fds
                request, flags, size = HEADER.unpack(header)
                payload = source.recv(size, socket.MSG_WAITALL) if size else b""
                socket.send_fds(target, [header + payload], fds)
                if request == GET_CONFIG and flags & FLAG_REPLY:
                    self.greeted.set()

    def memory(self) -> list[int]:
        """Those that are guest memory; eventfds have no such name."""
        return [fd for fd in self.fds if "/memfd:" in os.readlink(f"/proc/self/fd/{fd}")]

    def close(self) -> None:
        self._listener.close()
        self._thread.join(10)
        for fd in self.fds:
            os.close(fd)
