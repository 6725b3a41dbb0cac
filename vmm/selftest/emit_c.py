"""What was done to KVM as a small C program that shows the same without pyvmm.

The program needs a C compiler and kvm_replay.h beside it: `cc -o program program.c`. It says of
each step what is seen, and ends with 1 where that isn't what is written there.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from vmm.core.lean_typing import NamedTuple

RUNTIME = Path(__file__).with_name("emitted") / "kvm_replay.h"


class Step(NamedTuple):
    """A call of kvm_replay.h's, and what is seen then."""

    call: str
    seen: str


def c_program(
    head: str, machine: tuple[int, int, int], steps: Sequence[Step], alias: int = 0
) -> str:
    """Its text. `machine`: VM type, the area's GPA, pages of start()'s memfd; `alias`: an address
    bit for which the guest has page tables."""
    comment = "\n".join(f" * {line}" for line in head.replace("*/", "* /").splitlines())
    lines = [f"/*\n{comment}\n */", '#include "kvm_replay.h"', "", "int main(void)", "{"]
    if alias:
        lines.append(f"\talias_bit = {alias:#x};")
    vm_type, area, pages = machine
    lines.append(f"\tstart({vm_type}, {area:#x}, {pages});")
    lines += [f'\tcheck("{step.call}", {step.call},\n\t      "{step.seen}");' for step in steps]
    return "\n".join([*lines, "\treturn failures != 0;", "}", ""])


def write(directory: Path, name: str, text: str) -> Path:
    """Leaves the program and its header there; the program's path. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(RUNTIME, directory / RUNTIME.name)
    path = directory / f"{name}.c"
    path.write_text(text)
    return path
