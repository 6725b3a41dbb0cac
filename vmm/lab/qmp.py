"""QEMU's monitor: commands and events as JSON, a line each (docs/interop/qmp-spec.rst of QEMU)."""

from __future__ import annotations

import json
import socket
from typing import Any

from vmm.core.errors import HostError

# Of QEMU's own work: an answer comes in milliseconds, a saved machine in seconds.
_SECONDS = 60.0


class Qmp:
    """One monitor. Everything raises HostError with QEMU's own words when it fails."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(_SECONDS)
        self._lines = connection.makefile("rb")
        self._events: list[dict[str, Any]] = []
        self._began = False

    def close(self) -> None:
        self._lines.close()
        self._connection.close()

    def do(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """What the command returns."""
        if not self._began:
            self._began = True
            self._read()  # the greeting
            self.do("qmp_capabilities")
        request = {"execute": command, "arguments": arguments or {}}
        try:
            self._connection.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise HostError(f"QEMU's monitor: {command}: {error.strerror or error}") from error
        while True:
            answer = self._read()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise HostError(f"QEMU refused {command}: {answer['error'].get('desc')}")
            self._events.append(answer)

    def await_event(self, name: str, **wanted: tuple[object, ...]) -> dict[str, Any]:
        """The data of the next event of that name whose fields are among those wanted."""
        while True:
            event = self._events.pop(0) if self._events else self._read()
            data: dict[str, Any] = event.get("data", {})
            fits = all(data.get(key) in values for key, values in wanted.items())
            if event.get("event") == name and fits:
                return data

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except OSError as error:
            raise HostError(f"QEMU's monitor doesn't answer: {error}") from error
        if not line:
            raise HostError("QEMU has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer
