"""Runs inside a lab machine: a stock kernel under a debugger.

    python -m tests.lab.debugged KERNEL INITRD gdb SYMBOLS.PY GDB-FOLDER AS-FOLDER
    python -m tests.lab.debugged KERNEL INITRD rehearsal
    python -m tests.lab.debugged KERNEL INITRD outside SYMBOLS OPTIONS...

A line of JSON with what was seen goes to stdout; the test judges it. With `outside` the debugger is
a program out there: a line with the addresses of the symbols (a,b,c), then stdin and stdout are the
debugger's until it detaches.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.policies import Console
from tests.lab.inside import PYVMM, SECONDS, telling
from tests.support.gdb_client import GdbClient

GDB_LIMIT = 240.0
KPROBE = (
    "mount -t sysfs s /sys; mount -t tracefs t /sys/kernel/tracing; cd /sys/kernel/tracing; "
    "echo p:mine ksys_sync >kprobe_events; echo 1 >events/kprobes/mine/enable; sync; sync; "
    "echo probed $(grep -c mine: trace); echo 0 >events/kprobes/mine/enable; echo >kprobe_events; "
    "cd /"
)
"""A breakpoint instruction of the guest's own, met twice."""
SYMBOLS = ("ksys_sync", "panic_timeout", "sched_schedstats")


class Run:
    """One guest with its console and its debugger."""

    def __init__(self, words: list[str]) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.report = self.folder / "report"
        self.path = path = self.folder / "gdb"
        self.console = Console(
            [*PYVMM, *words, "--gdb", str(path), "--report", str(self.report)],
            self.folder / "stderr",
        )
        # The socket's file is there before anybody listens on it, and it is served later still.
        while "waits for a debugger" not in (told := (self.folder / "stderr").read_text()):
            assert self.console.process.poll() is None, told
            time.sleep(0.05)
        self.gdb = GdbClient.at(path)
        self.gdb._socket.settimeout(SECONDS)

    def prompt(self) -> str:
        text = self.console.expect_prompt(SECONDS)
        assert text is not None, (self.folder / "stderr").read_text()
        return text

    def command(self, words: str) -> str:
        """What the guest's shell prints; the guest runs."""
        self.console.type(words)
        return self.prompt()

    def interrupt(self) -> str:
        self.gdb.raw(b"\x03")
        return self.answer()

    def answer(self) -> str:
        return str(self.gdb.reply().decode())

    def ask(self, packet: str) -> str:
        return str(self.gdb.ask(packet.encode()).decode())

    def go(self) -> None:
        self.gdb.send(b"vCont;c")

    def rip(self) -> int:
        return int.from_bytes(bytes.fromhex(self.ask("p10")), "little")

    def end(self) -> dict[str, Any]:
        self.console.type("poweroff -f")
        assert self.console.end() == 0, (self.folder / "stderr").read_text()
        found: dict[str, Any] = json.loads(self.report.read_text())
        return found


def addresses(run: Run, symbols: Sequence[str] = SYMBOLS) -> dict[str, int]:
    wanted = "|".join(symbols)
    text = run.command(f"grep -E ' ({wanted})$' /proc/kallsyms")
    found = re.findall(rf"([0-9a-f]{{16}}) \w ({wanted})\b", text)
    return {name: int(address, 16) for address, name in found}


