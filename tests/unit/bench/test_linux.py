"""The sessions with a shell: what is measured, by whose clock, and a shell that fails."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from vmm.bench import linux
from vmm.bench.network import Peer
from vmm.core.errors import HostError

# A guest's shell; the lines that it reads go to a file as well.
SHELL = """
import sys
print("Linux booted\\r\\n/ # ", end="", flush=True)
for line in sys.stdin:
    with open({log!r}, "a") as log:
        log.write(line)
    fio = {fio!r} if "fio/run" in line else ""
    print(line.strip() + "\\r\\n" + fio + {answer} + "/ # ", end="", flush=True)
"""
DONE = '"42\\r\\n"'
STEPS = [linux.Step("prepare"), linux.Step("work", "some work"), linux.Step("more", "more")]


def guest(*, fio: str | None = "fio.img", peer: Peer | None = None) -> linux.Guest:
    return linux.Guest("kernel", "initrd", "disk.img", fio, peer)


def shell(answer: str = DONE, fio: str = "0;16000;77;0;0\r\n", log: str = "/dev/null") -> list[str]:
    return [sys.executable, "-c", SHELL.format(answer=answer, fio=fio, log=log)]


def test_session_times_the_boot_and_the_steps_that_are_cases() -> None:
    taken = linux.session(shell(), STEPS)

    assert [case for case, _ in taken] == [linux.BOOT, "some work", "more"]
    assert all(milliseconds > 0 for _, milliseconds in taken)


@pytest.mark.parametrize("answer", ['"sh: dd: not found\\r\\n"', 'sys.exit("died")'])
def test_session_whose_shell_fails_is_no_measurement(answer: str) -> None:
    with pytest.raises(HostError, match=r"did not do|did not come to a prompt"):
        linux.session(shell(answer), STEPS)


def test_fios_own_time_is_taken() -> None:
    step = linux.Step("/fio/run", "fio", by_fio=True)

    assert linux.session(shell(fio="0;0;0;16000;321\r\n"), [step])[1] == ("fio", 321.0)


@pytest.mark.parametrize("said", ["", "5;16000;77;0;0\r\n", "0;15996;77;0;0\r\n"])
def test_fio_that_failed_or_did_less_is_no_measurement(said: str) -> None:
    with pytest.raises(HostError, match="fio did not do its 4000 requests"):
        linux.session(shell(fio=said), [linux.Step("/fio/run", "fio", by_fio=True)])


def test_measure_gives_every_monitor_its_turns_and_few_the_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logs = tmp_path / "pyvmm", tmp_path / "qemu"
    monkeypatch.setattr(linux, "pyvmm", lambda *options: shell(log=str(logs[0])))
    monkeypatch.setattr("vmm.bench.qemu.linux_guest", lambda *options: shell(log=str(logs[1])))
    monkeypatch.setattr(linux, "ENGINES", ("auto", "pread"))
    told: list[str] = []

    whole = guest(peer=Peer(1111, 2222))
    series = list(linux.measure(whole, 2, ["qemu"], told.append))

    turns = [text.rpartition(", ")[2] for text in told[1:]]
    assert turns[:5] == turns[:4:-1]  # the second round the other way round
    assert set(turns) == {
        "pyvmm auto", "pyvmm --private-mem auto", "pyvmm pread", "pyvmm --private-mem pread", "QEMU"
    }  # fmt: skip
    assert all(len(one.samples) == 2 for one in series)
    by_case = Counter(one.case for one in series)
    network = {case: count for case, count in by_case.items() if case.startswith("network")}
    assert network == {"network: 8 MiB to the guest": 3, "network: 8 MiB from the guest": 3}
    assert set((by_case - Counter(network)).values()) == {5}
    assert {one.samples[0] for one in series if one.case.startswith("fio")} == {77.0}
    lines = {name: log.read_text() for name, log in zip(("pyvmm", "QEMU"), logs, strict=True)}
    assert lines["pyvmm"].count("nc 192.0.2.1 1111") == 4
    assert lines["QEMU"].count("nc 192.0.2.1 1111") == 2


def test_guest_that_crashes_once_gets_another_turn_and_is_told_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    crash = f'("42\\r\\n" if len(open({str(log)!r}).readlines()) != 2 else sys.exit("crashed"))'
    monkeypatch.setattr(linux, "pyvmm", lambda *options: shell(crash, log=str(log)))
    monkeypatch.setattr(linux, "ENGINES", ("auto",))
    series = []

    with pytest.raises(HostError, match=r"1 session\(s\) broke off: pyvmm auto: "):
        for one in linux.measure(guest(), 2, None, lambda turn: None):
            series.append(one)

    assert {one.subject for one in series} == {"pyvmm auto", "pyvmm --private-mem auto"}
    assert all(len(one.samples) == 2 for one in series)


def test_guest_that_always_crashes_loses_only_its_own_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crash = shell('sys.exit("crashed")')
    monkeypatch.setattr(linux, "pyvmm", lambda *options: shell())
    monkeypatch.setattr("vmm.bench.qemu.linux_guest", lambda *options: crash)
    monkeypatch.setattr(linux, "ENGINES", ("auto",))
    series = []

    with pytest.raises(HostError, match=r"2 session\(s\) broke off: QEMU: .*QEMU: "):
        for one in linux.measure(guest(), 1, ["qemu"], lambda turn: None):
            series.append(one)

    assert {one.subject for one in series} == {"pyvmm auto", "pyvmm --private-mem auto"}


def test_without_fio_or_network_neither_is_done() -> None:
    cases = [step.case for step in linux.steps(guest(fio=None), transfers=True)]

    assert not any(case is None or "fio" in case or "network" in case for case in cases)
