"""What the trace has of a conversion: the request as the guest put it, and what became of pages."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm_bindings import KvmError
from tests.support.conversion import Answering, RecordingScheme, share, unshare
from tests.support.memory import guest_memory, pages
from tests.support.trace import rows_of, start_recorder
from vmm.conversion.tracing import ConversionTrace
from vmm.conversion.transaction import Converter
from vmm.policy import Allow, Convert, Decision, Defer, Deny, Kill, Partial, PolicyKill
from vmm.trace.layout import DECISIONS, NO_ANSWER
from vmm.trace.reader import Trace


class Bench:
    """64 pages, 32..63 private, a policy that answers `decision`, and a trace."""

    def __init__(self, converter: Converter, scheme: RecordingScheme, policy: Answering) -> None:
        self.convert = converter.convert
        self.converter = converter
        self.scheme = scheme
        self.policy = policy
        self.now = 0.0

    def answer(self, decision: Decision) -> None:
        self.policy.answer = decision


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    recorder = start_recorder(tmp_path / "t")
    with guest_memory(pages(32, 32)) as memory:
        scheme, policy = RecordingScheme(memory), Answering(Allow())
        converter = Converter(
            memory, scheme, policy, clock=lambda: made.now, observer=ConversionTrace(recorder)
        )
        made = Bench(converter, scheme, policy)
        made.close = recorder.close  # type: ignore[attr-defined]
        yield made
        recorder.close()


def requests(bench: Any, path: Path) -> list[tuple[str, int, int, str, int]]:
    """(kind, first page, pages, decision, errno) of every request."""
    bench.close()
    return [
        (r["kind"], r["gpa"] // 4096, r["bytes"] // 4096, DECISIONS[r["decision"]], r["errno"])
        for r in rows_of(path / "t")
        if r["kind"] != "state"
    ]


def changes(bench: Any, path: Path) -> list[tuple[str, int, int]]:
    """(state, first page, pages) of every change."""
    bench.close()
    rows = [r for r in rows_of(path / "t") if r["kind"] == "state"]
    return [(r["name"], r["gpa"] // 4096, r["bytes"] // 4096) for r in rows]


def test_trace_of_allowed_requests_has_them_and_their_states(bench: Bench, tmp_path: Path) -> None:
    bench.convert(share(40, 4))
    bench.convert(unshare(41, 1))
    bench.convert(share(40, 1))  # is there already

    assert requests(bench, tmp_path) == [
        ("share", 40, 4, "allow", 0),
        ("unshare", 41, 1, "allow", 0),
        ("share", 40, 1, "allow", 0),
    ]
    assert changes(bench, tmp_path) == [("shared", 40, 4), ("private", 41, 1)]


def test_trace_has_the_doorbell_the_vcpu_and_times_that_nest(bench: Bench, tmp_path: Path) -> None:
    bench.convert(share(40, 4)._replace(vcpu=3, doorbell="hypercall"))
    bench.close()  # type: ignore[attr-defined]

    state, request = rows_of(tmp_path / "t")
    assert (request["vcpu"], request["name"]) == (3, "hypercall")
    assert request["time_ns"] <= state["time_ns"]
    ends = [row["time_ns"] + row["latency_ns"] for row in (state, request)]
    assert ends[0] <= ends[1]


@pytest.mark.parametrize(
    ("decision", "word", "answer", "changed"),
    [
        (Deny(errno.EPERM), "deny", errno.EPERM, []),
        (Partial(pages(42, 2)), "partial", errno.EAGAIN, [("private", 42, 2)]),
        (Convert(pages(36, 8)), "convert", 0, [("private", 36, 8)]),
        (Defer(9.0), "defer", 0, [("deferred", 40, 4)]),
    ],
)
def test_trace_of_a_decision_has_what_was_asked_and_what_was_done(
    bench: Bench, tmp_path: Path, decision: Decision, word: str, answer: int, changed: list[Any]
) -> None:
    bench.convert(share(40, 4))
    bench.answer(decision)

    bench.convert(unshare(40, 4))

    assert requests(bench, tmp_path)[1:] == [("unshare", 40, 4, word, answer)]
    assert changes(bench, tmp_path)[1:] == changed


def test_trace_names_the_policy_whose_word_it_was(bench: Bench, tmp_path: Path) -> None:
    bench.convert(share(40, 4))
    bench.answer(Deny())
    bench.convert(unshare(40, 4))
    bench.convert(unshare(40, 1 << 40))  # invalid: nobody's word
    bench.close()  # type: ignore[attr-defined]

    names = Trace(tmp_path / "t").names
    by = [names[row["detail"] >> 16] for row in rows_of(tmp_path / "t") if row["kind"] != "state"]
    assert by == ["", "Answering", ""]


def test_trace_of_a_deferral_has_only_what_changed(bench: Bench, tmp_path: Path) -> None:
    bench.convert(share(40, 2))
    bench.answer(Defer(9.0))

    bench.convert(unshare(40, 4))

    assert changes(bench, tmp_path)[1:] == [("deferred", 40, 2)]


def test_trace_has_the_late_discard_of_deferred_pages(bench: Bench, tmp_path: Path) -> None:
    bench.convert(share(40, 4))
    bench.answer(Defer(9.0))
    bench.convert(unshare(40, 4))

    bench.now = 10.0
    bench.converter.settle()

    assert changes(bench, tmp_path)[1:] == [("deferred", 40, 4), ("private", 40, 4)]


def test_trace_of_a_request_that_no_policy_saw_says_so(bench: Bench, tmp_path: Path) -> None:
    bench.convert(share(40, 1 << 60))
    bench.convert(share(0, 1)._replace(gpa=5))

    expected = [("share", 40, (1 << 52) - 1, "none", 22), ("share", 0, 1, "none", 22)]
    assert requests(bench, tmp_path) == expected
    assert changes(bench, tmp_path) == []


def test_trace_of_a_conversion_that_failed_has_the_errno_and_no_change(
    bench: Bench, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise KvmError("KVM_SET_MEMORY_ATTRIBUTES", errno.ENOMEM)

    bench.scheme.before_apply = fail
    bench.convert(share(40, 1))

    assert requests(bench, tmp_path) == [("share", 40, 1, "allow", errno.ENOMEM)]
    assert changes(bench, tmp_path) == []


def test_trace_of_a_kill_has_no_answer(bench: Bench, tmp_path: Path) -> None:
    bench.answer(Kill("enough"))

    with pytest.raises(PolicyKill):
        bench.convert(share(40, 1))

    assert requests(bench, tmp_path) == [("share", 40, 1, "kill", NO_ANSWER)]
