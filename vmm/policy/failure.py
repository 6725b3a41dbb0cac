"""What a policy's author gets to see when a hook fails: what it was asked, and where it broke; and
other authors of the user's own code."""

from __future__ import annotations

import code
import contextlib
import sys
import traceback
from pathlib import Path

from vmm.core.lean_typing import Any
from vmm.core.own_code import ExtensionError
from vmm.policy.protocol import End, Event, IoEvent, PolicyError

_OURS = Path(__file__).resolve().parents[1]
_EXAMPLES = (_OURS / "policy" / "builtin", _OURS / "examples")

_BANNER = """
The guest stands still, before the exit that asked. In scope: {names}.
Ctrl-D ends the run.
"""


def explain(error: PolicyError | ExtensionError) -> str:
    """The event and the traceback of the policy's own code; empty where nothing was raised."""
    if error.__cause__ is None:
        return ""
    lines = [f"  {name}: {value}\n" for name, value in _events(error)]
    trace = traceback.TracebackException.from_exception(error.__cause__)
    _keep_the_users(trace)
    return "".join([*lines, *trace.format()])


def scope(error: PolicyError | ExtensionError) -> dict[str, Any]:
    """What the prompt has names for; `local` are the variables where the policy broke."""
    cause = error.__cause__
    names: dict[str, Any] = {"exception": cause or error}
    if isinstance(error, PolicyError):
        names["policy"] = error.policy
    else:
        names["extension"] = error.of
    for value in _given(error):
        names["view" if not isinstance(value, Event | IoEvent | End) else "event"] = value
    for frame, _ in traceback.walk_tb(None if cause is None else cause.__traceback__):
        if _is_the_users(frame.f_code.co_filename):
            names["local"] = dict(frame.f_locals)
    return names


def open_prompt(error: PolicyError | ExtensionError) -> None:
    """A Python prompt on stdin and stdout; returns at its end of file."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing, where Python has it
    names = scope(error)
    banner = _BANNER.format(names=", ".join(names)).strip()
    with contextlib.suppress(SystemExit):  # exit() leaves the prompt, with the run's own status
        code.interact(banner, local=names, exitmsg="")


def show(error: PolicyError | ExtensionError, *, prompt: bool) -> None:
    """Tell the user, on stderr, and open a prompt if that is wanted."""
    details = explain(error)
    if details and sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(details, end="", file=sys.stderr, flush=True)
    if prompt:
        open_prompt(error)


def _given(error: PolicyError | ExtensionError) -> tuple[object, ...]:
    return error.given if isinstance(error, PolicyError) else ()


def _events(error: PolicyError | ExtensionError) -> list[tuple[str, str]]:
    described = []
    for value in _given(error):
        if isinstance(value, Event):
            area = f"{value.area}, {value.area.size >> 10} KiB"
            who = f"by vCPU {value.vcpu}, {value.doorbell}"
            described.append(("event", f"{value.kind.value} {area}, {who}"))
        elif isinstance(value, IoEvent):
            verb = "writes" if value.is_write else "reads"
            named = f"named by a {value.named}" if value.named else "that nothing names"
            what = f"{value.device} {verb} {value.area}, {value.area.size} bytes, {named}"
            described.append(("event", what))
        elif isinstance(value, End):
            described.append(("event", f"end of the run, {value.exit}: {value.reason}"))
    return described


def _is_the_users(filename: str) -> bool:
    path = Path(filename).absolute()
    return _OURS not in path.parents or bool({*_EXAMPLES} & {*path.parents})


def _keep_the_users(trace: traceback.TracebackException) -> None:
    """Drop our own frames, in everything that led to the exception, too."""
    trace.stack = traceback.StackSummary.from_list(
        [frame for frame in trace.stack if _is_the_users(frame.filename)]
    )
    for other in (trace.__cause__, trace.__context__, *(trace.exceptions or ())):
        if other is not None:
            _keep_the_users(other)
