"""Filters of system calls, run by an interpreter of their few instructions and by the kernel."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvm_bindings import sandbox
from vmm.sandbox import calls, seccomp
from vmm.sandbox.calls import Condition, Needs

ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
KILL = 0x80000000


def needs(**more: Any) -> Needs:
    return Needs(pid=1234, kept=(0, 1, 2, 9), **more)


ROOT = Path(__file__).resolve().parents[3]


def verdict(
    program: Sequence[seccomp.Instruction],
    number: int,
    *arguments: int,
    arch: int | None = None,
) -> int:
    """What the kernel would do with the call: classic BPF, as far as filters here use it."""
    words = [*arguments, *[0] * (6 - len(arguments))]
    at, value = 0, 0
    while True:
        code, if_true, if_false, k = program[at]
        at += 1
        if code == 0x20 and k == 0:
            value = number
        elif code == 0x20 and k == 4:
            value = sandbox.audit_arch() if arch is None else arch
        elif code == 0x20:
            value = words[(k - 16) // 8] & 0xFFFFFFFF
        elif code == 0x54:
            value &= k
        elif code == 0x05:
            at += k
        elif code == 0x15:
            at += if_true if value == k else if_false
        elif code == 0x25:
            at += if_true if value > k else if_false
        elif code == 0x35:
            at += if_true if value >= k else if_false
        else:
            assert code == 0x06
            return k


def of_loop(of: Needs | None = None) -> list[seccomp.Instruction]:
    of = of or needs()
    return seccomp.allow_only(calls.allowed(of), calls.conditional(of))


def number(name: str) -> int:
    found = sandbox.syscall_number(name)
    assert found is not None
    return found


def test_every_call_of_the_tables_is_known_to_the_bindings() -> None:
    """A name that isn't would silently be left out of the filters."""
    only_x86 = {
        "access", "alarm", "arch_prctl", "dup2", "epoll_wait", "getdents", "link", "lstat",
        "getpgrp", "mkdir", "open", "pipe", "poll", "readlink", "rename", "renameat", "select",
        "stat", "time", "unlink",
    }  # fmt: skip
    named = calls.ALWAYS | calls.ON_FOLDERS | calls.WORKER | calls.NOT_FOR_VCPUS
    named |= set(calls.conditional(Needs(1, connects=True)))

    unknown = {name for name in named if sandbox.syscall_number(name) is None}

    assert unknown <= (set() if os.uname().machine == "x86_64" else only_x86)


@pytest.mark.parametrize("name", ["read", "futex", "munmap", "exit_group"])
def test_plain_calls_are_allowed(name: str) -> None:
    assert verdict(of_loop(), number(name)) == ALLOW


@pytest.mark.parametrize("name", ["renameat2", "unlinkat", "mkdirat"])
def test_calls_on_folders_are_allowed_only_where_some_are_writable(name: str) -> None:
    assert verdict(of_loop(), number(name)) == EPERM
    assert verdict(of_loop(needs(writes=True)), number(name)) == ALLOW


def test_exactly_the_calls_that_are_named_are_allowed() -> None:
    program = seccomp.allow_only(calls.ALWAYS, {})
    named = {sandbox.syscall_number(name) for name in calls.ALWAYS}

    allowed = {each for each in range(1000) if verdict(program, each) == ALLOW}

    assert allowed == named - {None}


def test_unknown_and_new_calls_are_refused() -> None:
    execve = {"x86_64": 59, "aarch64": 221}[os.uname().machine]

    assert verdict(of_loop(), execve) == EPERM
    assert verdict(of_loop(), 601) == ENOSYS
    assert verdict(of_loop(), number("clone3")) == ENOSYS


def test_calls_of_another_architecture_end_the_process() -> None:
    assert verdict(of_loop(), number("read"), arch=0x40000003) == KILL  # i386
    assert verdict(of_loop(), 0x40000000) == KILL  # x32's read


def test_ioctl_of_kvm_is_allowed_and_typing_on_the_terminal_is_not() -> None:
    program = of_loop()

    assert verdict(program, number("ioctl"), 5, 0xAE80) == ALLOW
    assert verdict(program, number("ioctl"), 5, 0x5401) == ALLOW
    assert verdict(program, number("ioctl"), 5, 0x5412) == EPERM
    assert verdict(program, number("ioctl"), 5, 0x0) == EPERM


