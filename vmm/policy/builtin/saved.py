"""What the built-in policies take out of a snapshot: numbers and flags that anybody may have
written."""

from __future__ import annotations

import math
from typing import Any


def number(state: Any, name: str) -> float:
    """The finite number of that name, 0 or more. Raises KeyError, TypeError, ValueError."""
    value = state[name]
    if type(value) not in (int, float):
        raise TypeError(f"{name} is {value!r:.40}, not a number")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}, not 0 or more")
    return float(value)


def flag(state: Any, name: str) -> bool:
    """The flag of that name. Raises KeyError, TypeError."""
    value = state[name]
    if type(value) is not bool:
        raise TypeError(f"{name} is {value!r:.40}, not true or false")
    return value
