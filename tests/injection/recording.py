"""Which system calls a run makes, on what and when: recorded by strace(1)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from kvm_bindings import ioctls
from kvm_bindings.x86_64 import ioctls as x86
from tests.injection import injecting
from tests.injection.row import (
    FS_IOC_FIEMAP,
    TCSETS,
    TCSETSF,
    TUNSETIFF,
    TUNSETOFFLOAD,
    TUNSETVNETHDRSZ,
)
from vmm.core.lean_typing import NamedTuple

START, RUNNING, END = "start", "running", "end"
"""Until the sandbox is entered; while there are vCPUs in KVM_RUN; after the last of them."""
PYTHONS, NOWHERE = "Python's own", ""


class Call(NamedTuple):
    """A kind of call."""

    phase: str
    name: str
    """The call's or ioctl's name, as strace has it."""
    on: str
    """The kind of object: what its descriptor or its path leads to; NOWHERE: it has neither."""


_KINDS = [
    (r"\.img$|/disk$|/file$", "disk"),
    (r"^/memfd:(pyvmm-shared|pyvmm-guest|readable|fake-guest-memory)", "shared memory"),
    (r"^/memfd:pyvmm-", "memfd"),
    (r"kvm-gmem", "guest_memfd"),
    (r"^/dev/kvm$", "/dev/kvm"),
    (r"kvm-vm", "VM"),
    (r"kvm-vcpu", "vCPU"),
    (r"\[eventfd\]", "eventfd"),
    (r"\[eventpoll\]", "loop"),
    (r"\[pidfd\]", "pidfd"),
    (r"landlock", "ruleset"),
    (r"/console\.out$", "console"),
    (r"^pipe:", "pipe"),
    (r"^(socket|TCP|UNIX|NETLINK)\b", "socket"),
    (r"^/proc/(\d+|self)/mem$", "/proc/self/mem"),
    (r"/dev/fuse$", "/dev/fuse"),
    (r"/dev/net/tun$", "tap"),
    (r"/trace(/|$)", "trace"),
    (r"/\.(snapshot|core)\.\w+(/\w+)?$|/saved(/\w+)?$|/core$", "saved"),
    (r"/snapshot(/(memory|state))?$", "snapshot"),
    (r"/\.pyvmm-.*\.tmp$|/report\.json(\.old)?$", "report"),
    (r"/(kernel|initrd|bench\.bin|payload\.bin|bench|vmlinux)$|\.elf$", "image"),
    (r"/memory(/(memory|states))?$|^pyvmm$", "memory file"),
    (r"/fifo$", "FIFO"),
    (r"/dev/(ptmx|pts/\d+)$", "terminal"),
    (r"/(control|gdb|b|v|v_\d+|s|passt|\.pyvmm-\w+)$", "socket's path"),
    (r"/out$", "console's file"),
    (r"^/proc(/(\d+|self|sys|thread-self))?(/|$)|^/sys/|^/dev/null$|^/proc/(mounts|filesystems)$",
     "host's facts"),
    (r"/pyvmm-[^/]*$|/tmp$", "folder"),
]  # fmt: skip
"""What strace says of a descriptor, or the path itself, and what it is called here."""

_MODULES = tuple(
    {
        sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *filter(None, sys.path),
        str(injecting.ROOT), "/usr", "/lib", "/lib64", "/etc", "/selinux",
    }
)  # fmt: skip
"""Where the interpreter and the C library look for what is theirs."""


_ZIP = f"python{sys.version_info[0]}{sys.version_info[1]}.zip"
_OURS = tuple(str(injecting.ROOT / each) for each in ("vmm/", "kvm_bindings/", "tests/"))


def _kind(path: str, folder: str) -> str:
    """`folder` is the run's own."""
    if path.startswith(_OURS) and not path.endswith(".bin"):
        return PYTHONS
    found = next((kind for pattern, kind in _KINDS if re.search(pattern, path)), None)
    if found is not None:
        return found
    above = path.rstrip("/") + "/"
    if path == folder or any(one.startswith(above) for one in (folder, *_MODULES)):
        return "folder"
    return PYTHONS if path.startswith(_MODULES) or path.endswith(_ZIP) else path


_WITHOUT_CODE = {"PYTHONDONTWRITEBYTECODE": "1"}
"""Python writes compiled modules once, where it may; they are no calls of pyvmm's."""


def recorded(
    words: Sequence[str],
    folder: Path,
    meanwhile: Callable[[injecting.Process], None] = lambda process: None,
    typed: bytes = b"",
    environment: Mapping[str, str] | None = None,
) -> set[Call]:
    """All calls of a run. Raises AssertionError where it doesn't end well."""
    log = folder / "strace.log"
    tracer = ["strace", "-f", "-qq", "-y", "-X", "raw", "-s", "0", "-o", str(log)]
    with (
        open(folder / "console.out", "wb") as console,
        subprocess.Popen(
            [*tracer, *words], cwd=injecting.ROOT, bufsize=0, stdin=subprocess.PIPE, stdout=console,
            stderr=subprocess.PIPE, env=os.environ | _WITHOUT_CODE | dict(environment or {}),
        ) as process,
    ):  # fmt: skip
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            meanwhile(process)
            _, said = process.communicate(typed)
        finally:
            watchdog.cancel()
            watchdog.join()
            process.terminate()
    assert process.returncode == 0, said
    return calls_of(log.read_text(errors="replace"), str(folder))


