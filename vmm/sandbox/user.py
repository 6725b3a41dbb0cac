"""`--uid`: the user that a run becomes once everything is open."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vmm.core.errors import HostError, UsageError, in_words
from vmm.core.lean_typing import NamedTuple

_SETGID, _SETUID = 1 << 6, 1 << 7  # CAP_SETGID, CAP_SETUID
_MOST = (1 << 32) - 2
"""An id of all ones means "as it is" to setresuid(2)."""


class User(NamedTuple):
    uid: int
    gid: int


def user_named(text: str) -> User:
    """`text` is USER, UID or either with `:GROUP`. Raises UsageError for no such user or group, for
    root, and for a number without a group; HostError where this process may not change its user."""
    name, colon, group = text.partition(":")
    uid, gid = _number("user", name), _number("group", group) if colon else None
    if uid is None:
        import pwd  # most runs name nobody

        try:
            entry = pwd.getpwnam(name)
        except (KeyError, ValueError):
            raise UsageError(
                f"--uid {text}: there is no user {name!r}; name one, or a number"
            ) from None
        uid, gid = entry.pw_uid, entry.pw_gid if gid is None and not colon else gid
    if gid is None and colon:
        import grp

        try:
            gid = grp.getgrnam(group).gr_gid
        except (KeyError, ValueError):
            raise UsageError(f"--uid {text}: there is no group {group!r}") from None
    if gid is None:
        raise UsageError(f"--uid {text}: a number needs its group, as in {uid}:{uid}")
    if uid == 0 or gid == 0:
        raise UsageError(f"--uid {text}: that is root, who keeps every right; name another user")
    _require_right(text)
    return User(uid, gid)


def _number(kind: str, text: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    number = int(text[:11])
    if number > _MOST:
        raise UsageError(f"--uid: {text[:20]} is no {kind}'s number")
    return number


def _require_right(text: str) -> None:
    with open("/proc/self/status") as status:
        held = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
    if held & (_SETGID | _SETUID) != _SETGID | _SETUID:
        raise HostError(
            f"--uid {text}: this process may not become another user (CAP_SETUID, CAP_SETGID); "
            "start it as root, or leave --uid out"
        )


def become(user: User, folders: Sequence[str]) -> None:
    """All threads, for good: that user and group, no others, and no capabilities.

    `folders`, with what the run has written in them, are that user's from now on. Raises
    HostError: that can't be, or that user can't read pyvmm and Python, which are loaded late in
    parts."""
    try:
        for folder in folders:
            for path, _, names in os.walk(folder):
                for each in (path, *(os.path.join(path, name) for name in names)):
                    os.chown(each, *user, follow_symlinks=False)
        # In this order: the last takes the right to the others. glibc does it on all threads.
        os.setgroups([])
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as error:
        raise HostError(
            f"--uid: becoming user {user.uid} failed: {in_words(error)}; leave it out"
        ) from error
    for path in (__file__, os.__file__):
        if not os.access(path, os.R_OK):
            raise HostError(
                f"--uid: user {user.uid} can't read {path}, and parts of Python and pyvmm are "
                "loaded late; install them where that user may read, or leave --uid out"
            )
