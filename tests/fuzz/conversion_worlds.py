"""Carries a conversion program out on pyvmm over some KVM, step by step beside the reference.

Nothing here depends on the scheme: a rig says where the guest finds a page.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress

from kvm_bindings import KvmError
from tests.fuzz import conversion_ops as ops
from tests.fuzz.reference import SHARE, Reference, Request, Side, State
from tests.support.fake_kvm import FakeVm
from tests.support.fake_platform import FakePlatform
from vmm.arch.guest_cpu import GuestStopped
from vmm.conversion.transaction import FRUITLESS_FAULTS
from vmm.core.errors import PrivateAccess, UnmappedAccess
from vmm.core.events import Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backing import Backing
from vmm.policy import Allow, Convert, Decision, Defer, Deny, Event, Partial, Policy, View
from vmm.selftest.entries import Combination
from vmm.selftest.platform import Platform
from vmm.selftest.rig import Rig

INJECTED = errno.ENOMEM
DENIED = errno.EPERM


class Failures:
    """Makes the host fail at one of the calls to come."""

    def __init__(self) -> None:
        self._left: int | None = None
        self.happened = False
        self.where = ""

    def arm(self, fail_at: int | None) -> None:
        self._left, self.happened = fail_at, False

    def pass_or_fail(self, what: str) -> None:
        """To be called ahead of each call that changes something. Raises KvmError."""
        if self._left is None:
            return
        if self._left:
            self._left -= 1
            return
        self._left, self.happened, self.where = None, True, what
        raise KvmError(what, INJECTED, "", "injected")

    def put_into(self, backing: Backing) -> Backing:
        """The backing, its holes being such calls."""
        punch = backing.punch

        def punch_or_fail(offset: int, size: int) -> None:
            self.pass_or_fail("fallocate")
            punch(offset, size)

        setattr(backing, "punch", punch_or_fail)  # noqa: B010 - mypy allows no other way
        return backing


class Chosen(Policy):
    """Answers as the program says; `area` is what it says to convert."""

    def __init__(self) -> None:
        self.word = "allow"
        self.area = Range(0, 0)

    def on_share(self, event: Event, view: View) -> Decision:
        match self.word:
            case "deny":
                return Deny(DENIED)
            case "partial":
                return Partial(self.area)
            case "widen":
                return Convert(self.area)
        return Allow()

    def on_unshare(self, event: Event, view: View) -> Decision:
        if self.word in ("defer", "defer-keep"):
            return Defer(view.now + 1.0, keep=self.word == "defer-keep")
        return self.on_share(event, view)


class Mismatch(AssertionError):
    """What happened is not what the reference says."""


class World:
    """One rig with the reference beside it. A context manager."""

    def __init__(self, platform: Platform, combination: Combination) -> None:
        self.failures = Failures()
        self.policy = Chosen()
        self.now = 0.0
        if isinstance(platform, FakePlatform):
            platform.kernel.watch = self.failures.pass_or_fail
        with ExitStack() as opened:
            self.rig = opened.enter_context(
                Rig(
                    platform,
                    combination,
                    pages=ops.PAGES,
                    policies=[self.policy],
                    wrap=self.failures.put_into,
                    clock=lambda: self.now,
                )
            )
            self._opened = opened.pop_all()
        self.reference = Reference(ops.PAGES, in_place=self.rig.memory.in_place)
        self._fruitless: tuple[Request | None, int] = (None, 0)
        # A mapping's pages come into being when they are read.
        in_place = self.rig.memory.in_place
        self._reading_makes_pages = in_place and self.rig.private.access != "pread/pwrite"
        self._pipe: tuple[int, int] | None = None
        self._counts = self.rig.private.traits.granule == PAGE_SIZE

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def step(self, op: ops.Op) -> str:
        """Carry an operation out; what was seen, in a word. Raises Mismatch."""
        match op:
            case ops.Convert():
                return self._convert(op)
            case ops.Fault(kind, page):
                return self._fault(kind, page)
            case ops.Settle(fail_at):
                return self._settle(fail_at)
            case ops.GuestRead(page, other):
                return self._guest(page, other, None)
            case ops.GuestWrite(page, other, word):
                return self._guest(page, other, word)
            case ops.HostRead(first, count):
                return self._host_read(first, count)
            case ops.HostWrite(first, count, word):
                return self._host_write(first, count, word)
            case ops.Peek(start, size):
                return self._peek(start, size)
            case ops.Hold(page):
                return self._hold(page)
        return self._look()

    # -- conversions --------------------------------------------------------------------------

    def _convert(self, op: ops.Convert) -> str:
        request, reference = op.request, self.reference
        refused = reference.refusal(request)
        done = request if refused else self._wanted_by_policy(request, op.policy)
        self.policy.word = op.policy
        self.policy.area = self.rig.area(done.first, done.count)
        self.failures.arm(op.fail_at)
        kind = Kind.SHARE if request.kind == SHARE else Kind.UNSHARE
        gpa = self.rig.gpa(request.first) + request.offset
        answer = self.rig.request(kind, gpa, request.count, reserved=request.reserved)
        failed = self.failures.happened
        self.failures.arm(None)
        defer = op.policy in ("defer", "defer-keep")
        if refused or op.policy == "deny":
            self._expect("answer", answer, refused or -DENIED)
        elif failed:
            self._expect("answer", answer, -INJECTED)
            applied = self.failures.where == "fallocate"
            reference.failed(done, self._states(), applied=applied)
        elif reference.needs_work(done, defer=defer) and reference.is_held(done):
            self._expect("answer", answer, -errno.EAGAIN)
        else:
            if reference.needs_work(done, defer=defer):
                reference.convert(done, defer=defer, keep=op.policy == "defer-keep")
            part_is_left = op.policy == "partial" and not reference.all_settled(request)
            self._expect("answer", answer, -errno.EAGAIN if part_is_left else 0)
        return f"{answer}"

    def _wanted_by_policy(self, request: Request, policy: str) -> Request:
        """What a valid request comes to."""
        if policy == "partial":
            return Request(request.kind, request.first, (request.count + 1) // 2)
        return self.reference.widened(request) if policy == "widen" else request

    def _fault(self, kind: str, page: int) -> str:
        """An implicit conversion, where the scheme has those; else nothing happens."""
        request = Request(kind, page, 1)
        self.policy.word = "allow"
        word = Kind.SHARE if kind == SHARE else Kind.UNSHARE
        answer = self.rig.converter.fault(word, self.rig.gpa(page), PAGE_SIZE, 0)
        if not self.rig.scheme.converts_on_fault:
            self._expect("answer to a fault", answer, -errno.EOPNOTSUPP)
            return "no faults"
        if self.reference.all_settled(request):
            # The guest may try again, but not for ever.
            count = self._fruitless[1] + 1 if self._fruitless[0] == request else 1
            self._fruitless = (request, count)
            wanted = 0 if count <= FRUITLESS_FAULTS else -errno.EFAULT
            self._expect("answer to a fault for nothing", answer, wanted)
            return "nothing to do"
        self._fruitless = (None, 0)
        if self.reference.is_held(request):
            self._expect("answer to a fault", answer, -errno.EAGAIN)
            return f"{answer}"
        self._expect("answer to a fault", answer, 0)
        self.reference.convert(request)
        return f"{answer}"

    def _settle(self, fail_at: int | None) -> str:
        self.now += 2.0
        self.failures.arm(fail_at)
        self.rig.converter.settle()
        failed = self.failures.happened
        self.failures.arm(None)
        if failed:
            self.reference.settle_failed()
            self.now += 2.0
            self.rig.converter.settle()  # it is tried again
        self.reference.settle()
        return "failed, then settled" if failed else "settled"

    # -- accesses -----------------------------------------------------------------------------

    def _guest(self, page: int, other: bool, word: int | None) -> str:
        """A load, or with `word` a store."""
        if other and not self.rig.has_aliases:
            return "no alias"
        known = self.reference.pages[page]
        private = (known.state.value != "shared") != other
        side = known.other if other else known.current
        cpu, address = self.rig.guests[0], self.rig.alias(page, private=private)
        try:
            if word is not None:
                cpu.write(address, word)
                side.touch(word)
                return "ok"
            return self._seen(f"the guest in page {page}", cpu.read(address), side)
        except GuestStopped as stop:
            raise Mismatch(f"the guest's access to page {page}: {stop}") from None

    def _seen(self, who: str, word: int, side: Side) -> str:
        if side.word is not None:
            self._expect(f"the word that {who} sees", word, side.word)
        side.touch(word)
        return f"{word:#x}"

    def _host_read(self, first: int, count: int) -> str:
        try:
            data = self.rig.memory.pread(count * PAGE_SIZE, self.rig.device_gpa(first))
        except PrivateAccess:
            self._expect("host access allowed", False, self.reference.host_may(first, count))
            return "refused"
        self._expect("host access allowed", True, self.reference.host_may(first, count))
        for number, page in enumerate(self.reference.pages[first : first + count]):
            word = int.from_bytes(data[number * PAGE_SIZE :][:8], "little")
            if page.shared.word is None:
                page.shared.word = word
            if self._reading_makes_pages:
                page.shared.touch(word)
            self._expect(f"host word in page {first + number}", word, page.shared.word)
            rest = data[number * PAGE_SIZE + 8 : (number + 1) * PAGE_SIZE]
            self._expect(f"rest of page {first + number}", rest.strip(b"\0"), b"")
        return "read"

    def _host_write(self, first: int, count: int, word: int) -> str:
        page = word.to_bytes(8, "little") + bytes(PAGE_SIZE - 8)
        try:
            self.rig.memory.pwrite(page * count, self.rig.device_gpa(first))
        except PrivateAccess:
            self._expect("host access allowed", False, self.reference.host_may(first, count))
            return "refused"
        self._expect("host access allowed", True, self.reference.host_may(first, count))
        for each in self.reference.pages[first : first + count]:
            each.shared.touch(word)
        return "written"

    def _hold(self, page: int | None) -> str:
        if not self.reference.in_place:
            return "two sides"
        if page is None:
            self._let_go()
            self.reference.held.clear()
        elif self.reference.pages[page].state is State.SHARED and self._take_hold(page):
            self.reference.held.add(page)
        return f"{len(self.reference.held)} held"

    def _take_hold(self, page: int) -> bool:
        """A reference to a shared page: the model's, or a pipe's, which takes it where it is."""
        vm, gpa = self.rig.vm, self.rig.gpa(page)
        if isinstance(vm, FakeVm):
            vm.guest_memfd(self.rig.private.fd).pin(gpa, PAGE_SIZE)
            return True
        resident = self.rig.private.resident_bytes(gpa, PAGE_SIZE)
        if self.rig.private.access != "pread/pwrite" or not resident:
            return False  # a hole has no page to hold
        if self._pipe is None:
            self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            for end in self._pipe:
                self._opened.callback(os.close, end)
        try:
            os.splice(self.rig.private.fd, self._pipe[1], PAGE_SIZE, offset_src=gpa)
        except BlockingIOError:
            return False
        return True

    def _let_go(self) -> None:
        vm = self.rig.vm
        if isinstance(vm, FakeVm):
            vm.guest_memfd(self.rig.private.fd).unpin()
        elif self._pipe is not None:
            with suppress(BlockingIOError):
                while os.read(self._pipe[0], PAGE_SIZE):
                    pass

    def _peek(self, start: int, size: int) -> str:
        """Any bytes; an access of no bytes counts as one to the byte that it names."""
        last = start + max(size, 1) - 1
        inside = start >= 0 and last < ops.PAGES * PAGE_SIZE
        first, count = start // PAGE_SIZE, last // PAGE_SIZE - start // PAGE_SIZE + 1
        allowed = inside and self.reference.host_may(first, count)
        try:
            data = self.rig.memory.pread(size, self.rig.device_gpa(0) + start)
        except (PrivateAccess, UnmappedAccess) as refusal:
            self._expect("host access allowed", False, allowed)
            self._expect("refused as unmapped", isinstance(refusal, UnmappedAccess), not inside)
            return "refused"
        self._expect("host access allowed", True, allowed)
        pages = self.reference.pages[first : first + count] if size else []
        if any(page.shared.word is None for page in pages):
            return "unknown"
        words = [(page.shared.word or 0).to_bytes(8, "little") for page in pages]
        whole = b"".join(word + bytes(PAGE_SIZE - 8) for word in words)
        expected = whole[start % PAGE_SIZE :][:size]
        self._expect(f"{size} bytes at {start:#x}", data.hex(), expected.hex())
        if self._reading_makes_pages:
            for page in pages:
                page.shared.touch(page.shared.word)
        return "read"

    # -- looks --------------------------------------------------------------------------------

    def _look(self) -> str:
        states = self._states()
        self._expect("page states", states, self.reference.states())
        predicted = self.reference.resident()
        if predicted is not None and self._counts:
            found = self.rig.memory.residency()
            pages = (found.private_bytes // PAGE_SIZE, found.shared_bytes // PAGE_SIZE)
            self._expect("resident pages (private, shared)", pages, predicted)
        return " ".join(state[0] for state in states)

    def _states(self) -> list[str]:
        runs = self.rig.memory.states()
        return [state.value for area, state in runs for _ in range(area.size // PAGE_SIZE)]

    def _expect(self, what: str, found: object, predicted: object) -> None:
        if found != predicted:
            raise Mismatch(f"{what}: {found}, but the reference says {predicted}")
