"""For all tests: the compiled extension must be what its sources say."""

from __future__ import annotations

from pathlib import Path

import pytest

BINDINGS = Path(__file__).resolve().parents[1] / "kvm_bindings"
SOURCES = ("kvm_abi.h", "bindings.c", "build.py")


def pytest_configure() -> None:
    """An extension older than its sources fails in ways that say nothing of the cause."""
    newest = max((BINDINGS / name).stat().st_mtime for name in SOURCES)
    for extension in BINDINGS.glob("_kvm.*so"):  # beside the sources in an editable install only
        if extension.stat().st_mtime < newest:
            pytest.exit(
                "kvm_bindings is newer than its compiled extension; run python "
                "kvm_bindings/build.py",
                returncode=2,
            )
