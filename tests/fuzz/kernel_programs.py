"""Random programs of ioctls and accesses, on the real kernel and on the model of it.

    python -m tests.fuzz.kernel_programs [--count N] [--seed N]

Every observation is compared; a divergence is shortened and printed. Exit status 0 without one.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

from kvm_bindings.x86_64 import System
from tests.fuzz import emit_c
from tests.fuzz.kernel_ops import Generator, Program
from tests.fuzz.kernel_worlds import World, model_of
from tests.support.fake_platform import FakePlatform
from vmm.arch import architecture
from vmm.exits.run_loop import install_kick_handler
from vmm.selftest.platform import KvmPlatform

LENGTH = 24


class Divergence(NamedTuple):
    """Where the kernel and the model of it disagree."""

    seed: int
    number: int
    vm_type: int
    program: Program
    kernel: list[str]
    model: list[str]

    def __str__(self) -> str:
        head = f"seed {self.seed}, program {self.number}, VM type {self.vm_type}:"
        rows = zip(self.program, self.kernel, self.model, strict=True)
        return "\n".join([head, *(f"  {_row(*row)}" for row in rows)])


def _row(op: object, kernel: str, model: str) -> str:
    return f"{op} -> {kernel}" + ("" if kernel == model else f"   BUT THE MODEL SAYS {model}")


class Comparison:
    """Runs programs on a kernel and on its model."""

    def __init__(self, system: System) -> None:
        self._kernel = KvmPlatform(architecture(), system)
        self._model: FakePlatform = model_of(self._kernel)
        self.vm_types = sorted(self._model.kernel.vm_types)

    def program(self, seed: int, number: int) -> tuple[int, Program]:
        """VM type and operations of program `number` of the run `seed`."""
        chance = random.Random(f"{seed}/{number}")
        return chance.choice(self.vm_types), Generator(chance).program(LENGTH)

    def compare(self, seed: int, number: int) -> Divergence | None:
        """Run one program on both; what differs, shortened."""
        vm_type, program = self.program(seed, number)
        if self._differs(vm_type, program):
            program = self._shortened(vm_type, program)
            return Divergence(seed, number, vm_type, program, *self._both(vm_type, program))
        return None

    def _both(self, vm_type: int, program: Program) -> tuple[list[str], list[str]]:
        kernel = World(self._kernel, vm_type).run(program)
        return kernel, World(self._model, vm_type).run(program)

    def _differs(self, vm_type: int, program: Program) -> bool:
        kernel, model = self._both(vm_type, program)
        return kernel != model

    def _shortened(self, vm_type: int, program: Program) -> Program:
        """Without the operations that the divergence doesn't need."""
        for index in reversed(range(len(program))):
            without = program[:index] + program[index + 1 :]
            if self._differs(vm_type, without):
                program = without
        return program


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kernel_programs")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--emit-c", metavar="DIR", type=Path, help="write a divergence as C, too")
    options = parser.parse_args(words)
    install_kick_handler()
    print(f"kernel programs: seed {options.seed}, {options.count} programs", flush=True)
    started = time.monotonic()
    with System() as system:
        comparison = Comparison(system)
        print(f"model: {comparison.vm_types} VM types", flush=True)
        for number in range(options.count):
            if number and number % 500 == 0:
                print(f"{number} programs, no divergence", flush=True)
            divergence = comparison.compare(options.seed, number)
            if divergence is not None:
                print(f"DIVERGENCE: {divergence}")
                if options.emit_c is not None:
                    found = divergence.vm_type, divergence.program, divergence.model
                    print(f"as C: {emit_c.write(options.emit_c, *found)}")
                return 1
    seconds = time.monotonic() - started
    print(f"kernel programs: {options.count} run, no divergence, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
