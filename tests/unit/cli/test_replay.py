"""`pyvmm replay`: what it prints, without a KVM."""

from __future__ import annotations

import errno
import json
import re
import signal
import threading
from pathlib import Path

import pytest

from tests.support.trace import Events
from tests.unit.cli.conftest import Command
from vmm.cli import replay
from vmm.policy import Allow, Decision, Event, Policy, View
from vmm.trace.layout import Kind

POLICIES = """
from vmm.policy import Allow, Deny, Kill, Policy

class Sixteen(Policy):
    def __init__(self, most: int = 16):
        self.left = most
    def on_share(self, event, view):
        self.left -= 1
        return Allow() if self.left >= 0 else Deny()

class Broken(Policy):
    def on_share(self, event, view):
        return 5

class Killer(Policy):
    def on_share(self, event, view):
        return Kill("too much")

class Watching(Policy):
    def on_io(self, event, view):
        return Allow()
"""


class Waits(Policy):
    """Does not answer before `told`."""

    def __init__(self, told: threading.Event) -> None:
        self._told = told

    def on_share(self, event: Event, view: View) -> Decision:
        assert self._told.wait(60)
        return Allow()


@pytest.fixture(autouse=True)
def trace(command: Command, tmp_path: Path) -> None:
    """A trace `t` of 20 shares and one that changed nothing, and `p.py`."""
    made = Events((0, 256, "private"))
    for number in range(20):
        made.convert(Kind.SHARE, 10 * number, 2 * number, 1)
    made.request(Kind.SHARE, 300, 0, 1, took=0.1)
    made.write(tmp_path / "t")
    (tmp_path / "p.py").write_text(POLICIES)


def test_replay_prints_what_would_have_been(command: Command) -> None:
    result = command("replay", "t", "--policy", "p.py:Sixteen")

    assert (result.status, result.err) == (0, "")
    assert "conversions while the guest waits" in result.out
    assert "refused: 5" in result.out
    assert "0.160 s  share 4 KiB at 0x20000: deny by Sixteen, EACCES" in result.out
    assert "the model, learnt from this trace:" in result.out
    assert "note: the guest does not react" in result.out


def test_replay_as_json_has_both_sides_and_the_model(command: Command) -> None:
    words = ["--policy", "p.py:Sixteen", "--policy-arg", "most=5", "--json"]

    told = json.loads(command("replay", "t", *words).out)

    assert told["policies"] == [["p.py:Sixteen", "most=5"]]
    assert (told["recorded"]["conversions"], told["replayed"]["conversions"]) == (20, 5)
    assert told["replayed"]["denied"] == len(told["refused"]) == 16
    assert told["refused"][0]["errno"] == errno.EACCES
    assert told["model"]["share"]["fixed"] == pytest.approx(1e6)
    assert told["recorded"]["guest_ns"] == pytest.approx(told["recorded"]["waited_ns"])
    assert told["replayed"]["guest_ns"] < told["recorded"]["guest_ns"]


def test_replay_without_a_policy_allows_everything(command: Command) -> None:
    told = json.loads(command("replay", "t", "--json").out)

    both = ("requests", "conversions", "converted_bytes", "shared_bytes_peak", "denied")
    assert [told["recorded"][key] for key in both] == [told["replayed"][key] for key in both]


def test_replay_of_a_kill_says_when_and_why(command: Command) -> None:
    out = command("replay", "t", "--policy", "p.py:Killer").out

    assert "the run would have ended at 0.000 s: policy Killer: too much" in out


def test_replay_with_a_policy_about_io_says_that_it_was_not_asked(command: Command) -> None:
    assert "note: on_io was not asked" in command("replay", "t", "--policy", "p.py:Watching").out


def test_replay_with_a_policy_that_breaks_is_status_1(command: Command) -> None:
    result = command("replay", "t", "--policy", "p.py:Broken")

    assert result.status == 1
    assert "policy Broken: on_share for [0x0, 0x1000) returned 5" in result.complaint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such folder; give the DIR of a run with --trace DIR"),
        (["t", "--policy", "p.py:Nobody"], "--policy p.py:Nobody: p.py has no class Nobody"),
        (["t", "--policy-arg", "a=1"], "--policy-arg a=1 has no --policy before it; put it after"),
        ([], "the following arguments are required: DIR; see pyvmm replay --help"),
    ],
)
def test_replay_of_bad_input_is_refused(command: Command, words: list[str], message: str) -> None:
    result = command("replay", *words)

    assert result.status == 2
    assert result.complaint.startswith(message)


def test_replay_names_the_hook_that_does_not_return(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    told = threading.Event()

    def tell(sentence: str) -> None:
        said.append(sentence)
        told.set()

    monkeypatch.setattr(replay, "tell", tell)
    monkeypatch.setattr(replay, "load_policy", lambda spec, words: Waits(told))
    waiting = replay.telling_who_does_not_return
    monkeypatch.setattr(replay, "telling_who_does_not_return", lambda of: waiting(of, 0.01))

    result = command("replay", "t", "--policy", "p.py:Any")

    assert result.status == 0
    assert said == [
        "policy Waits: on_share for [0x0, 0x1000) has not returned for 0.01 s; "
        "Ctrl-C ends the replay"
    ]


def test_replay_of_a_policy_that_answers_says_nothing_of_hooks(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.active_count()

    result = command("replay", "t", "--policy", "p.py:Sixteen")

    assert "returned" not in result.err
    assert threading.active_count() == threads


@pytest.mark.usefixtures("trace")
def test_ctrl_c_in_a_hook_is_not_the_policys_exception(command: Command, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(
        "import signal\n"
        "from vmm.policy import Policy\n"
        "class Long(Policy):\n"
        "    def on_share(self, event, view):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
    )

    result = command("replay", "t", "--policy", "interrupted.py:Long")

    assert result.status == 1
    assert re.fullmatch("interrupted in policy Long: on_share for .*", result.complaint)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
