"""Runs pyvmm in the lab, and is the host's programs that its guest talks to.

    python -m tests.support.lab_peers RESULTS SEED PYVMM'S OPTIONS...

What the options name is used if it is there: a tap interface tap0 (this side has 192.0.2.1), a
vsock at /tmp/v, a console at /tmp/c, a plain port at /tmp/p. On TCP and vsock, port 5000 takes
bytes until they end and answers with their SHA-256, port 5001 gives BLOB. The guest's vsock port
6000 is called until it answers. RESULTS is a JSON object of what was received: hashes, and the
console's text.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

BLOB_BYTES = 3 * (1 << 20) + 777
TAP, ADDRESS = "tap0", "192.0.2.1"
_RETRY_SECONDS = 0.2


def blob(seed: int) -> bytes:
    """What is given to the guest: the same on both sides of the lab's wall."""
    return random.Random(seed).randbytes(BLOB_BYTES)


class Peers:
    """Threads, one for each listener and connection; they end with the process."""

    def __init__(self, seed: int) -> None:
        self.blob = blob(seed)
        self.results: dict[str, str] = {}

    def start(self, work: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def listen(self, name: str, listener: socket.socket, gives: bool) -> None:
        while True:
            link, _ = listener.accept()
            self.start(self._serve, name, link, gives)

    def _serve(self, name: str, link: socket.socket, gives: bool) -> None:
        with link:
            if gives:
                link.sendall(self.blob)
                link.shutdown(socket.SHUT_WR)
                return
            digest = _digest_of(link)
            self.results[name] = digest
            link.sendall(digest.encode() + b"\n")

    def call_guest(self, path: str, port: int) -> None:
        """Until somebody listens there: give the blob, take what comes."""
        while True:
            with socket.socket(socket.AF_UNIX) as link:
                if _try_connect(link, path):
                    link.sendall(b"CONNECT %d\n" % port)
                    if link.recv(32).startswith(b"OK "):
                        sender = threading.Thread(target=self._give, args=(link,))
                        sender.start()
                        self.results["vsock from guest's port"] = _digest_of(link)
                        sender.join()
                        return
            time.sleep(_RETRY_SECONDS)

    def _give(self, link: socket.socket) -> None:
        link.sendall(self.blob)
        link.shutdown(socket.SHUT_WR)

    def use_port(self, path: str) -> None:
        """A plain console port: give the blob, take what comes until pyvmm ends."""
        with _connected(path) as link:
            self.start(link.sendall, self.blob)
            self.results["port"] = _digest_of(link)

    def read_console(self, path: str) -> None:
        with _connected(path) as link:
            text = b""
            while data := link.recv(4096):
                text += data
            self.results["console"] = text.decode(errors="replace")

    def bring_up_tap(self) -> None:
        while not os.path.exists(f"/sys/class/net/{TAP}"):
            time.sleep(_RETRY_SECONDS)
        subprocess.run(["ip", "addr", "add", f"{ADDRESS}/24", "dev", TAP], check=True)
        subprocess.run(["ip", "link", "set", TAP, "up"], check=True)


def _digest_of(link: socket.socket) -> str:
    digest = hashlib.sha256()
    while data := link.recv(1 << 16):
        digest.update(data)
    return digest.hexdigest()


def _try_connect(link: socket.socket, path: str) -> bool:
    try:
        link.connect(path)
    except OSError:
        return False
    return True


def _connected(path: str) -> socket.socket:
    while True:
        link = socket.socket(socket.AF_UNIX)
        if _try_connect(link, path):
            return link
        link.close()
        time.sleep(_RETRY_SECONDS)


def main(results: str, seed: str, *options: str) -> int:
    peers = Peers(int(seed))
    for port, gives in ((5000, False), (5001, True)):
        kind = "give" if gives else "take"
        peers.start(peers.listen, f"net {kind}", socket.create_server(("", port)), gives)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"/tmp/v_{port}")
        listener.listen()
        peers.start(peers.listen, f"vsock {kind}", listener, gives)
    peers.start(peers.bring_up_tap)
    peers.start(peers.call_guest, "/tmp/v", 6000)
    readers = [
        threading.Thread(target=peers.use_port, args=("/tmp/p",), daemon=True),
        threading.Thread(target=peers.read_console, args=("/tmp/c",), daemon=True),
    ]
    for reader in readers:
        reader.start()
    status = subprocess.call([sys.executable, "-sP", "/lab/project/pyvmm", *options])
    for reader in readers:
        reader.join(5)  # pyvmm's end is theirs
    Path(results).write_text(json.dumps(peers.results))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
