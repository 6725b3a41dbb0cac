"""Every built-in policy on a stock kernel, and a stock kernel that is steered from outside."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.bench import policies
from tests.lab.conftest import Starter
from tests.lab.programs import guest, program_words, result_of
from vmm.lab.interpreter import executable
from vmm.lab.machine import Lab
from vmm.policy import builtin

MIB = 1 << 20


def test_stock_kernel_under_every_built_in_policy(lab: Lab, lab_start: Starter) -> None:
    # Bounds that say yes are stacked: a guest more takes a quarter of a minute.
    names = ["bounds together", "DenyAfterBoot", "Quota 32M"]
    names += ["Hysteresis", "KeepShared", "Coalesce", "DeferredDiscard"]
    tried = " ".join(policies.POLICIES[name] for name in names)
    assert all(name in tried for name in builtin.__all__)

    words = policies.arguments_of(*guest(lab), 1, names)
    result = result_of(lab_start([str(executable()), *words], program=True))

    runs = {name: each[0] for name, each in result["runs"].items()}
    plain = runs["bounds together"]["report"]["conversions"]
    for name, run in runs.items():
        # Linux does not look at the answer: a refused ring is one that the device won't touch.
        assert run["hung"] == ("churn" if name in policies.STOPPING else None), (name, run)
        assert run["disk_agrees"], (name, run)
        report = run["report"]
        share, unshare = report["conversions"]["share"], report["conversions"]["unshare"]
        assert share["failed"] == unshare["failed"] == unshare["denied"] == 0, (name, report)
        if name in policies.STOPPING:
            assert share["denied"] > 0 and report["io"]["blk0"]["refused"] == 1, (name, report)
            continue
        assert run["status"] == 0, (name, run)
        assert report["io"]["blk0"]["refused"] == 0, (name, report)
        # Whatever a policy makes of them, the guest asks for the same conversions.
        assert share["calls"] == plain["share"]["calls"], (name, report)
        assert unshare["calls"] == plain["unshare"]["calls"], (name, report)
        assert (share["denied"] > 0) == (name == "Quota 32M"), (name, report)

    shared = {name: run["report"]["pages"]["shared_bytes"] for name, run in runs.items()}
    assert shared["Quota 32M"] <= 32 * MIB < 64 * MIB < shared["bounds together"] <= 80 * MIB
    made = {name: run["report"]["refinements"] for name, run in runs.items()}
    for name in ("Hysteresis", "KeepShared", "Coalesce", "DeferredDiscard"):
        # Again and again the disk's ring was given up and wanted back at once.
        assert made[name]["deferred_bytes"] > MIB, (name, made)
        assert made[name]["reclaimed_bytes"] > 0, (name, made)
    assert made["Coalesce"]["widened"] > 0
    assert made["bounds together"]["deferred_bytes"] == 0
    # What is kept is the guest's no longer, and the host's neither.
    assert runs["KeepShared"]["report"]["pages"]["deferred_bytes"] > MIB
    lines, first, last = result["audit"]
    assert lines == plain["share"]["calls"] + plain["unshare"]["calls"] + 1
    assert json.loads(first)["decision"] == "Allow()"
    assert json.loads(last)["exit"] == "poweroff"


def test_stock_kernel_is_steered_from_outside(lab: Lab, lab_start: Starter) -> None:
    seen = result_of(lab_start(program_words("steer", *guest(lab)), program=True, cpus=1))

    assert seen["booted"]
    first, *others = seen["paused"]
    assert first["status"]["state"] == "paused"
    for other in others:
        for what in ("pages", "io", "exits", "conversions", "residency"):
            assert other[what] == first[what], what
    assert seen["going"]["io"]["blk0"]["requests"] > first["io"]["blk0"]["requests"]

    def state_of(dump: dict[str, Any]) -> str:
        (state,) = [state for gpa, size, state in dump["pages"] if gpa <= seen["last"] < gpa + size]
        return str(state)

    asked = [seen[name]["ok"] for name in ("unshare", "share", "too much", "nowhere")]
    assert asked == [True, True, False, False]
    assert "EACCES" in seen["too much"]["error"] and "EINVAL" in seen["nowhere"]["error"]
    assert state_of(seen["after unshare"]) == "private"
    assert state_of(seen["after share"]) == "shared"
    assert seen["after too much"]["conversions"]["share"]["denied"] == 1
    assert "42" in seen["alive"]
    assert re.search(r"pyvmm: running for .* shared in .*\npyvmm: \[[.#+]{64}\]", seen["stderr"])
    assert seen["by ctl"] == seen["quit"] == [0, {"ok": True}]
    assert (seen["status"], seen["left"]) == (0, False)
