"""`--balloon`: its size at the start, and a Unix socket to change it and to ask the guest.

One line is one request: `size 64M` is answered with `ok`, `stats` with one line of JSON (what the
guest says of its memory, and the balloon's `size`), anything else with `error: ...`.
"""

from __future__ import annotations

import contextlib
import json
import socket

from vmm.core.suboptions import Suboptions, byte_size, size_text, unit_hint
from vmm.core.unix_listener import UnixListener
from vmm.devices.virtio.balloon import PAGE, VirtioBalloon

SYNTAX = "[size=SIZE][,control=PATH]"
_LONGEST_LINE = 128


class SteeredBalloon(VirtioBalloon):
    """A balloon with a control socket; one client at a time, others wait their turn."""

    def __init__(self, pages: int, most_pages: int, listener: UnixListener) -> None:
        super().__init__(pages)
        self._most_pages = most_pages
        self._listener = listener
        self._client: socket.socket | None = None
        self._said = b""
        self.heard = self._answer_statistics

    def start(self) -> None:
        self._listen()

    def close(self) -> None:
        super().close()
        if self._client is not None:
            self._client.close()
        self._listener.close()

    def _listen(self) -> None:
        rest = self._listener.rest
        self.watch(self._listener.fd, self._called, readable=True, after=rest)

    def _called(self) -> None:
        client = self._listener.take()
        if client is None:
            self._listen()
            return
        self._client, self._said = client, b""
        self.watch(self._listener.fd, self._called)
        self.watch(client.fileno(), self._spoken_to, readable=True)

    def _spoken_to(self) -> None:
        client = self._client
        if client is None:
            return
        try:
            data = client.recv(_LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, self._said = (self._said + data).split(b"\n")
        for line in lines:
            self._obey(line.decode("ascii", "replace").split())
        if not data or len(self._said) > _LONGEST_LINE:
            self.watch(client.fileno(), self._spoken_to)
            client.close()
            self._client = None
            self._listen()

    def _obey(self, words: list[str]) -> None:
        if words == ["stats"]:
            self.ask()
            return
        size = byte_size(words[1]) if len(words) == 2 and words[0] == "size" else None
        if size is None:
            self._answer("error: say 'size 64M' or 'stats'")
        elif size % PAGE:
            self._answer(f"error: {size} bytes is not a multiple of {PAGE}{unit_hint(size)}")
        elif size // PAGE > self._most_pages:
            self._answer(f"error: the guest has {size_text(self._most_pages * PAGE)}")
        else:
            self.resize(size // PAGE)
            self._answer("ok")

    def _answer_statistics(self, values: dict[str, int]) -> None:
        self._answer(json.dumps({**values, "size": self.statistics.size}))

    def _answer(self, text: str) -> None:
        if self._client is not None:
            with contextlib.suppress(OSError):  # gone, or it doesn't read what it asked for
                self._client.send(text.encode() + b"\n", socket.MSG_NOSIGNAL)


def open_balloon(text: str, memory: int) -> VirtioBalloon:
    """The balloon that `--balloon TEXT` asks for in a guest of `memory` bytes. UsageError."""
    words = Suboptions("--balloon", text, SYNTAX)
    size = words.take_size("size") or 0
    control = words.take("control")
    words.finish()
    if size % PAGE:
        hint = unit_hint(size)
        raise words.error(f"size={size} bytes is not a multiple of {PAGE}{hint}")
    if size > memory:
        raise words.error(f"size={size_text(size)} is more than the guest's {size_text(memory)}")
    if control is None:
        return VirtioBalloon(size // PAGE)
    listener = UnixListener("--balloon control=", control)
    return SteeredBalloon(size // PAGE, memory // PAGE, listener)
