"""Tests of minutes, which run when they are asked for."""

from __future__ import annotations

import os

import pytest

FORCE = "PYVMM_LAB_SLOW"

slow = pytest.mark.skipif(not os.environ.get(FORCE), reason=f"{FORCE}=1 runs these tests")
