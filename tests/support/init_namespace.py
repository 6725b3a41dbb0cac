"""Enters what firmware/init is tested in: DIR as the root, with mount(2) refused, then /init.

A new process namespace makes it process 1. Its own mounts would hide the files that the test has
put into /proc and /sys, so that they fail here (seccomp, errno 1).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

_MOUNT = {"x86_64": 165, "aarch64": 40}[platform.machine()]
# <linux/filter.h>: load the system call's number; mount is answered with EPERM, all else allowed.
_FILTER = (
    (0x20, 0, 0, 0),
    (0x15, 0, 1, _MOUNT),
    (0x06, 0, 0, 0x00050001),
    (0x06, 0, 0, 0x7FFF0000),
)
_NO_NEW_PRIVS, _SECCOMP, _SECCOMP_FILTER = 38, 22, 2  # <linux/prctl.h>


def main() -> None:
    os.chroot(sys.argv[1])
    os.chdir("/")
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *c) for c in _FILTER))
    program = ctypes.create_string_buffer(
        struct.pack("<HxxxxxxQ", len(_FILTER), ctypes.addressof(code))
    )
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _SECCOMP, _SECCOMP_FILTER, program, 0, 0
    ):
        sys.exit("no seccomp filter")
    os.execv("/init", ["/init"])


main()
