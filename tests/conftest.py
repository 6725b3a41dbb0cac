"""For all tests: the compiled extension must be what its sources say, and signals must work."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

BINDINGS = Path(__file__).resolve().parents[1] / "kvm_bindings"
SOURCES = (*BINDINGS.rglob("*.h"), *BINDINGS.rglob("*.c"), BINDINGS / "build.py")


def pytest_configure() -> None:
    _require_current_extension()
    # nohup and a shell's & hand signals on as ignored, to every command that a test starts too.
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def _require_current_extension() -> None:
    """An extension older than its sources fails in ways that say nothing of the cause."""
    newest = max(source.stat().st_mtime for source in SOURCES)
    for extension in BINDINGS.glob("_kvm.*so"):  # beside the sources in an editable install only
        if extension.stat().st_mtime < newest:
            pytest.exit(
                "kvm_bindings is newer than its compiled extension; run python "
                "kvm_bindings/build.py",
                returncode=2,
            )
