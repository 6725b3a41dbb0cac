"""numpy as the trace's readers use it; nothing on a guest's way imports this."""

from __future__ import annotations

import os
from typing import Any

# Else numpy's linear algebra, which nobody asks for, makes a thread per processor on import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mmap_ninja
import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]
Booleans = NDArray[np.bool_]

__all__ = ["Booleans", "Floats", "Integers", "NDArray", "mmap_ninja", "np"]
