"""Modules of this folder that a test has run inside a lab machine, where the project is, too."""

from __future__ import annotations

import json
from typing import Any

from vmm.lab.machine import Lab
from vmm.lab.run import LabRun

KERNEL = "debian:6.12"
SECONDS = 560.0


def program_words(name: str, *words: object) -> list[str]:
    """What starts tests/lab/NAME.py with these words."""
    return ["python3", "-m", f"tests.lab.{name}", *map(str, words)]


def guest(lab: Lab, name: str = KERNEL) -> tuple[str, str]:
    """Kernel and initramfs."""
    kernel = lab.guest_kernel(name)
    return str(kernel.image), str(lab.guest_initramfs(kernel))


def result_of(run: LabRun, seconds: float = SECONDS) -> dict[str, Any]:
    """The line of JSON with which the program ends; fails for a program that fails."""
    assert run.wait(seconds) == 0, bytes(run.stderr.data).decode(errors="replace")
    result: dict[str, Any] = json.loads(bytes(run.stdout.data).splitlines()[-1])
    return result
