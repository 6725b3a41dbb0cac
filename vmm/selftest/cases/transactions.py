"""Refusals and failures: the guest gets an errno, and everything is as it was."""

from __future__ import annotations

import errno

from kvm_bindings import KvmError
from vmm.core.events import Kind
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.backing import Backing
from vmm.policy import Decision, Deny, Event, Policy, View
from vmm.selftest.case import Cell, case, expect
from vmm.selftest.rig import Rig

PAGES = 16
GUEST, HOST = 0x5555_6775_6573_7400, 0x6666_686F_7374_0000
_U64 = 1 << 64


class DenyAll(Policy):
    """No to everything."""

    def on_share(self, event: Event, view: View) -> Decision:
        return Deny(errno.EPERM)

    on_unshare = on_share


class FailingHoles:
    """Makes the holes of backings fail while `fail` is set."""

    def __init__(self) -> None:
        self.fail = False

    def put_into(self, backing: Backing) -> Backing:
        punch = backing.punch

        def punch_or_fail(offset: int, size: int) -> None:
            if self.fail:
                raise KvmError("fallocate", errno.ENOMEM, "PUNCH_HOLE", "made to fail")
            punch(offset, size)

        setattr(backing, "punch", punch_or_fail)  # noqa: B010 - mypy allows no other way
        return backing


class Snapshot:
    """A rig with a word in every page, the first half shared; `unchanged` compares."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        expect("answer to share", rig.share(0, PAGES // 2), 0)
        self._words = [(HOST if page < PAGES // 2 else GUEST) + page for page in range(PAGES)]
        for page, word in enumerate(self._words):
            rig.write(page, word)
        self.states = rig.memory.states()
        self._residency = rig.memory.residency()

    def unchanged(self) -> None:
        rig = self._rig
        expect("page states", rig.memory.states(), self.states)
        expect("residency", rig.memory.residency(), self._residency)
        for page, word in enumerate(self._words):
            expect(f"word of page {page}", rig.read(page), word)
        for page in range(PAGES // 2):
            expect(f"host's word of page {page}", rig.host_read(page), self._words[page])


@case("a policy's no reaches the guest as the policy's errno, and nothing changes")
def policy_refusal_changes_nothing(cell: Cell) -> None:
    rig = cell.rig(pages=PAGES, policies=[DenyAll()])
    rig.fill(0, PAGES, GUEST)
    before = rig.memory.states(), rig.memory.residency()
    expect("answer", rig.share(0, 4), -errno.EPERM)
    expect("answer to a request for nothing new", rig.unshare(0, 4), -errno.EPERM)
    expect("states and residency", (rig.memory.states(), rig.memory.residency()), before)
    expect("guest's words", rig.holds(0, PAGES, GUEST), True)
    expect("requests denied", rig.converter.accounting.share.denied, 1)


@case("requests that no guest may make are EINVAL, and nothing changes")
def bad_requests_change_nothing(cell: Cell) -> None:
    rig = cell.rig(pages=PAGES)
    snapshot = Snapshot(rig)
    base = rig.gpa(0)
    bad = {
        "no pages": (base, 0),
        "a GPA in the middle of a page": (base + 512, 1),
        "one page too many": (base, PAGES + 1),
        "past the end of RAM": (rig.gpa(PAGES), 1),
        "before RAM": (base - PAGE_SIZE, 2),
        "pages whose bytes don't fit 64 bits": (base, 1 << 52),
        "pages that wrap to one": (base, (1 << 52) + 1),
        "all of 64 bits": (base, _U64 - 1),
        "a GPA at the end of 64 bits": (_U64 - PAGE_SIZE, 2),
    }
    for what, (gpa, pages) in bad.items():
        for kind in Kind:
            expect(f"{kind.value}: {what}", rig.request(kind, gpa, pages), -errno.EINVAL)
    for kind in Kind:
        answer = rig.request(kind, base, 1, reserved=1 << 5)
        expect(f"{kind.value} with a reserved bit", answer, -errno.EINVAL)
    snapshot.unchanged()


@case("a share whose discard fails is taken back, and the guest gets the errno")
def failed_share_is_taken_back(cell: Cell) -> None:
    _failed_conversion(cell, Kind.SHARE)


@case("an unshare whose discard fails is taken back, and the guest gets the errno")
def failed_unshare_is_taken_back(cell: Cell) -> None:
    _failed_conversion(cell, Kind.UNSHARE)


def _failed_conversion(cell: Cell, kind: Kind) -> None:
    holes = FailingHoles()
    rig = cell.rig(pages=PAGES, wrap=holes.put_into)
    snapshot = Snapshot(rig)
    holes.fail = True
    expect("answer", rig.request(kind, rig.gpa(0), PAGES), -errno.ENOMEM)
    holes.fail = False
    if rig.memory.in_place:
        # KVM had changed the pages before the failure: what they hold since is its business.
        expect("page states", rig.memory.states(), snapshot.states)
    else:
        snapshot.unchanged()
    expect("answer to the same request later", rig.request(kind, rig.gpa(0), PAGES), 0)
