"""One run of a job in a lab machine, driven by its user: expect, send, wait, collect.

No threads: the caller that waits moves the bytes (see vmm.lab.streams).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from vmm.core.errors import GuestFailure, HostError
from vmm.lab import bochs, image, initramfs, qemu
from vmm.lab.crash import StaleInstruction, crash_error, first_lines
from vmm.lab.emulator import Assets, Launch
from vmm.lab.heartbeat import Heartbeat, MachineStandsStill
from vmm.lab.job import (
    FIXED_DRIVES,
    RESULTS_BYTES,
    Drive,
    Job,
    Surroundings,
    lay_out,
    unpack_results,
)
from vmm.lab.options import LabOptions
from vmm.lab.packages import Bochs
from vmm.lab.streams import EndMark, Pump
from vmm.lab.tied import tied

_READY = f"{initramfs.READY}\r\n".encode()
_RUNNING = b"pyvmm-lab: running"
_FINISHED = b"pyvmm-lab: finished"
_FAILED = b"pyvmm-lab: failed: "


@dataclass(slots=True)
class _Output:
    """What a stream has delivered, and how far `expect` has read it."""

    data: bytearray = field(default_factory=bytearray)
    read: int = 0

    def __call__(self, data: bytes) -> None:
        self.data += data


class LabRun:
    """One lab machine running one job. Close it, or use it as a context manager."""

    def __init__(
        self,
        assets: Assets,
        options: LabOptions,
        job: Job,
        terminal: tuple[int, int] | None = None,
    ) -> None:
        self.job = job
        self.is_terminal = terminal is not None
        self.running = False  # the machine has booted and the command was started
        self.stdout, self.stderr = _Output(), _Output()
        self.log = bytearray()
        self.folder = Path(tempfile.mkdtemp(prefix="pyvmm-lab-"))
        self._token = f"<end-of-output-{secrets.token_hex(16)}>"
        self._time_limit = options.time_limit
        self._acknowledged = False
        self._status: int | None = None
        self.heartbeat = Heartbeat(assets.host.silence)
        self._told = False
        try:
            self._boot(assets, options, terminal)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self._connect()
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- starting

    def _boot(self, assets: Assets, options: LabOptions, terminal: tuple[int, int] | None) -> None:
        self._results = self.folder / "results"
        with open(self._results, "wb") as file:
            file.truncate(RESULTS_BYTES)
        job_image = self._job_image(options, terminal, assets)
        names = ["serial", "console"] if terminal is not None else ["serial", "in", "out", "error"]
        fixed = [
            Drive(assets.root, True),
            Drive(assets.project, True),
            Drive(job_image, True),
            Drive(self._results, False),
        ]
        if assets.inner_qemu is not None:
            fixed.append(Drive(assets.inner_qemu, True))
        drives = [*fixed, *self.job.drives]
        self._start(_launch(assets, options, drives, names, self.folder))
        if self._launch.plugging is not None and self._launch.plugging.restores:
            try:
                self._launch.plugging.restore()
            except BaseException as error:
                self._end()
                if not isinstance(error, HostError):
                    raise
                # Whatever is wrong with the saved state: there is another way, a little longer.
                self._launch.plugging.saved.discard()
                self._start(_launch(assets, options, drives, names, self.folder, afresh=True))

    def _start(self, launch: Launch) -> None:
        self._launch = launch
        try:
            with open(self.folder / "output", "wb") as output:
                self._process = subprocess.Popen(
                    tied(launch.command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[theirs.fileno() for theirs in launch.inherited],
                    env={**_plain_environment(), **launch.environment},
                    start_new_session=True,  # the terminal's Ctrl-C is for the guest, or for us
                )
        finally:
            for theirs in launch.inherited:
                theirs.close()

    def _job_image(
        self, options: LabOptions, terminal: tuple[int, int] | None, assets: Assets
    ) -> Path:
        path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:/lab/bin"
        environment = {
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": "/lab/project:/lab/site",
            "TERM": os.environ.get("TERM", "vt100") if terminal is not None else "dumb",
            "PYVMM_IN_LAB": "1",
            "PYVMM_LAB_DISKS": " ".join(self.job.devices()),
            **options.environment,
        }
        stage = self.folder / "job"
        stage.mkdir()
        devices = assets.host.devices
        mount = devices.drive(FIXED_DRIVES) if assets.inner_qemu is not None else None
        surroundings = Surroundings(environment, path, self._token, terminal, mount, devices)
        lay_out(self.job, surroundings, stage)
        if isinstance(assets.emulator, Bochs):
            bochs.add_boot_files(assets, stage)
        job_image = self.folder / "job.ext4"
        image.make_ext4(stage, job_image)
        return job_image

    def _connect(self) -> None:
        self._streams = self._launch.streams
        mark = self._token.encode()
        self._streams["serial"].sink = self._on_serial
        if self.is_terminal:
            console = self._streams["console"]
            console.sink, console.mark = self.stdout, EndMark(mark)
            self.input = console
            self._marked = [console]
        else:
            out, error = self._streams["out"], self._streams["error"]
            out.sink, out.mark = self.stdout, EndMark(mark)
            error.sink, error.mark = self.stderr, EndMark(mark)
            self.input = self._streams["in"]
            self._marked = [out, error]
        self.output = self._marked[0]
        self.errors = self._marked[-1]
        self._process_fd = os.pidfd_open(self._process.pid)
        self._pump = Pump(list(self._streams.values()), self._process_fd)

    @property
    def process_id(self) -> int:
        """QEMU's."""
        return self._process.pid

    @property
    def is_restored(self) -> bool:
        """Whether the machine began from a saved state, and not by booting."""
        return self._launch.plugging is not None and self._launch.plugging.restores

    @property
    def saved_state(self) -> Path | None:
        """The file of the booted machine's state; None for one that boots each time."""
        return None if self._launch.plugging is None else self._launch.plugging.saved.path

    # -- driving

    def pump(self, timeout: float = 1.0) -> bool:
        """Moves bytes for up to `timeout` seconds; False once the machine has ended.

        Raises GuestFailure when the time limit is over or the machine stands still, HostError
        when it failed.
        """
        if self._pump.process_ended:
            return False
        if self._time_limit is not None:
            left = self._began + self._time_limit - time.monotonic()
            if left <= 0:
                raise GuestFailure(
                    f"the lab machine was ended after its time limit of {self._time_limit:g} s"
                    f"{'' if self.running else self._last_words()}"
                )
            timeout = min(timeout, left)
        self._pump.pump(timeout)
        self._answer()
        if self._pump.process_ended:
            self._pump.drain()
            self._process.wait()
        else:
            self._check_heartbeat()
        return not self._pump.process_ended

    def feed_input_from(self, fd: int) -> None:
        """The command's standard input comes from this descriptor."""
        self._pump.feed_from(fd, self.input)

    def send(self, data: bytes) -> None:
        """Types `data` on the console, or writes it to the command's standard input."""
        self._pump.send(self.input, data)

    def close_input(self) -> None:
        """The command's standard input ends after what was sent."""
        self._pump.close_sending(self.input)

    def send_signal(self, number: int) -> None:
        """Send the command a signal; its outputs and its status come back as at any other end."""
        name = signal.Signals(number).name.removeprefix("SIG")
        self._pump.send(self._streams["serial"], f"{name}\n".encode())

    def expect(self, wanted: bytes, timeout: float) -> bytes:
        """Waits for `wanted` in the output; returns all up to and including it.

        What was returned is not looked at again. Raises TimeoutError showing the output's end.
        """
        end = time.monotonic() + timeout
        output = self.stdout
        searched = output.read
        while True:
            at = output.data.find(wanted, max(output.read, searched - len(wanted)))
            if at >= 0:
                found = bytes(output.data[output.read : at + len(wanted)])
                output.read = at + len(wanted)
                return found
            searched = len(output.data)
            left = end - time.monotonic()
            alive = left > 0 and self.pump(min(left, 1.0))
            if not alive and len(output.data) == searched:
                crash = self._crash() if left > 0 else None
                if isinstance(crash, StaleInstruction):
                    raise crash
                reason = "the machine ended" if left > 0 else f"{timeout:g} s have passed"
                tail = bytes(output.data[max(output.read, searched - 2000) :])
                raise TimeoutError(
                    f"{wanted!r} was not seen, {reason}; the output ends with {tail!r}; "
                    f"standard error with {bytes(self.stderr.data[-1000:])!r}{self._last_words()}"
                )

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end; brings the outputs back; the command's exit status."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.pump(1.0):
            if end is not None and time.monotonic() > end:
                raise TimeoutError(f"the lab machine still runs after {timeout:g} s")
        if self._status is None:
            results = unpack_results(self._results, self.job.outputs)
            if results.status is None:
                crash = self._crash()
                if crash is not None:
                    raise crash
                raise HostError(
                    "the lab machine ended before the command did"
                    f"{self._emulators_words() or self._last_words()}"
                )
            self._status = results.status
            if self.job.share is not None:
                self.job.share.take_back()
        return self._status

    def collect(self, name: str | Path) -> bytes:
        """The content of a file that came back, as it lies here now."""
        return Path(os.path.normpath(self.job.directory / name)).read_bytes()

    def close(self) -> None:
        """Ends QEMU if it still runs, by its process id, and removes what the run has left."""
        self._pump.close()
        self._end()
        with contextlib.suppress(OSError):
            os.close(self._process_fd)
        self._process_fd = -1
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.job.share is not None:
            shutil.rmtree(self.job.share.scratch, ignore_errors=True)

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(3)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._launch.close()

    # -- the machine's own words

    def _on_serial(self, data: bytes) -> None:
        self.log += data
        self.heartbeat.take_from(self.log, len(data))
        self.running = self.running or _RUNNING in self.log
        at = self.log.find(_FAILED)
        if at >= 0 and b"\n" in self.log[at:]:
            line = self.log[at + len(_FAILED) :].split(b"\n", 1)[0].strip()
            raise HostError(f"the lab machine failed: {line.decode(errors='replace')}")

    def _check_heartbeat(self) -> None:
        try:
            self.heartbeat.check()
        except MachineStandsStill as error:
            raise MachineStandsStill(f"{error}{self._last_words()}") from None

    def _answer(self) -> None:
        """What the machine waits for: its drives, and at the end that its output was read."""
        plugging = self._launch.plugging
        if not self._told and (self.is_restored or _READY in self.log):
            self._told = True
            if plugging is not None:
                plugging.plug()
            # The time, and noise for its random numbers.
            words = f"{time.time():.0f} {secrets.token_hex(32)}\n"
            self._pump.send(self._streams["serial"], words.encode())
        complete = all(s.mark is not None and s.mark.complete for s in self._marked)
        if complete and not self._acknowledged and _FINISHED in self.log:
            self._acknowledged = True
            self._pump.send(self._streams["serial"], b"read\n")

    def _crash(self) -> GuestFailure | None:
        crash = first_lines(bytes(self.log))
        return None if crash is None else crash_error(crash)

    def _last_words(self) -> str:
        lines = self.log.decode(errors="replace").split("\n")
        text = " | ".join(line.strip() for line in lines if line.strip())
        if text:
            return f"; its kernel's last messages: {text[-600:]}"
        status = self._process.poll()
        return self._emulators_words() or (f"; it ended with status {status}" if status else "")

    def _emulators_words(self) -> str:
        """Of an emulator that gave up; those of one that still runs or ended well say nothing."""
        if not self._process.poll():
            return ""
        complaint = self._launch.complaint((self.folder / "output").read_text(errors="replace"))
        return f"; {complaint}" if complaint is not None else ""


def _launch(
    assets: Assets,
    options: LabOptions,
    drives: Sequence[Drive],
    streams: list[str],
    folder: Path,
    *,
    afresh: bool = False,
) -> Launch:
    if isinstance(assets.emulator, Bochs):
        return bochs.launch(assets.emulator, options, drives, streams, folder)
    afresh = afresh or options.fresh
    return qemu.launch(assets.emulator, assets, options, drives, streams, afresh=afresh)


def _plain_environment() -> dict[str, str]:
    """Ours without what would change how QEMU or its loader work."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("LD_", "QEMU_"))}


def ended_by(signal_number: int) -> int:
    """The exit status of a command that a signal ended, as shells have it."""
    return 128 + signal.Signals(signal_number)
