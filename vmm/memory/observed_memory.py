"""Guest memory whose host is not told of shares: what is private shows when it is tried."""

from __future__ import annotations

from collections.abc import Sequence

from vmm.core.errors import PrivateAccess
from vmm.core.lean_typing import NamedTuple, NoReturn
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backings.protected_memfd import ProtectedMemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState, Residency

MOST_PROBED = 256
"""Pages that `observe` tries unless it is told otherwise: up to 2 ms each where KVM is emulated."""


class Observation(NamedTuple):
    """What trying a few pages has shown; `reached` ones are shared, or nobody's yet: the host's
    kernel doesn't tell these apart."""

    tried: int
    private: int
    reached: int


class ObservedMemory(GuestMemory):
    """GuestMemory of a protected guest (pKVM), which shares and unshares its pages by itself.

    Every page is OBSERVED: an access is tried, and the kernel's EFAULT is the PrivateAccess that
    GuestMemory would have raised. Two things differ from there: an access that is refused may have
    moved the bytes before the first private page, and a page may become private at any moment,
    which makes the next access fail and no byte wrong. There are no conversions to wait for.
    """

    told = False
    _open = PageState.OBSERVED

    def __init__(self, ram: Sequence[Range], backing: ProtectedMemfdBacking) -> None:
        super().__init__(ram, backing)
        self._backing = backing
        self._locked_before = 0

    def launched(self) -> None:
        """The backing is sealed: from here on its fd refuses all that could destroy a page.

        It comes after everything that needs the fd (loading) and before the first KVM_RUN.
        Raises OSError.
        """
        self._locked_before = locked_bytes()
        self._backing.seal()

    def discard(self, gpa: int, size: int) -> NoReturn:
        """Refused: a page that the guest has touched is its own until it ends."""
        raise PrivateAccess(
            f"discard of {size:#x} bytes at {gpa:#x}: a protected guest's pages can't be taken back"
        )

    # -- what can be found out ----------------------------------------------------------------

    def probe(self, pages: Sequence[int]) -> list[bool]:
        """Whether the host reaches each page (by its GPA), found out by reading a byte.

        Raises UnmappedAccess. A page that nobody has touched is made by that.
        """
        with self._lock:
            for gpa in pages:
                self._require_shared(gpa, 1)
        return self._backing.probe(pages)

    def observe(self, most: int = MOST_PROBED) -> Observation:
        """Try up to `most` pages, evenly spread over RAM."""
        count = sum(area.size for area in self.ram) // PAGE_SIZE
        most = min(most, count)
        chosen = [self._page(number * count // most) for number in range(most)]
        reached = sum(self.probe(chosen))
        return Observation(most, most - reached, reached)

    def _page(self, number: int) -> int:
        for area in self.ram:
            if number < area.size // PAGE_SIZE:
                return area.start + number * PAGE_SIZE
            number -= area.size // PAGE_SIZE
        raise ValueError(f"page {number} is behind RAM")

    def donated_bytes(self) -> int:
        """Pages that the guest has touched since it was launched, whether it shares them or not:
        KVM counts them as locked memory of this process."""
        return max(0, locked_bytes() - self._locked_before)

    def residency(self) -> Residency:
        """Donated pages as private ones, an upper bound: the guest may have shared some of them.
        The rest is what the loader has written and the guest not touched yet."""
        donated = self.donated_bytes()
        return Residency(donated, max(0, self._backing.resident_bytes() - donated))

    def accounted(self) -> dict[str, int | None]:
        return {
            "private_bytes": None,
            "shared_bytes": None,
            "donated_bytes": self.donated_bytes(),
            "resident_bytes": self._backing.resident_bytes(),
        }


def locked_bytes() -> int:
    """VmLck of this process (proc(5)), in bytes."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmLck:"):
                return int(line.split()[1]) << 10
    return 0
