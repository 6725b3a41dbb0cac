"""firmware/init, the first program of guests: run as process 1 of a namespace, not of a guest.

Its ports are pseudo-terminals, its kernel's command line a file.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
import tty
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import firmware
from firmware import build
from vmm.arch import architecture

_SECONDS = 30
_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child")
_PORTS = ("pyvmm.input", "pyvmm.output", "pyvmm.errors", "pyvmm.command")


class Init:
    """A root directory with /init, and the test's ends of its ports."""

    def __init__(self, root: Path, words: str) -> None:
        self.root = root
        self.ends: dict[str, int] = {}
        self.heard = dict.fromkeys(_PORTS, b"")
        self.process: subprocess.Popen[bytes] | None = None
        self._fds: list[int] = []
        folders = ["dev", "proc", "sys/class/virtio-ports", "mnt", "run", "tmp"]
        usual = ("usr", "bin", "lib", "lib64", "etc")
        system = [name for name in usual if Path("/", name).is_dir()]
        for name in (*folders, *system):
            (root / name).mkdir(parents=True)
        shutil.copy(firmware.init_path(architecture().name), root / "init")
        (root / "init").chmod(0o755)
        (root / "proc" / "cmdline").write_text(f"console=ttyS0 {words}\n")
        self._script = f"set -e\nmount --make-rprivate /\nmount --bind {root} {root}\n"
        for name in system:
            self._script += f"mount --rbind /{name} {root}/{name}\n"
        (root / "dev" / "null").touch()
        self._script += f"mount --bind /dev/null {root}/dev/null\n"
        for number, name in enumerate(_PORTS):
            self._add_port(number, name)

    def _add_port(self, number: int, name: str) -> None:
        ours, theirs = os.openpty()
        tty.setraw(theirs)
        self._fds += [ours, theirs]
        self.ends[name] = ours
        folder = self.root / "sys/class/virtio-ports" / f"vport0p{number}"
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        device = self.root / "dev" / folder.name
        device.touch()
        self._script += f"mount --bind {os.ttyname(theirs)} {device}\n"

    def start(self) -> None:
        enter = Path(__file__).parents[1] / "support" / "init_namespace.py"
        script = f"{self._script}exec {sys.executable} {enter} {self.root}\n"
        self.process = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", script], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def send(self, name: str, data: bytes) -> None:
        os.write(self.ends[name], data)

    def run(self, command: str) -> None:
        self.start()
        self.send("pyvmm.command", b"run %d\n" % len(command) + command.encode())

    def wait_for(self, name: str, wanted: bytes) -> None:
        """Until the port has said it; the others are read as well."""
        end = time.monotonic() + _SECONDS
        assert self.process is not None
        by_fd = {fd: port for port, fd in self.ends.items()}
        while wanted not in self.heard[name]:
            ready, _, _ = select.select(list(by_fd), [], [], 0.1)
            for fd in ready:
                self.heard[by_fd[fd]] += os.read(fd, 4096)
            assert time.monotonic() < end and (ready or self.process.poll() is None), self.heard

    def end(self) -> bytes:
        """What it has complained of."""
        assert self.process is not None
        return self.process.communicate(timeout=_SECONDS)[1]

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def init(tmp_path: Path) -> Iterator[Init]:
    _require_namespaces()
    with ExitStack() as stack:
        made = Init(tmp_path / "root", "quiet pyvmm.exec")
        stack.callback(made.close)
        yield made


