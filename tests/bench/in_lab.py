"""What benchmarks in the lab share: a script's inner half run there, and a guest at its prompt."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PROMPT = b"/ # "


def run_in_lab(
    module: str,
    kernel_name: str,
    *words: object,
    with_qemu: bool = False,
    cpus: int | None = None,
    host: str = "stock",
) -> dict[str, Any]:
    """`python -m module --inner KERNEL INITRD WORDS...` in a lab machine of its own, `host`.

    `cpus` are its processors: 1 for guests with several vCPUs (vmm.lab.machine says why).
    Its stderr is passed on; its last line of output, JSON, is the result. SystemExit if it fails.
    """
    from vmm.lab.interpreter import executable
    from vmm.lab.machine import Lab
    from vmm.lab.options import LabOptions
    from vmm.lab.progress import Reporter

    lab = Lab(LabOptions(host=host, with_qemu=with_qemu, cpus=cpus), Reporter())
    kernel = lab.guest_kernel(kernel_name)
    command = [str(executable()), "-m", module, "--inner", str(kernel.image)]
    command += [str(lab.guest_initramfs(kernel)), *map(str, words)]
    with lab.start(command, program=True) as run:
        run.errors.sink = lambda data: print(data.decode(), end="", file=sys.stderr, flush=True)
        status = run.wait()
        output = bytes(run.stdout.data).decode()
    if status:
        raise SystemExit(f"the lab's command ended with status {status}:\n{output}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


@dataclass
class Guest:
    """A VMM's process, and how many characters its guest had printed at the prompt."""

    pid: int
    characters: int


@contextmanager
def at_prompt(
    words: list[str], limit: float, ending: signal.Signals = signal.SIGTERM
) -> Iterator[Guest]:
    """The VMM that `words` start, once its guest shows the shell's prompt.

    SystemExit when that takes longer than `limit` seconds. The process is sent `ending` afterwards.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    seen, characters = b"", 0
    try:
        while PROMPT not in seen:
            left = limit - (time.monotonic() - started)
            ready, _, _ = select.select([process.stdout], [], [], max(left, 0))
            data = os.read(process.stdout.fileno(), 65536) if ready else b""
            if not data:
                raise SystemExit(f"{words[0]} did not boot to a prompt:\n{seen.decode()}")
            seen = seen[-4096:] + data
            characters += len(data)
        yield Guest(process.pid, characters)
    finally:
        process.send_signal(ending)
        process.wait(30)
