"""A random program as a small C program that shows the same without pyvmm.

    python -m tests.fuzz.emit_c DIR --seed N --number N [--vm-type N]

DIR gets `kvm_replay.h` and `program.c`: one line for each operation, with what the model of KVM
says should be seen; it exits with 1 where a kernel says something else. `kernel_programs --emit-c
DIR` writes the one that it found, shortened.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from kvm_bindings.x86_64 import System
from tests.fuzz import kernel_ops as ops
from tests.fuzz.kernel_worlds import AREA_GPA, World, model_of
from vmm.arch import architecture
from vmm.exits.run_loop import install_kick_handler
from vmm.selftest import emit_c
from vmm.selftest.platform import KvmPlatform


def c_program(vm_type: int, program: ops.Program, expected: Sequence[str]) -> str:
    """The text of program.c."""
    steps = [
        emit_c.Step(_call(op), _shortened(words))
        for op, words in zip(program, expected, strict=True)
    ]
    head = "Random operations on private memory, and what should be seen of them."
    return emit_c.c_program(head, (vm_type, AREA_GPA, ops.PAGES), steps)


def text_program(vm_type: int, program: ops.Program, expected: Sequence[str]) -> str:
    """The same for kvm_replay_many.c, which reads any number of them."""
    lines = [f"program {vm_type} {AREA_GPA:#x} {ops.PAGES}"]
    for op, words in zip(program, expected, strict=True):
        name, _, rest = _call(op).partition("(")
        numbers = rest.rstrip(")").replace(",", "")
        lines.append(f"{name} {numbers} | {_shortened(words)}")
    return "\n".join([*lines, ""])


def _shortened(words: str) -> str:
    """As the C program says it."""
    if words.startswith("mmio"):
        return "mmio"
    return words.partition(", size=")[0].replace("ENOTSUP", "EOPNOTSUPP")


def _call(op: ops.Op) -> str:
    """The call that does the same."""
    match op:
        case ops.CreateGuestMemfd(size, flags):
            return f"create_guest_memfd({size:#x}, {flags:#x})"
        case ops.SetSlot(number, gpa, size, hva, flags, gmem, offset, old):
            numbers = ", ".join(f"{n:#x}" for n in (number, gpa, size, hva, flags))
            return f"set_slot({numbers}, {gmem}, {offset:#x}, {int(old)})"
        case ops.SetAttributes(gpa, size, attributes):
            return f"set_attributes({gpa:#x}, {size:#x}, {attributes:#x})"
        case ops.ConvertInPlace(gmem, offset, size, attributes):
            return f"convert({gmem}, {offset:#x}, {size:#x}, {attributes:#x})"
        case ops.Fallocate(gmem, mode, offset, size):
            return f"gmem_fallocate({gmem}, {mode}, {offset:#x}, {size:#x})"
        case ops.GuestMemfdIo(gmem, "pread" | "load" as what, offset, _):
            return f"gmem_{what}({gmem}, {offset:#x})"
        case ops.GuestMemfdIo(gmem, "pwrite" | "store" as what, offset, word):
            return f"gmem_{what}({gmem}, {offset:#x}, {word:#x})"
        case ops.GuestMemfdIo(gmem, "map" | "resident" as what, _, _):
            return f"gmem_{what}({gmem})"
        case ops.CloseGuestMemfd(gmem):
            return f"gmem_close({gmem})"
        case ops.VmIo("pread", page, _):
            return f"vm_pread({page})"
        case ops.VmIo(_, page, word):
            return f"vm_pwrite({page}, {word:#x})"
        case ops.HostRead(page):
            return f"host_read({page})"
        case ops.HostWrite(page, word):
            return f"host_write({page}, {word:#x})"
        case ops.GuestRead(page):
            return f"guest_read({page})"
        case ops.GuestWrite(page, word):
            return f"guest_write({page}, {word:#x})"
    raise AssertionError(op)


def write(directory: Path, vm_type: int, program: ops.Program, expected: Sequence[str]) -> Path:
    """Leaves the C program and its header there; the program's path."""
    return emit_c.write(directory, "program", c_program(vm_type, program, expected))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.emit_c")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--vm-type", type=int, default=0)
    parser.add_argument("--length", type=int, default=24)
    options = parser.parse_args(words)
    install_kick_handler()
    program = ops.Generator(random.Random(f"{options.seed}/{options.number}")).program(
        options.length
    )
    with System() as system:
        model = model_of(KvmPlatform(architecture(), system))
    expected = World(model, options.vm_type).run(program)
    print(write(options.directory, options.vm_type, program, expected))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
