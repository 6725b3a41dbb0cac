"""The reference model: what conversions must do, page by page, in as few words as possible.

Each side of a page holds a word (its first; zero when nothing is there) and may be resident.
None stands for "may be anything", and is pinned down by the first look at it.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from enum import Enum

SHARE, UNSHARE = "share", "unshare"


_WANTED = {SHARE: "shared", UNSHARE: "private"}


class State(Enum):
    SHARED = "shared"
    PRIVATE = "private"
    DEFERRED = "deferred"


@dataclass
class Side:
    """One side of a page."""

    word: int | None = 0
    resident: bool = False

    def discard(self) -> None:
        self.word, self.resident = 0, False

    def touch(self, word: int | None) -> None:
        self.word, self.resident = word, True


@dataclass
class Page:
    state: State = State.PRIVATE
    kept: bool = False
    """Deferred only: a share brings the shared side's content back."""
    shared: Side = field(default_factory=Side)
    private: Side = field(default_factory=Side)

    @property
    def current(self) -> Side:
        return self.shared if self.state is State.SHARED else self.private

    @property
    def other(self) -> Side:
        return self.private if self.state is State.SHARED else self.shared


@dataclass(frozen=True)
class Request:
    """A conversion request: `first` page and `count` may be nonsense, `offset` misaligns."""

    kind: str
    first: int
    count: int
    offset: int = 0
    reserved: int = 0


class Reference:
    """`pages` pages, all private at first."""

    def __init__(self, pages: int, *, in_place: bool = False) -> None:
        """`in_place`: both sides of a page are one, and a change of state empties it."""
        self.in_place = in_place
        self.pages = [Page() for _ in range(pages)]
        self.held: set[int] = set()
        self.in_doubt = False
        """A failure left it open which discards were made: residency is not predicted then."""

    def refusal(self, request: Request) -> int:
        """The answer to a request that nobody may carry out, 0 if there is nothing wrong."""
        last = request.first + request.count
        inside = request.first >= 0 and request.count > 0 and last <= len(self.pages)
        return 0 if inside and not request.offset and not request.reserved else -errno.EINVAL

    def convert(self, request: Request, *, defer: bool = False, keep: bool = False) -> None:
        """A valid request, allowed and carried out."""
        area = self.pages[request.first : request.first + request.count]
        if self.in_place:
            for page in area:
                self._move(page, State.SHARED if request.kind == SHARE else State.PRIVATE)
        elif request.kind == SHARE:
            for page in area:
                self._share(page)
        elif not defer:
            for page in area:
                page.state = State.PRIVATE
                page.shared.discard()
        else:
            for page in area:
                if page.state is State.SHARED:
                    page.state, page.kept = State.DEFERRED, keep

    def needs_work(self, request: Request, *, defer: bool = False) -> bool:
        """Whether a valid request changes anything; if not, nothing is discarded either."""
        area = self.pages[request.first : request.first + request.count]
        states = {page.state for page in area}
        if request.kind == SHARE:
            return states != {State.SHARED}
        return State.SHARED in states or (not defer and State.DEFERRED in states)

    def is_held(self, request: Request) -> bool:
        """Whether a valid request that has something to do must fail: in place, pages that
        somebody holds do not become private."""
        area = range(request.first, request.first + request.count)
        return request.kind == UNSHARE and not self.held.isdisjoint(area)

    def all_settled(self, request: Request) -> bool:
        """Whether all of a valid request's pages are as it wants them."""
        area = self.pages[request.first : request.first + request.count]
        return all(self._is_settled(page, request.kind) for page in area)

    def widened(self, request: Request) -> Request:
        """A valid request and all pages around it that are as it wants them."""
        first, end = request.first, request.first + request.count
        while first and self._is_settled(self.pages[first - 1], request.kind):
            first -= 1
        while end < len(self.pages) and self._is_settled(self.pages[end], request.kind):
            end += 1
        return Request(request.kind, first, end - first)

    def _is_settled(self, page: Page, kind: str) -> bool:
        return (page.state is State.SHARED) == (kind == SHARE)

    def _move(self, page: Page, state: State) -> None:
        """A change of state in place."""
        if page.state is not state:
            page.state = state
            page.shared.discard()
            page.private.discard()

    def _share(self, page: Page) -> None:
        if page.state is State.DEFERRED and not page.kept:
            page.shared.discard()
        page.state = State.SHARED
        page.private.discard()

    def failed(self, request: Request, states: list[str], *, applied: bool) -> None:
        """The request failed half way: all is as before, except that discards which were owed
        may have been made. In place pages may have changed (to `states`) for good, and once KVM
        has `applied` the change, nobody knows what those hold that were taken back."""
        for number in range(request.first, request.first + request.count):
            page = self.pages[number]
            if self.in_place:
                before = page.state
                self._move(page, State(states[number]))
                if applied and page.state is before and before.value != _WANTED[request.kind]:
                    page.current.word = None
                    self.in_doubt = True
            elif request.kind == SHARE and page.state is State.DEFERRED and not page.kept:
                page.shared.word = None
                self.in_doubt = True

    def settle(self) -> None:
        """Every discard that was put off is made."""
        for page in self.pages:
            if page.state is State.DEFERRED:
                page.state = State.PRIVATE
                page.shared.discard()

    def settle_failed(self) -> None:
        """Some may have been made."""
        for page in self.pages:
            if page.state is State.DEFERRED:
                page.shared.word = None
                self.in_doubt = True

    def host_may(self, first: int, count: int) -> bool:
        """Whether the host may touch all of these pages."""
        return all(p.state is State.SHARED for p in self.pages[first : first + count])

    def resident(self) -> tuple[int, int] | None:
        """Pages behind the private and the shared side; None when in doubt."""
        if self.in_doubt:
            return None
        private = sum(page.private.resident for page in self.pages)
        return private, sum(page.shared.resident for page in self.pages)

    def states(self) -> list[str]:
        return [page.state.value for page in self.pages]
