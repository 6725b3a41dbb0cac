"""A scheme of one's own: conversions that cost what they would on other hardware.

    pyvmm --private-mem --scheme vmm.examples.costly_scheme:Costly

Isolation is that of the `cbit` scheme; each conversion takes a time for itself and one for each
4 KiB page on top, so that a policy's worth can be seen where conversions are dear.
"""

from __future__ import annotations

import time

from vmm import Kind, Range
from vmm.conversion.schemes.cbit import CbitScheme


class Costly(CbitScheme):
    """`each` and `page` are seconds."""

    name = "costly-cbit"
    like = "cbit"  # whose VM, guests and backings it takes
    each = 20e-6
    page = 2e-6

    def apply(self, area: Range, kind: Kind) -> None:
        time.sleep(self.each + self.page * (area.size // 4096))
        super().apply(area, kind)
