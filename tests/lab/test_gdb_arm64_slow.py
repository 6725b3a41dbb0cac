"""arm64 guests under a debugger, which runs outside of the arm64 machine: gdb for all processors.

A minute and more to a stock kernel's shell under two layers of emulation; see test_arm64_slow.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import Starter
from tests.lab.programs import guest, program_words, result_of
from tests.lab.slow import slow
from tests.lab.test_arm64 import FIRST_SECONDS
from vmm.lab.machine import Lab
from vmm.lab.options import LabOptions
from vmm.lab.run import LabRun

pytestmark = [pytest.mark.timeout(FIRST_SECONDS), slow]
SECONDS = 400.0
STOCK = "debian:7.3"
SYMBOLS = ("ksys_sync", "wakeup_flusher_threads", "jiffies_64")


class Debugged:
    """A guest that has booted, and whose debugger is a gdb on this machine."""

    def __init__(self, start: Starter, folder: Path, host: str, kernel: str, *options: str) -> None:
        program = shutil.which("gdb-multiarch")
        if program is None:
            pytest.skip("no gdb for arm64: install Debian's package gdb-multiarch")
        self._program, self._path = program, folder / "gdb"
        files = guest(Lab(LabOptions(host=host)), kernel)
        words = program_words("debugged", *files, "outside", ",".join(SYMBOLS), *options)
        self._run: LabRun = start(words, program=True, host=host)
        told = json.loads(self._run.expect(b"\n", SECONDS))
        self.symbols: dict[str, int] = told["symbols"]
        self.probed: str = told["probed"]

    def gdb(self, *commands: str) -> str:
        """What gdb prints; its last command detaches it."""
        said = self._path.with_suffix(".said")
        words = [self._program, "-nx", "-batch"]
        for each in (
            "set pagination off", "set confirm off", "set architecture aarch64",
            "set remotetimeout 120", f"target remote {self._path}", *commands, "detach",
        ):  # fmt: skip
            words += ["-ex", each]
        with socket.socket(socket.AF_UNIX) as listener, said.open("wb") as output:
            listener.bind(str(self._path))
            listener.listen()
            listener.settimeout(60)
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            try:
                connection, _ = listener.accept()
                self._pass_on(connection, process)
            finally:
                process.kill()
                process.wait()
        return said.read_text()

    def _pass_on(self, connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
        """Between gdb and the program in the machine, until gdb has ended."""
        output = self._run.stdout
        self._run.feed_input_from(connection.fileno())
        with connection:
            while process.poll() is None and self._run.pump(0.05):
                data = bytes(output.data[output.read :])
                output.read += len(data)
                with contextlib.suppress(BrokenPipeError):  # it has said goodbye
                    connection.sendall(data)

    def report(self) -> dict[str, Any]:
        """The guest has ended well: what pyvmm's report says of its debugger."""
        return dict(result_of(self._run, SECONDS)["report"])


def test_stock_kernel_is_stopped_stepped_watched_and_goes_on(
    lab_start: Starter, tmp_path: Path
) -> None:
    made = Debugged(lab_start, tmp_path, "arm64", STOCK)
    sync, flush, jiffies = (made.symbols[name] for name in SYMBOLS)

    said = made.gdb(
        "monitor can",
        f"hbreak *{sync:#x}",
        "continue",
        *(["stepi", r'printf "at %#lx\n", $pc'] * 3),
        "x/1wx $pc",
        "delete",
        f"break *{flush:#x}",
        f"x/1wx {flush:#x}",
        "continue",
        f"x/1wx {flush:#x}",
        r'printf "at %#lx, returns to %#lx\n", $pc, $x30',
        "set $x1 = $x1 + 1",
        "set $x1 = $x1 - 1",
        "stepi",
        "delete",
        f"watch *(long *) {jiffies:#x}",
        "continue",
        "delete",
        "x/1wx 0x1000",
        "monitor why",
    )

    assert "lacks: nothing\nhardware breakpoints: 6, watchpoints: 4\n" in said
    assert made.probed == "2", "the guest's own breakpoint instructions are the guest's"
    assert f"Breakpoint 1, {sync:#x} in" in said
    steps = re.findall(r"^at (0x\w+)$", said, re.MULTILINE)
    assert [int(step, 16) for step in steps] == [sync + 4, sync + 8, sync + 12], said
    assert f"Breakpoint 2, {flush:#x} in" in said
    code = re.findall(rf"^{flush:#x}:\t(0x\w+)$", said, re.MULTILINE)
    assert code[0] == code[1] and code[0] not in ("0xd4200000", "0x00000000")
    caller = re.findall(rf"^at {flush:#x}, returns to (0x\w+)$", said, re.MULTILINE)
    assert sync < int(caller[0], 16) < sync + 0x200
    old, new = re.findall(r"^(?:Old|New) value = (\d+)$", said, re.MULTILINE)
    assert int(old) < int(new)
    assert "Cannot access memory at address 0x1000" in said
    assert "0x1000 is not mapped (level " in said
    report = made.report()
    assert report["stops"] >= 8 and report["refused"]["reads"] == 0


def test_private_kernel_is_stopped_and_not_seen_into(lab_start: Starter, tmp_path: Path) -> None:
    made = Debugged(lab_start, tmp_path, "arm64", STOCK, "--private-mem")
    sync = made.symbols["ksys_sync"]

    said = made.gdb(
        f"x/1i {sync:#x}",
        "monitor why",
        f"hbreak *{sync:#x}",
        "continue",
        "x/1i $pc",
        f"break *{sync + 4:#x}",
        "stepi",
        "info registers pc sp ttbr1_el1",
        "monitor states 0x40000000 0x10000000",
        "delete",
    )

    assert said.count(f"Cannot access memory at address {sync:#x}") == 2
    assert re.search(r"page tables are out of reach: GPA 0x\w+ is private", said), said
    assert f"Breakpoint 1, {sync:#x} in" in said
    assert re.search(r"^ttbr1_el1 +0x\w*[1-9a-f]", said, re.MULTILINE)
    assert re.search(r"^0x[0-9a-f]+ 0x[0-9a-f]+ shared$", said, re.MULTILINE)
    assert re.search(r"^0x[0-9a-f]+ 0x[0-9a-f]+ private$", said, re.MULTILINE)
    report = made.report()
    assert report["private_bytes"] == 0 and report["refused"]["reads"] >= 2


def test_protected_kernel_is_stopped_and_not_seen_into(lab_start: Starter, tmp_path: Path) -> None:
    made = Debugged(lab_start, tmp_path, "pkvm", STOCK, "--private-mem")
    sync = made.symbols["ksys_sync"]

    said = made.gdb(
        f"x/1i {sync:#x}",
        "monitor why",
        f"hbreak *{sync:#x}",
        "continue",
        "x/1i $pc",
        "info registers pc sp ttbr1_el1",
        "delete",
    )

    assert said.count(f"Cannot access memory at address {sync:#x}") == 2
    assert "page tables are out of reach" in said
    assert f"Breakpoint 1, {sync:#x} in" in said
    assert re.search(r"^ttbr1_el1 +0x\w*[1-9a-f]", said, re.MULTILINE)
    report = made.report()
    assert report["private_bytes"] == 0 and report["refused"]["reads"] >= 2
