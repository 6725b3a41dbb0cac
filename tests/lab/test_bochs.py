"""The lab's slow host, where guests run whose code KVM cannot read. Minutes, so only when asked."""

from __future__ import annotations

import json

import pytest

from tests.lab.conftest import Starter
from tests.lab.slow import slow
from tests.support.private_code import EXPECTED

_SCRIPT = """
python3 -m tests.support.private_code </dev/null
pyvmm --private-mem --scheme attributes </dev/null | tail -n 1
read -r line && echo "$line was read"
"""

pytestmark = [pytest.mark.timeout(1200), slow]


def test_code_in_private_memory_runs_under_bochs_and_not_under_qemu(lab_start: Starter) -> None:
    results = {}
    for host in ("bochs", "sw-protected"):
        run = lab_start(["sh", "-c", _SCRIPT], program=True, host=host)
        run.send(b"a line\n")
        assert run.wait(900) == 0, bytes(run.stderr.data)
        private_code, payload, line = bytes(run.stdout.data).decode().splitlines()
        assert "checks passed" in payload
        assert line == "a line was read"
        results[host] = json.loads(private_code)

    assert results["bochs"] == EXPECTED
    # QEMU's emulated SVM has no nrip-save; once it has, this host is not needed any more.
    for name, value in EXPECTED.items():
        assert results["sw-protected"][name] != value
