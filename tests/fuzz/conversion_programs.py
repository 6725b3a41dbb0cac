"""Random conversion programs over pyvmm's transaction, on the model of KVM or on a real one.

    python -m tests.fuzz.conversion_programs [--kvm] [--count N] [--seed N] [--first N]
                                             [--only SCHEME/BACKING]

A program is made of the seed and its number alone, so that a run may be shared by processes
and gone on with later (`--first`).
Every answer, page state, word seen by guest or host and resident page is compared with the
reference model. Exit status 0 without a divergence, 1 with one, which is shortened and printed.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvm_bindings.x86_64 import System
from tests.fuzz.conversion_ops import Program, random_program
from tests.fuzz.conversion_worlds import World
from tests.support.fake_kvm import FakeKernel
from tests.support.fake_platform import FakePlatform
from vmm.arch import architecture
from vmm.conversion.matrix import SCHEMES, UNTOLD
from vmm.conversion.scheme import Scheme
from vmm.conversion.schemes.in_place import InPlaceScheme
from vmm.conversion.schemes.remap import Parking
from vmm.core.errors import HostError
from vmm.exits.run_loop import install_kick_handler
from vmm.selftest.entries import Combination, combinations
from vmm.selftest.platform import KvmPlatform, Platform

LENGTH = 24
PROGRESS = 50_000
"""A line each so many programs."""


class Cell(NamedTuple):
    """Where programs run."""

    platform: Platform
    combination: Combination

    @property
    def name(self) -> str:
        return str(self.combination)


class Divergence(NamedTuple):
    cell: str
    seed: int
    number: int
    lines: list[str]

    def __str__(self) -> str:
        head = f"seed {self.seed}, program {self.number} on {self.cell}:"
        return "\n  ".join([head, *self.lines])


def fake_cells() -> list[Cell]:
    """Every scheme and backing that the model of KVM has."""
    kernels = (FakeKernel.sw_protected(), FakeKernel.with_in_place())
    return _working([FakePlatform(kernel) for kernel in kernels])


def kvm_cells(system: System) -> list[Cell]:
    """Every scheme and backing that this host's KVM has."""
    return _working([_Impatient(architecture(), system)])


class _Impatient(KvmPlatform):
    """Who holds a page in a program lets go of it at a later step, so that waiting is of no use."""

    def scheme(self, name: str, parked: Parking) -> Scheme:
        if name == "in-place":
            return InPlaceScheme(patience=0.0, told=lambda words: None)
        return super().scheme(name, parked)


def _working(platforms: Sequence[Platform]) -> list[Cell]:
    """Each combination on the first platform that has it."""
    cells = []
    for combination in combinations([name for name in SCHEMES if name not in UNTOLD]):
        tried = (Cell(platform, combination) for platform in platforms)
        cells += list(itertools.islice(filter(_works, tried), 1))
    return cells


def _works(cell: Cell) -> bool:
    try:
        World(cell.platform, cell.combination).__exit__()
    except (HostError, OSError):
        return False
    return True


def program(seed: int, number: int) -> Program:
    return random_program(random.Random(f"{seed}/{number}"), LENGTH)


def run(cell: Cell, program: Program) -> tuple[list[str], str | None]:
    """What was seen at each step, and what was wrong with the last."""
    seen = []
    with World(cell.platform, cell.combination) as world:
        for op in program:
            try:
                seen.append(world.step(op))
            except Exception as error:
                return seen, f"{type(error).__name__}: {error}"
    return seen, None


def compare(cell: Cell, seed: int, number: int) -> Divergence | None:
    """Run one program; what went wrong, shortened."""
    whole = program(seed, number)
    if run(cell, whole)[1] is None:
        return None
    short = _shortened(cell, whole)
    seen, wrong = run(cell, short)
    lines = [f"{op} -> {word}" for op, word in zip(short, seen, strict=False)]
    return Divergence(cell.name, seed, number, [*lines, f"{short[len(seen)]} -> {wrong}"])


def _shortened(cell: Cell, program: Program) -> Program:
    for index in reversed(range(len(program))):
        without = program[:index] + program[index + 1 :]
        if run(cell, without)[1] is not None:
            program = without
    return program


def run_many(
    cells: list[Cell],
    seed: int,
    count: int,
    *,
    first: int = 0,
    told: Callable[[int], None] = lambda number: None,
) -> tuple[Counter[str], Divergence | None]:
    """`count` programs, each on the cell whose turn it is; how many each cell ran.

    `told` hears of each program's number before it runs.
    """
    ran: Counter[str] = Counter()
    for number in range(first, first + count):
        told(number)
        cell = cells[number % len(cells)]
        divergence = compare(cell, seed, number)
        ran[cell.name] += 1
        if divergence is not None:
            return ran, divergence
    return ran, None


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.conversion_programs")
    parser.add_argument("--kvm", action="store_true", help="on this host's KVM, not on the model")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--only", metavar="SCHEME/BACKING", help="in this cell alone")
    options = parser.parse_args(words)
    install_kick_handler()
    cells = kvm_cells(System()) if options.kvm else fake_cells()
    if options.only:
        cells = [cell for cell in cells if cell.name == options.only]
    if not cells:
        print("conversion programs: no such scheme and backing here", file=sys.stderr)
        return 3
    where = "this host's KVM" if options.kvm else "the model of KVM"
    print(f"conversion programs: seed {options.seed}, {options.count} on {where}", flush=True)
    started = time.monotonic()

    def told(number: int) -> None:
        if number % PROGRESS == 0 and number > options.first:
            print(f"  before program {number}: {time.monotonic() - started:.0f} s", flush=True)

    ran, divergence = run_many(cells, options.seed, options.count, first=options.first, told=told)
    for name, count in sorted(ran.items()):
        print(f"  {name}: {count}")
    if divergence is not None:
        print(f"DIVERGENCE: {divergence}")
        return 1
    print(f"no divergence in {ran.total()} programs, {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
