"""A process whose guest keeps a secret of its own making in private memory.

    python -m tests.support.strict_program BACKING SEED [dumps]

With `dumps` it leaves nothing out of a core file: guest memory neither. It says "ready" on stdout
once the guest has its secret, and ends with stdin. The process knows the seed alone: what the guest
makes of it (`secret_of`) is never computed in here.
"""

from __future__ import annotations

import ctypes
import resource
import struct
import sys
from pathlib import Path

from kvm_bindings.exits import IoExit
from kvm_bindings.x86_64 import System
from tests.support.hunt import Secret
from tests.support.strict_guest import C_BIT, StrictGuest, random_part
from vmm.arch.x86_64.micro_guest import DONE_PORT
from vmm.exits.run_loop import install_kick_handler

SECRET_GPA = 0xC0_0000
WORDS = 4
_MADV_DODUMP = 17
_FACTOR = 0x9E37_79B9_7F4A_7C15

# mov rax, FACTOR; mov ecx, WORDS; 1: mov rdx, rsi; imul rdx, rax; mov [rdi], rdx; add rdi, 8;
# inc rsi; dec ecx; jnz 1b; out, for ever
_MAKE_SECRET = (
    b"\x48\xb8" + _FACTOR.to_bytes(8, "little") + b"\xb9" + WORDS.to_bytes(4, "little")
) + (
    b"\x48\x89\xf2\x48\x0f\xaf\xd0\x48\x89\x17\x48\x83\xc7\x08\x48\xff\xc6\xff\xc9\x75\xeb"
    + b"\x31\xd2\xe6"
    + bytes([DONE_PORT])
    + b"\xeb\xfc"
)


def secret_of(seed: int) -> Secret:
    """32 bytes that only the guest, and who hunts for them, work out."""
    words = [(seed + number) * _FACTOR & (1 << 64) - 1 for number in range(WORDS)]
    return Secret(struct.pack("<2Q", *words[:2]), struct.pack("<2Q", *words[2:]))


def dump_all(guest: StrictGuest) -> None:
    """Have the kernel put everything into a core file, as a monitor could that means ill."""
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
    Path("/proc/self/coredump_filter").write_text("0xff")
    libc = ctypes.CDLL(None, use_errno=True)
    for backing in (guest.memory.shared, guest.private):
        place, size = ctypes.c_void_p(backing.hva), ctypes.c_size_t(guest.memory.ram[-1].end)
        if libc.madvise(place, size, _MADV_DODUMP):
            sys.exit(f"madvise: {ctypes.get_errno()}")


def main() -> None:
    backing, seed = sys.argv[1], int(sys.argv[2])
    install_kick_handler()
    parts = [random_part("kernel", 0x80_0000, 5000)]
    place = SECRET_GPA | 1 << C_BIT
    with (
        System() as system,
        StrictGuest(
            system, parts, backing=backing, after=_MAKE_SECRET, rsi=seed, rdi=place
        ) as guest,
    ):
        exit = guest.run()
        if not (guest.loaded and isinstance(exit, IoExit) and exit.port == DONE_PORT):
            sys.exit(f"the guest did not get there: {guest.reason}, {exit}")
        if sys.argv[3:] == ["dumps"]:
            dump_all(guest)
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
