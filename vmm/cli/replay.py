"""`pyvmm replay`: what other policies would have made of a trace's requests."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any

from vmm.cli.output import aligned, printing
from vmm.cli.parsers import replay_parser as parser
from vmm.core.errors import one_line, tell
from vmm.policy.loader import load_policy
from vmm.policy.protocol import BrokenOff
from vmm.replay.figures import recorded, replayed
from vmm.replay.replay import Replay
from vmm.trace.cost import CostModel, Line, Requests, learn, requests_of
from vmm.trace.reader import Trace
from vmm.trace.summary import duration_ns, errno_name
from vmm.trace.views.tables import Row
from vmm.trace.views.units import bytes_text, count_text, time_text

_SHOWN_REFUSALS = 10
HOOK_SECONDS = 3.0
"""How long a policy's hook may take before somebody is told which one it is."""


def run(arguments: Sequence[str]) -> int:
    """The whole command; raises UsageError, PolicyError."""
    options = parser().parse_args(arguments)
    policies = [load_policy(spec, words) for spec, words in options.policy]
    with closing(Trace(options.trace)) as trace:
        requests = requests_of(trace)
        model = learn(trace, requests)
        with closing(Replay(trace, requests, policies)) as replay:
            with telling_who_does_not_return(replay), interruptible(replay):
                replay.run(model, duration_ns(trace))
            found = _found(trace, requests, model, replay)
    found["policies"] = [[spec, *words] for spec, words in options.policy]
    with printing():
        if options.json:
            print(json.dumps(found, indent=2))
        else:
            print("\n".join(map(one_line, _lines(found, model, replay))))
    return 0


@contextmanager
def telling_who_does_not_return(replay: Replay, seconds: float = HOOK_SECONDS) -> Iterator[None]:
    """Within the block one line says so when a policy's hook has not returned for so long."""
    ended = threading.Event()

    def look() -> None:
        before: tuple[str | None, int] = (None, 0)
        while not ended.wait(seconds):
            now = replay.converter.undecided, sum(replay.decisions.values())
            if now == before and now[0] is not None:
                tell(f"{now[0]} has not returned for {seconds:g} s; Ctrl-C ends the replay")
                return
            before = now

    looker = threading.Thread(target=look, name="hooks", daemon=True)
    looker.start()
    try:
        yield
    finally:
        ended.set()
        looker.join()


@contextmanager
def interruptible(replay: Replay) -> Iterator[None]:
    """Within the block Ctrl-C ends the replay, also in a policy's hook: else it would look like an
    exception of the policy's own. Main thread only."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        hook = replay.converter.undecided
        raise BrokenOff("" if hook is None else f"in {hook}")

    former = signal.getsignal(signal.SIGINT)
    if former is not signal.default_int_handler:  # ignored, as by nohup
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _found(trace: Trace, requests: Requests, model: CostModel, replay: Replay) -> dict[str, Any]:
    """Everything that is said, JSON-ready."""
    until = duration_ns(trace)
    ended = replay.ended
    return {
        "trace": str(trace.path),
        "model": _model_facts(model),
        "recorded": recorded(trace, requests, model, until),
        "replayed": replayed(replay, until),
        "ended": None if ended is None else {"s": ended[0], "why": ended[1]},
        "refused": [refusal._asdict() for refusal in replay.refused],
        "notes": _notes(trace, replay),
    }


def _model_facts(model: CostModel) -> dict[str, Any]:
    return {
        "share": model.share._asdict(),
        "unshare": model.unshare._asdict(),
        "nothing_ns": model.nothing,
        "nothing_requests": model.idle,
    }


_LABELS = {
    "requests": ("requests", count_text),
    "denied": ("  refused by a policy", count_text),
    "partial": ("  granted in part", count_text),
    "invalid": ("  invalid", count_text),
    "deferred": ("  put off", count_text),
    "joined": ("  joined with others", count_text),
    "conversions": ("conversions while the guest waits", count_text),
    "converted_bytes": ("  bytes", bytes_text),
    "late_discards": ("discards later, by the host", count_text),
    "lends": ("pages lent to devices, times", count_text),
    "lends_refused": ("  refused by a policy", count_text),
    "returns": ("  taken back, times", count_text),
    "lent_bytes_peak": ("  lent at most", bytes_text),
    "shared_bytes_peak": ("shared at most", bytes_text),
    "shared_bytes_mean": ("shared on average", bytes_text),
    "deferred_bytes_mean": ("put off on average", bytes_text),
    "guest_ns": ("the guest waits, by the model", time_text),
    "host_ns": ("the host works besides, by the model", time_text),
    "waited_ns": ("the guest waited, measured", time_text),
}


def _lines(found: dict[str, Any], model: CostModel, replay: Replay) -> list[str]:
    policies = ", ".join(" ".join(words) for words in found["policies"]) or "everything allowed"
    rows = [Row("", ["recorded", "replayed"])]
    for key, (label, show) in _LABELS.items():
        before, after = found["recorded"].get(key), found["replayed"].get(key)
        if before or after:
            cells = ["-" if value is None else show(value) for value in (before, after)]
            change = f"{after / before:.3g}x" if before and after is not None else ""
            rows.append(Row(label, cells, change))
    lines = [f"{found['trace']} against {policies}", "", *aligned(rows), ""]
    lines += ["the model, learnt from this trace:", *_model_lines(model)]
    if found["ended"] is not None:
        lines += ["", f"the run would have ended at {found['ended']['s']:.3f} s: "
                      f"{found['ended']['why']}; what came after is not replayed"]  # fmt: skip
    refusals = replay.refused_requests
    lines += ["", f"refused: {count_text(refusals) if refusals else 'none'}"]
    for each in replay.refused[:_SHOWN_REFUSALS]:
        by = f" by {each.by}" if each.by else ""
        lines.append(
            f"  {each.time_ns / 1e9:.3f} s  {each.kind} {bytes_text(each.bytes)} at "
            f"{each.gpa:#x}: {each.decision}{by}, {errno_name(each.errno)}"
        )
    if refusals > _SHOWN_REFUSALS:
        lines.append("  ... (--json lists them)")
    return [*lines, *(f"note: {note}" for note in found["notes"])]


def _model_lines(model: CostModel) -> list[str]:
    if not model.share.requests and not model.unshare.requests:
        return ["  no conversion was carried out in it: there is nothing to learn costs from"]
    source = f"median of {model.idle}" if model.idle else "none in the trace: the quickest request"
    return [
        f"  share    {_line_text(model.share)}",
        f"  unshare  {_line_text(model.unshare)}",
        f"  a request that changes nothing  {time_text(model.nothing)} ({source})",
    ]


def _line_text(line: Line) -> str:
    slope = f" + {time_text(line.per_byte * 2**20)} per MiB" if line.per_byte else ""
    return f"{time_text(line.fixed)}{slope} ({line.requests} requests of {line.sizes} lengths)"


def _notes(trace: Trace, replay: Replay) -> list[str]:
    notes = ["the guest does not react to other answers: it asks for what it asked for then"]
    if replay.failed_on_host:
        notes.append(
            f"{replay.failed_on_host} requests failed on the host; here they are taken to succeed"
        )
    if replay.residency_asked:
        notes.append(
            "a policy asked for residency, which a trace does not have: every page counted as there"
        )
    if replay.converter.hooks.asks_about_io:
        notes.append("on_io was not asked: a trace has requests, not a device's single accesses")
    if not trace.complete:
        notes.append("the trace is incomplete: its run was killed, or is still going on")
    return notes
