"""Random hypercalls, made by a guest on the real kernel and by one on the model.

    python -m tests.fuzz.hypercall_programs [--count N] [--seed N]

KVM answers some itself and hands the rest to user space: which, with what arguments, and what the
guest reads in RAX is compared. Exit status 3 where this host's hypercalls never return.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import deque
from typing import NamedTuple

from kvm_bindings.exits import HltExit, HypercallExit
from kvm_bindings.x86_64 import System
from kvm_bindings.x86_64 import ioctls as x86
from tests.support.fake_kvm import FakeSystem
from tests.support.fake_kvm.vcpu import Hypercall
from vmm.arch.x86_64.cpuid import is_amd
from vmm.arch.x86_64.doorbells import KVM_HC_MAP_GPA_RANGE
from vmm.arch.x86_64.micro_guest import OUT_DONE, MicroGuest
from vmm.arch.x86_64.probes.cpu import is_done
from vmm.arch.x86_64.probes.hypercall import hypercall_behaviour
from vmm.core.ranges import PAGE_SIZE

_U64 = (1 << 64) - 1
_EXITS = 1 << KVM_HC_MAP_GPA_RANGE


class Call(NamedTuple):
    """RAX, RBX, RCX, RDX, RSI, and what user space answers if it is asked."""

    number: int
    args: tuple[int, int, int, int]
    answer: int


def random_call(chance: random.Random) -> Call:
    edges = [0, 1, 2, 512, PAGE_SIZE, 1 << 20, 1 << 51, 1 << 52, (1 << 52) - 1, 1 << 63, _U64,
             _U64 - PAGE_SIZE + 1]  # fmt: skip

    def number() -> int:
        value = chance.choice(edges) if chance.random() < 0.6 else chance.getrandbits(64)
        return value & -PAGE_SIZE if chance.random() < 0.4 else value

    called = KVM_HC_MAP_GPA_RANGE if chance.random() < 0.8 else chance.choice((0, 77, 200, 1 << 40))
    answer = chance.choice((0, -22, -13, 5)) & _U64
    return Call(called, (number(), number(), chance.choice((0, 16, 17, number())), 0), answer)


class Kernel:
    """The real one. A context manager."""

    def __init__(self, system: System) -> None:
        call = b"\x0f\x01\xd9" if is_amd(system.supported_cpuid()) else b"\x0f\x01\xc1"
        self._guest = MicroGuest(system, call + OUT_DONE, "kernel")
        self._guest.vm.enable_cap(x86.KVM_CAP_EXIT_HYPERCALL, _EXITS)
        self._start = self._guest.vcpu.get_regs()

    def make(self, call: Call) -> str:
        names = ("rbx", "rcx", "rdx", "rsi")
        vcpu = self._guest.vcpu
        named = dict(zip(names, call.args, strict=True))
        vcpu.set_regs({**self._start, **named, "rax": call.number})
        exit = self._guest.run()
        seen = ""
        if isinstance(exit, HypercallExit):
            seen = f"exit {exit.number} {[hex(a) for a in exit.args[:4]]}, "
            vcpu.answer_hypercall(call.answer)
            exit = self._guest.run()
        assert is_done(exit), exit
        return f"{seen}rax {vcpu.get_regs()['rax']:#x}"

    def close(self) -> None:
        self._guest.close()


class Model:
    """The model of it."""

    def __init__(self) -> None:
        self._system = FakeSystem()
        vm = self._system.create_vm()
        vm.enable_cap(x86.KVM_CAP_EXIT_HYPERCALL, _EXITS)
        self._vcpu = vm.create_vcpu(0)

    def make(self, call: Call) -> str:
        vcpu = self._vcpu
        vcpu.script = deque([Hypercall(call.number, call.args)])
        exit = vcpu.run()
        seen = ""
        if isinstance(exit, HypercallExit):
            seen = f"exit {exit.number} {[hex(a) for a in exit.args[:4]]}, "
            vcpu.answer_hypercall(call.answer)
            exit = vcpu.run()
        assert isinstance(exit, HltExit), exit
        return f"{seen}rax {vcpu.results.pop():#x}"

    def close(self) -> None:
        self._system.close()


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.hypercall_programs")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args(words)
    with System() as system:
        behaviour = hypercall_behaviour(system, amd=is_amd(system.supported_cpuid()))
        if behaviour != "exits":
            print(f"hypercalls: {behaviour} here", file=sys.stderr)
            return 3
        print(f"hypercalls: seed {options.seed}, {options.count} calls", flush=True)
        kernel, model = Kernel(system), Model()
        chance = random.Random(options.seed)
        exits = 0
        for _ in range(options.count):
            call = random_call(chance)
            seen, predicted = kernel.make(call), model.make(call)
            exits += seen.startswith("exit")
            if seen != predicted:
                print(f"DIVERGENCE: {call} -> {seen}, BUT THE MODEL SAYS {predicted}")
                return 1
        kernel.close()
        model.close()
    print(f"hypercalls: no divergence, {exits} of {options.count} went to user space")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
