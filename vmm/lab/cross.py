"""A C compiler that makes another architecture's code."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from vmm.core.errors import HostError
from vmm.lab.packages import Packages


@dataclass(slots=True)
class CrossCompiler:
    """gcc for `packages.architecture`."""

    packages: Packages

    def program(self) -> Path:
        """The compiler's path."""
        name = f"{self.packages.architecture.triplet}-gcc"
        found = shutil.which(name)
        if found is None:
            raise HostError(f"{name} not found")
        return Path(found)