def with_gdb(run: Run, words: list[str]) -> dict[str, Any]:
    """As the page on debugging has it: the guest's own symbols for real gdb."""
    symbols, gdb, binutils = words
    run.ask("D")
    run.prompt()
    (run.folder / "kallsyms.txt").write_text(run.command("grep -E ' ksys_' /proc/kallsyms"))
    programs = run.folder / "bin"
    programs.mkdir()
    (programs / "as").symlink_to(f"{binutils}/run")
    subprocess.run(
        [sys.executable, symbols, "kallsyms.txt", "guest.o"],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        cwd=run.folder,
        check=True,
    )
    commands = [
        "set pagination off",
        "set architecture i386:x86-64",
        "symbol-file guest.o -o 0xffffffff80000000",
        f"target remote {run.path}",
        "monitor can",
        "x/4i &ksys_sync",
        "monitor why",
        "hbreak *&ksys_sync",
        "continue",
        "info symbol $rip",
        "x/i $rip",
        "stepi",
        "info symbol $rip",
        "monitor states 0 0x10000000",
        "detach",
    ]
    said = []
    with subprocess.Popen(
        [f"{gdb}/run", "-nx", "-batch", *(word for each in commands for word in ("-ex", each))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=run.folder,
        text=True,
    ) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(GDB_LIMIT, process.kill)
        watchdog.start()
        for line in process.stdout:
            said.append(line)
            if "Hardware assisted breakpoint" in line:
                # The guest stands still, and finds it when it goes on. What gdb prints then comes
                # out of its buffer too late to wait for.
                run.console.type("sync")
        watchdog.cancel()
    run.prompt()
    return {"said": "".join(said), "report": run.end()["gdb"]}


def rehearsal(run: Run) -> dict[str, Any]:
    """Private memory looked into, by packets that gdb wouldn't send in that order."""
    seen: dict[str, Any] = {}
    run.go()
    run.prompt()
    found = addresses(run)
    sync, watched = found["ksys_sync"], found["panic_timeout"]
    seen["stopped"] = run.interrupt()
    code = run.ask(f"m{sync:x},10")
    seen["code"] = code
    seen["software"] = run.ask(f"Z0,{sync:x},1")
    seen["does not show"] = run.ask(f"m{sync:x},10") == code
    seen["watch"] = run.ask(f"Z2,{watched:x},4")
    run.go()
    # Linux rewrites its own code with breakpoint instructions, which are its own business.
    patched = "for i in 1 0 1 0; do echo $i >/proc/sys/kernel/sched_schedstats; done; echo patched"
    seen["patched"] = "\npatched" in run.command(patched)
    run.console.type("echo 7 >/proc/sys/kernel/panic")
    seen["watched"] = run.answer()
    seen["value"] = run.ask(f"m{watched:x},4")
    run.go()
    run.prompt()
    run.console.type("sync")
    seen["hit"] = run.answer()
    seen["at"] = run.rip() == sync
    thread = re.findall(r"thread:(\w+)", seen["hit"])[0]
    run.ask(f"z0,{sync:x},1")
    seen["step"] = run.ask(f"vCont;s:{thread}")
    seen["stepped"] = run.rip() - sync
    run.ask("D")
    run.prompt()
    seen["report"] = run.end()["gdb"]
    return seen


def outside(run: Run, symbols: str) -> dict[str, Any]:
    """A debugger for which this machine has no program. Before, the guest boots with a breakpoint
    where it never is: then its own breakpoint instructions come to pyvmm as well."""
    run.ask("Z1,1000,1")
    run.go()
    run.prompt()
    probed = run.command(KPROBE).rpartition("probed ")[2].strip()
    run.interrupt()
    run.ask("D")
    first = {"symbols": addresses(run, symbols.split(",")), "probed": probed}
    print(json.dumps(first), flush=True)
    has_typed = False
    with socket.socket(socket.AF_UNIX) as stub:
        stub.connect(str(run.path))
        while True:
            inputs: list[Any] = [0, stub]
            ready, _, _ = select.select(inputs, [], [])
            if stub in ready:
                data = stub.recv(1 << 16)
                if not data:
                    break
                os.write(1, data)
            if 0 in ready:
                data = os.read(0, 1 << 16)
                if not data:
                    break
                if b"$Z1," in data and not has_typed:
                    has_typed = True
                    run.console.type("sync")  # the guest stands still, and finds it
                stub.sendall(data)
    print(flush=True)
    run.prompt()
    return {"report": run.end()["gdb"]}


def main(kernel: str, initrd: str, what: str, *words: str) -> None:
    more = ["--private-mem"]
    if what == "rehearsal":
        more += ["--gdb-sees-private", "--cpus", "2"]
    elif what == "outside":
        more = list(words[1:])
    common = ["--kernel", kernel, "--initrd", initrd, "--mem", "256M"]
    run = Run([*common, "--append", "quiet nokaslr", *more])
    with telling(run.folder / "stderr"):
        if what == "outside":
            seen = outside(run, words[0])
        else:
            seen = rehearsal(run) if what == "rehearsal" else with_gdb(run, list(words))
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