def _require_namespaces() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not here")
    tried = subprocess.run([*_UNSHARE, "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"no user namespaces: {tried.stderr.decode().strip()}")


def test_command_has_its_streams_and_its_status_is_told(init: Init) -> None:
    init.run("read line; echo got $line; echo oops >&2; exit 7")
    init.send("pyvmm.input", b"typed\n")

    for name in ("pyvmm.output", "pyvmm.errors", "pyvmm.command"):
        init.wait_for(name, b"\n")

    assert init.heard["pyvmm.output"] == b"got typed\n"
    assert init.heard["pyvmm.errors"] == b"oops\n"
    assert init.heard["pyvmm.command"] == b"ended 7 10 5 0\n"


def test_end_of_a_command_that_a_signal_has_ended_is_a_shells(init: Init) -> None:
    init.run("kill -9 $$")

    init.wait_for("pyvmm.command", b"\n")

    assert init.heard["pyvmm.command"] == b"ended 137 0 0 0\n"


def test_signal_from_outside_reaches_the_command_and_its_children(init: Init) -> None:
    init.run("trap 'echo trapped; exit 5' TERM; echo ready; sleep 60 & wait")
    init.wait_for("pyvmm.output", b"ready\n")

    init.send("pyvmm.command", b"signal 15\n")

    init.wait_for("pyvmm.command", b"ended")
    assert init.heard["pyvmm.output"] == b"ready\ntrapped\n"
    assert init.heard["pyvmm.command"].startswith(b"ended 5 ")


def test_machine_ends_only_when_everything_was_taken(init: Init) -> None:
    init.run("echo out")
    init.wait_for("pyvmm.command", b"ended 0 4 0 0\n")
    assert init.process is not None and init.process.poll() is None

    init.send("pyvmm.command", b"taken\n")

    init.end()


def test_much_output_while_input_waits_does_not_get_stuck(init: Init) -> None:
    init.run("printf %0300000d 0; head -c 4000 | wc -c")
    init.send("pyvmm.input", b"x" * 4000)

    init.wait_for("pyvmm.command", b"ended 0 300005 0 0\n")
    init.wait_for("pyvmm.output", b"4000\n")
    assert init.heard["pyvmm.output"] == b"0" * 300_000 + b"4000\n"


def test_child_in_the_background_does_not_hold_the_end_up(init: Init) -> None:
    init.run("sleep 60 & echo done")

    init.wait_for("pyvmm.command", b"ended 0 5 0 0\n")


def test_command_that_is_no_program_has_the_shells_status(init: Init) -> None:
    init.run("no-such-program-anywhere")

    init.wait_for("pyvmm.command", b"\n")

    assert init.heard["pyvmm.command"].startswith(b"ended 127 0 ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", b"pyvmm-init: failed: the root disk has no /sbin/init that can be run, errno 2\n"),
        ("init=/nowhere", b"pyvmm-init: failed: the root disk has no /nowhere, errno 2\n"),
        ("init=/a init=/b", b"pyvmm-init: failed: the root disk has no /b, errno 2\n"),
        ('x="init=/a b"', b"pyvmm-init: failed: the root disk has no /sbin/init that"),
    ],
)
def test_root_without_an_init_is_told_on_the_console(
    tmp_path: Path, words: str, said: bytes
) -> None:
    _require_namespaces()
    made = Init(tmp_path / "root", words)
    try:
        made.start()
        assert said in made.end()
    finally:
        made.close()


def test_init_does_nothing_where_it_is_not_the_first_process(tmp_path: Path) -> None:
    program = tmp_path / "init"
    shutil.copy(firmware.init_path(architecture().name), program)
    program.chmod(0o755)

    result = subprocess.run([program], capture_output=True, check=False)

    assert result.returncode == 1 and b"first process" in result.stderr


@pytest.mark.parametrize("machine", build.TARGETS)
def test_committed_init_is_of_its_source(machine: str) -> None:
    assert build.init_digest().encode() in Path(firmware.init_path(machine)).read_bytes()


def test_init_of_another_source_is_found_out(tmp_path: Path) -> None:
    other = tmp_path / "init.c"
    other.write_bytes(build.INIT_SOURCE.read_bytes() + b"/* changed */\n")

    assert build.init_digest(other).encode() not in Path(firmware.init_path()).read_bytes()


def test_init_can_be_built_from_its_source() -> None:
    try:
        built = build.build_init(architecture().name)
    except build.BuildError as error:
        pytest.skip(str(error))

    assert built.startswith(b"\x7fELF") and build.init_digest().encode() in built
