"""Many random programs for a kernel elsewhere: what the model says of it, and C to ask it.

    python -m tests.fuzz.kernel_replay DIR [--count N] [--seed N]

DIR gets `programs`, as kernel_programs makes them for the lab's experimental host, and `replay`,
linked statically: `replay < programs` there carries them out and compares. No Python in between,
so that an emulated machine does many of them in a second.
"""

from __future__ import annotations

import argparse
import errno
import random
import subprocess
import sys
from pathlib import Path

from tests.fuzz import emit_c
from tests.fuzz.kernel_ops import Generator
from tests.fuzz.kernel_programs import LENGTH
from tests.fuzz.kernel_worlds import World
from tests.support.fake_kvm import FakeKernel, VmType
from tests.support.fake_platform import FakePlatform
from vmm.selftest.emit_c import RUNTIME


def experimental() -> FakeKernel:
    """The model of `pyvmm lab --host experimental`, as kernel_worlds.model_of finds it there."""
    return FakeKernel(
        {0: VmType(0, 3), 1: VmType(8, 3)},
        in_place=True,
        file_io=True,
        vm_io=True,
        keeps_content=True,
        binding_taken=errno.EEXIST,
    )


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kernel_replay")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args(words)
    options.directory.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}, {options.count} programs", flush=True)
    kernel = experimental()
    platform = FakePlatform(kernel)
    with open(options.directory / "programs", "w") as file:
        for number in range(options.count):
            chance = random.Random(f"{options.seed}/{number}")
            vm_type = chance.choice(sorted(kernel.vm_types))
            program = Generator(chance).program(LENGTH)
            expected = World(platform, vm_type).run(program)
            file.write(emit_c.text_program(vm_type, program, expected))
    source = Path(__file__).with_name("emitted") / "kvm_replay_many.c"
    target = options.directory / "replay"
    subprocess.run(
        ["cc", "-O1", "-static", f"-I{RUNTIME.parent}", "-o", str(target), str(source)], check=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
