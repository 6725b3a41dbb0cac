"""A control socket that is served by a thread, over operations that note what they are told."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from tests.support.status import status
from vmm.control.control_socket import ControlSocket
from vmm.conversion.events import EventFeed
from vmm.core.errors import HostError
from vmm.core.event_loop import EventLoop
from vmm.core.events import FROM_HOST, NO_VCPU, ConversionRequest, Kind
from vmm.core.saved import NotSaved
from vmm.policy import Decision


class FakeOperations:
    """Notes what it is told; conversions answer `answer`."""

    def __init__(self) -> None:
        self.events: EventFeed | None = EventFeed()
        self.calls: list[object] = []
        self.answer = 0
        self.word: Decision | None = None  # of a policy, which the feed tells
        self.can_pause = True
        self.saved: dict[str, Any] = {}
        self.refuses_to_save = False
        self.pages = [[4096 * n, 4096, "private"] for n in range(3)]

    def status(self) -> Any:
        return status(exits=7)

    def dump_state(self) -> dict[str, Any]:
        return {"pages": self.pages}

    def pause(self) -> bool:
        self.calls.append("pause")
        return self.can_pause

    def resume(self) -> None:
        self.calls.append("resume")

    def quit(self) -> None:
        self.calls.append("quit")

    def dump(self, fd: int, *, private: bool = False) -> dict[str, Any]:
        self.calls.append("dump")
        return self.saved

    def snapshot(self, fd: int, private: int | None = None) -> dict[str, Any]:
        self.calls.append("snapshot")
        if self.refuses_to_save:
            raise NotSaved("not now")
        os.pwrite(fd, b"guest".ljust(4096, b"\0"), 4096)
        return self.saved

    def devices(self) -> dict[str, Any]:
        return {"blk0": {"pid": 7}, "blk1": None}

    def restart_device(self, name: str) -> None:
        if name == "blk1":
            raise LookupError("blk1 is in pyvmm's own process")
        if name == "blk2":
            raise HostError("no memory")
        self.calls.append(f"restart {name}")

    def convert(self, kind: Kind, gpa: int, size: int) -> int:
        self.calls.append((kind, gpa, size))
        if self.word is not None and self.events is not None:
            request = ConversionRequest(kind, gpa, size // 4096, NO_VCPU, FROM_HOST)
            self.events.answered(request, self.word, "Quota", self.answer, 0)
        return self.answer


class Server:
    """A control socket that is being served by a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = EventLoop()
        self.operations = FakeOperations()
        self.control = ControlSocket(str(path))
        self.control.serve(self.loop, self.operations)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()
        self._has_stopped = False
        self.connections: list[socket.socket] = []

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(10)
        connection.connect(str(self.path))
        self.connections.append(connection)
        return connection

    def ask(self, *lines: bytes) -> list[dict[str, Any]]:
        """Send lines on a new connection and end it; all that is answered."""
        with self.connect() as connection:
            connection.sendall(b"".join(lines))
            connection.shutdown(socket.SHUT_WR)
            return [json.loads(line) for line in connection.makefile("rb")]

    def stop(self) -> None:
        """Any number of times."""
        if self._has_stopped:
            return
        self._has_stopped = True
        self.loop.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()
        for connection in self.connections:
            connection.close()
        self.control.close()
        self.loop.close()


def line(command: str, **more: object) -> bytes:
    return json.dumps({"command": command, **more}).encode() + b"\n"
