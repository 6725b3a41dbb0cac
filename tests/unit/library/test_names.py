"""What `import vmm` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vmm

ROOT = Path(__file__).resolve().parents[3]


def test_every_public_name_is_there_and_documented() -> None:
    for name in vmm.__all__:
        assert getattr(vmm, name).__doc__, name


def test_name_that_is_not_public_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Machina'"):
        vmm.Machina  # noqa: B018


def test_import_alone_brings_nothing_along() -> None:
    script = "import vmm, sys; print(sorted(name for name in sys.modules if name[:4] == 'vmm.'))"

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"