def test_mappings_are_anonymous_or_of_files_that_are_not_kept() -> None:
    program, mmap = of_loop(), number("mmap")
    shared, private, anonymous = 1, 2, 0x20
    read_execute = 5

    assert verdict(program, mmap, 0, 4096, 3, private | anonymous, 0xFFFFFFFF) == ALLOW
    assert verdict(program, mmap, 0, 4096, 7, private | anonymous, 0xFFFFFFFF) == EPERM
    assert verdict(program, mmap, 0, 4096, read_execute, private, 20) == ALLOW
    assert verdict(program, mmap, 0, 4096, 1, private, 9) == EPERM
    assert verdict(program, mmap, 0, 4096, 1, shared, 20) == EPERM
    mapped = of_loop(needs(maps=True))
    assert verdict(mapped, mmap, 0, 4096, 3, shared, 9) == ALLOW
    assert verdict(mapped, mmap, 0, 4096, read_execute, shared, 9) == EPERM


def test_signals_and_copies_are_for_this_process_only() -> None:
    for name in ("tgkill", "kill", "process_vm_readv", "process_vm_writev"):
        assert verdict(of_loop(), number(name), 1234) == ALLOW
        assert verdict(of_loop(), number(name), 1) == EPERM


def test_opening_for_writing_needs_landlock_or_is_refused() -> None:
    write, create = 1, 0o101
    without = of_loop(needs(landlock=False))

    assert verdict(of_loop(), number("openat"), 0, 0, write) == ALLOW
    assert verdict(of_loop(), number("openat"), 0, 0, create) == EPERM
    assert verdict(without, number("openat"), 0, 0, write) == EPERM
    assert verdict(without, number("openat"), 0, 0, 0) == ALLOW


def test_descriptor_is_put_in_the_place_of_an_output_only() -> None:
    program = of_loop(needs(outputs=(1, 2, 12)))

    assert verdict(program, number("dup3"), 5, 12) == ALLOW
    assert verdict(program, number("dup3"), 5, 9) == EPERM


def test_only_unix_sockets_and_only_where_a_device_connects() -> None:
    connecting = of_loop(needs(connects=True))

    assert verdict(of_loop(), number("socket"), 1, 1) == EPERM
    assert verdict(connecting, number("socket"), 1, 1) == ALLOW
    assert verdict(connecting, number("socket"), 2, 1) == EPERM


def test_filter_of_a_vcpu_takes_calls_away_and_allows_the_rest() -> None:
    program = seccomp.forbid(calls.NOT_FOR_VCPUS)

    assert verdict(program, number("accept4")) == EPERM
    assert verdict(program, number("ioctl"), 5, 0xAE80) == ALLOW


def test_conditions_of_any_number_of_values_decide_right() -> None:
    """All ways of one or two conditions with up to three values, against what they say."""
    rules = [
        Condition(argument, 0xFF, values, negated)
        for argument, values, negated in itertools.product(
            (0, 3), ((), (1,), (1, 2), (1, 2, 3)), (False, True)
        )
    ]
    for first, second in itertools.product(rules, rules):
        program = seccomp.allow_only((), {"ioctl": [[first, second], [second]]})
        for words in itertools.product((1, 3, 4, 0x101), repeat=2):
            arguments = (words[0], 0, 0, words[1])
            holds = [
                ((arguments[rule.argument] & rule.mask) in rule.values) != rule.negated
                for rule in (first, second)
            ]
            expected = ALLOW if all(holds) or holds[1] else EPERM
            assert verdict(program, number("ioctl"), *arguments) == expected


IN_A_WORKER = """
import os, socket, sys
from vmm.sandbox.worker import enter_worker
enter_worker()
ended = []
for attempt in (
    lambda: open("/etc/passwd").read(),
    lambda: socket.socket(),
    lambda: os.fork(),
    lambda: os.execv("/bin/true", ["true"]),
    lambda: os.kill(os.getppid(), 0),
    lambda: open("here", "w"),
):
    try:
        attempt()
        ended.append("ok")
    except OSError as error:
        ended.append("refused")
import lzma, xml.dom.minidom
lzma.decompress(lzma.compress(bytes(1 << 20)))
print(*ended)
"""


def test_worker_computes_and_reaches_nothing(tmp_path: Path) -> None:
    """The kernel's own word, in a process that gives its rights up."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_WORKER],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    if sandbox.landlock_version() == 0:  # what Python itself needs can't be told from the rest
        words[0] = "refused"
    assert words == ["refused"] * 6