_LINE = re.compile(r"^\d+ +([a-z0-9_]+)\((.*)")
_FD = re.compile(r"-?\d+<((?:[^>\\]|\\.)*)>(?:\(deleted\))?")
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')
_REQUEST = re.compile(r", (0x[0-9a-f]+)")
_MAPPED = re.compile(r", (\d+<(?:[^>\\]|\\.)*>)")
_TAKE_PATHS = re.compile(
    r"^(open|openat|stat|lstat|statx|newfstatat|access|faccessat2?|readlink|readlinkat|unlink"
    r"|unlinkat|mkdir|mkdirat|rmdir|rename|renameat2?|link|linkat|symlink|chmod|fchmodat|chown"
    r"|fchownat|truncate|mount|umount2|chdir|statfs|execve|mknodat?|lgetxattr|getxattr|utimensat)$"
)


BEGIN, END_OF_IT = "/pyvmm-calls-fail", "/pyvmm-calls-fail-no-more"
"""A program that looks for the first means what it does until it looks for the other."""


def calls_of(log: str, folder: str) -> set[Call]:
    """What strace has written."""
    lines = log.splitlines()
    if BEGIN in log:
        return {Call(RUNNING, *each) for line in _between(lines) for each in _call(line, folder)}
    entered = next((at for at, line in enumerate(lines) if " seccomp(0x1, 0x1," in line), 0)
    runs = [at for at, line in enumerate(lines) if "kvm-vcpu" in line and ", 0xae80" in line]
    ended = runs[-1] if runs else len(lines)
    found = set()
    for at, line in enumerate(lines):
        phase = START if at < entered else RUNNING if at <= ended else END
        found |= {Call(phase, *each) for each in _call(line, folder)}
    return found


def _between(lines: Sequence[str]) -> Iterator[str]:
    inside = False
    for line in lines:
        if f'"{BEGIN}"' in line or f'"{END_OF_IT}"' in line:
            inside = f'"{BEGIN}"' in line
        elif inside:
            yield line


def _call(line: str, folder: str) -> Iterator[tuple[str, str]]:
    found = _LINE.match(line)
    if found is None:
        return
    name, rest = found[1], found[2]
    descriptor = _FD.match(rest)
    on = NOWHERE
    if _TAKE_PATHS.match(name):
        # The path decides, also beside a folder's descriptor; an empty one is the descriptor's.
        paths = [path for path in _PATH.findall(rest) if path]
        if paths:
            last = name.startswith(("rename", "link"))
            on = _kind(_whole(paths[-1 if last else 0], descriptor), folder)
        elif descriptor:
            on = _kind(descriptor[1], folder)
    elif name == "mmap":
        mapped = _MAPPED.search(rest)
        inner = _FD.match(mapped[1]) if mapped else None
        on = _kind(inner[1], folder) if inner else NOWHERE
    elif descriptor:
        on = _kind(descriptor[1], folder)
    if name == "ioctl" and (request := _REQUEST.search(rest)):
        number = int(request[1], 16)
        name = _REQUESTS.get(number, f"ioctl {number:#x}")
    # Python has one function for both.
    yield _NAMES.get(name, name), on


_NAMES = {"preadv2": "preadv", "pwritev2": "pwritev", "syscall_0x1c3": "cachestat"}
"""As the table has them; strace 6.1 has no name for cachestat(2)."""


def _whole(path: str, descriptor: re.Match[str] | None) -> str:
    if path.startswith("/") or descriptor is None:
        return path
    return f"{descriptor[1]}/{path}"


def is_ioctl(value: object) -> bool:
    """Whether it is the number of one of KVM's requests: of its type, 0xAE."""
    return isinstance(value, int) and value & 0xFF00 == 0xAE00


def _requests() -> dict[int, str]:
    """Names of ioctls by their numbers."""
    files = {"FIONBIO": 0x5421, "FIONCLEX": 0x5450, "FIOCLEX": 0x5451, "TCGETS": 0x5401}
    files |= {"TIOCGWINSZ": 0x5413, "FS_IOC_FIEMAP": FS_IOC_FIEMAP, "TUNSETIFF": TUNSETIFF}
    files |= {"TCSETSF": TCSETSF, "TIOCGPTN": 0x80045430, "TIOCSPTLCK": 0x40045431}
    files |= {"TIOCGPTPEER": 0x5441, "TUNSETOFFLOAD": TUNSETOFFLOAD}
    files |= {"TUNSETVNETHDRSZ": TUNSETVNETHDRSZ, "TCSETS": TCSETS}
    found = {number: name for name, number in files.items()}
    for module in (ioctls, x86):
        for name, value in vars(module).items():
            if name.startswith("KVM_") and is_ioctl(value):
                found.setdefault(value & 0xFFFF_FFFF, name)
    return found


_REQUESTS = _requests()
