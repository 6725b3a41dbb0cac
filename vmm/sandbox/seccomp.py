"""Filters for seccomp(2): classic BPF over the number and arguments of a system call.

Sources: Documentation/userspace-api/seccomp_filter.rst, include/uapi/linux/{seccomp,filter}.h.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping

from kvm_bindings import sandbox
from vmm.sandbox.calls import Alternatives, Condition

_LOAD, _AND, _JUMP, _IF_EQUAL, _IF_MORE, _RETURN = 0x20, 0x54, 0x05, 0x15, 0x25, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_X32 = 0x3FFFFFFF
"""x86's x32 calls have bit 30 set: other numbers for the same things."""
_NEWEST = 600
"""Calls from here on are newer than this table, for which C libraries have another way."""
PERM, NOSYS = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS

Instruction = tuple[int, int, int, int]
"""(code, jump if true, jump if false, k)."""


def allow_only(calls: Iterable[str], conditional: Mapping[str, Alternatives]) -> list[Instruction]:
    """A filter that allows `calls`, and those in `conditional` whose arguments fit; the rest is
    EPERM. Calls that this machine doesn't have are left out."""
    program = _head()
    for name, alternatives in conditional.items():
        if (number := sandbox.syscall_number(name)) is not None:
            body = _body(alternatives)
            program += [(_IF_EQUAL, 1, 0, number), (_JUMP, 0, 0, len(body)), *body]
    numbers = {sandbox.syscall_number(name) for name in calls}
    for number in sorted(number for number in numbers if number is not None):
        program += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    if (clone3 := sandbox.syscall_number("clone3")) is not None:
        # Its flags are behind a pointer; without it C libraries take clone.
        program += [(_IF_EQUAL, 0, 1, clone3), (_RETURN, 0, 0, NOSYS)]
    return [*program, (_IF_MORE, 0, 1, _NEWEST), (_RETURN, 0, 0, NOSYS), (_RETURN, 0, 0, PERM)]


def forbid(calls: Iterable[str]) -> list[Instruction]:
    """A filter that takes `calls` away, whatever others allow; those are EPERM."""
    program = _head()
    for name in sorted(calls):
        if (number := sandbox.syscall_number(name)) is not None:
            program += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, PERM)]
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _head() -> list[Instruction]:
    """Another architecture's calls end the process: its numbers mean other things."""
    return [
        (_LOAD, 0, 0, _ARCH),
        (_IF_EQUAL, 1, 0, sandbox.audit_arch()),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_IF_MORE, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]


def _body(alternatives: Alternatives) -> list[Instruction]:
    """What decides a call that depends on its arguments; EPERM where no alternative fits."""
    program: list[Instruction] = []
    for conditions in alternatives:
        parts = [_condition(condition) for condition in conditions]
        rest = [(_RETURN, 0, 0, _ALLOW)]
        for part in reversed(parts):
            # Each part falls through where it holds, and jumps over what follows where not.
            rest = [*part, (_JUMP, 0, 0, len(rest)), *rest]
        program += rest
    return [*program, (_RETURN, 0, 0, PERM)]


def _condition(condition: Condition) -> list[Instruction]:
    """Skips the one instruction after it where the condition holds."""
    values, negated = condition.values, condition.negated
    program = [
        (_LOAD, 0, 0, _ARGUMENTS + 8 * condition.argument),
        (_AND, 0, 0, condition.mask),
    ]
    left = len(values)
    for value in values:
        left -= 1
        # To the end of this part: past it where the value counts for it, onto it where against.
        program.append((_IF_EQUAL, left if negated else left + 1, 0, value))
    if negated:
        # Fallen through: none of them. Two ways out, so a jump of its own.
        program = (
            program[:2]
            + [(code, jump + 1, other, k) for code, jump, other, k in program[2:]]
            + [(_JUMP, 0, 0, 1)]
        )
    return program
