"""The Python inside a lab machine, whichever it is: what the images ask of it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class LabPython(Protocol):
    """An interpreter with its standard library and pyvmm's distributions, for a root image."""

    @property
    def executable(self) -> Path:
        """Where the interpreter is inside."""
        ...

    @property
    def bytecode(self) -> str:
        """Names the form of its compiled files: sys.implementation.cache_tag there."""
        ...

    def key(self) -> str:
        """Changes when anything that goes into an image is another."""
        ...

    def lay_out_links(self, stage: Path) -> None:
        """The root's links (bin, lib ...), and what the C library's loader looks at."""
        ...

    def fill(self, stage: Path, site: Path) -> None:
        """Interpreter, standard library, libraries below `stage`; distributions below `site`."""
        ...

    def compile(self, stage: Path) -> None:
        """Compiled files for every module below `stage`, taken without a look at sources.

        At some 50 times less than native speed, compiling would dominate every start.
        """
        ...

    def add_extension(self, bindings: Path) -> None:
        """Puts the machine's own extension into the copy of kvm_bindings at `bindings`."""
        ...
