"""Kernels of a few instructions, as ELF files for `--kernel`: 64-bit code, no stack needed."""

from __future__ import annotations

import struct

from tests.support.images import Part, build_elf

BASE = 0x20_0000
SERIAL = bytes.fromhex("66baf803")  # mov dx, 0x3f8
STATUS = bytes.fromhex("66bafd03")  # mov dx, 0x3fd (line status register)
SPIN = bytes.fromhex("ebfe")  # jmp .
HALT = bytes.fromhex("f4ebfd")  # hlt; jmp back; interrupts are off, so that nothing wakes it
RESET = bytes.fromhex("b0fee664") + SPIN  # mov al, 0xfe; out 0x64, al (i8042); jmp .
CRASH = bytes.fromhex("0f0b")  # ud2, without an IDT: a triple fault


def kernel(code: bytes) -> bytes:
    """An ELF that consists of `code`, entered at its first byte."""
    return build_elf((Part(BASE, code),), entry=BASE)


def say(text: bytes) -> bytes:
    """Code that prints `text` with one rep outsb, and falls through to what follows it."""
    # lea rsi, [rip + over the rest]; mov ecx, length; rep outsb; jmp over the text
    start = SERIAL + b"\x48\x8d\x35" + struct.pack("<i", 5 + 2 + 5)
    return (
        start
        + b"\xb9"
        + struct.pack("<I", len(text))
        + b"\xf3\x6e"
        + b"\xe9"
        + struct.pack("<i", len(text))
        + text
    )


def echo() -> bytes:
    """Code that waits for a byte on the serial line and sends it back, for ever."""
    # in al, dx; test al, 1; jz -5
    wait = STATUS + bytes.fromhex("eca80174fb")
    # in al, dx; out dx, al
    answer = SERIAL + bytes.fromhex("ecee")
    back = -(len(wait) + len(answer) + 2)
    return wait + answer + b"\xeb" + struct.pack("<b", back)


def print_initrd() -> bytes:
    """Code that prints its initrd, found through boot_params (which RSI points to at entry)."""
    # mov ecx, [rsi + 0x21c] (ramdisk_size); mov esi, [rsi + 0x218] (ramdisk_image); rep outsb
    return bytes.fromhex("8b8e1c0200008bb618020000") + SERIAL + b"\xf3\x6e"


def obey_power_button() -> bytes:
    """Code that enables the power button's event, says so, and powers off when it comes."""
    enable = bytes.fromhex("66ba0206 66b80001 66ef")  # mov dx, 0x602; mov ax, 0x100; out dx, ax
    # mov dx, 0x600; in ax, dx; test ah, 1; jz back to the in
    wait = bytes.fromhex("66ba0006 66ed f6c401 74f9")
    off = bytes.fromhex("66ba0406 66b80034 66ef")  # mov dx, 0x604; mov ax, 0x3400; out dx, ax
    return enable + say(b"ready\r\n") + wait + off + SPIN


def chatter() -> bytes:
    """Code that prints one letter for ever."""
    return SERIAL + bytes.fromhex("b041eeebfd")  # mov al, 'A'; out dx, al; jmp -3
