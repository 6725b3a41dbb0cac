"""Runs a fuzz target with hypothesis, whose search climbs towards inputs that reach more code."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings, target
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, corpus

LONGEST = 512


class LineCounter:
    """Counts the distinct lines of pyvmm that a call runs."""

    def __init__(self) -> None:
        self.all: set[tuple[CodeType, int]] = set()
        """Every line seen so far."""
        self._lines: set[tuple[CodeType, int]] = set()

    def run(self, call: Callable[[], None]) -> int:
        """How many lines one call ran."""
        self._lines = set()
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            call()
        finally:
            sys.settrace(before)
        self.all |= self._lines
        return len(self._lines)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if "/vmm/" in frame.f_code.co_filename else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self._lines.add((frame.f_code, frame.f_lineno))
        return self._line


def inputs(name: str) -> st.SearchStrategy[bytes]:
    """Inputs of the corpus with changes, and anything at all."""
    kept = corpus(name)
    edges = st.sampled_from([0, 1, 0xFF, 0x7F, 0x80, 0x10, 0x20])

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        data = bytearray(b"".join(draw(st.lists(st.sampled_from(kept), min_size=1, max_size=3))))
        for _ in range(draw(st.integers(0, 6))):
            place = draw(st.integers(0, len(data)))
            data[place : place + 1] = bytes([draw(edges | st.integers(0, 255))])
        return bytes(data[:LONGEST])

    return changed() | st.binary(max_size=LONGEST)


def search(name: str, examples: int, run_seed: int, seconds: float = 0.0) -> LineCounter:
    """Run a target on `examples` inputs (or for `seconds`). Raises what the target raises, with
    the input in a note. The lines reached."""
    lines = LineCounter()
    run = TARGETS[name]
    deadline = time.monotonic() + seconds if seconds else None

    @seed(run_seed)
    @settings(
        max_examples=examples if deadline is None else 10**9,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.target, Phase.shrink],
    )
    @given(inputs(name))
    def attempt(data: bytes) -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise _TimeIsUp
        try:
            target(float(lines.run(lambda: run(data))), label="lines of pyvmm run")
        except Exception as error:
            error.add_note(f"for the corpus: {data.hex()}  # seed {run_seed}")
            raise

    for data in corpus(name):
        lines.run(lambda data=data: run(data))  # type: ignore[misc]
    try:
        attempt()
    except _TimeIsUp:
        pass
    return lines


class _TimeIsUp(BaseException):
    """Not a finding: ends the search at once."""


def run_atheris(name: str, words: list[str]) -> None:
    """libFuzzer's loop; doesn't return. Raises ImportError where atheris is not installed."""
    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

    atheris.instrument_all()
    atheris.Setup([f"fuzz-{name}", *words], lambda data: TARGETS[name](bytes(data)))
    atheris.Fuzz()


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided")
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--atheris", action="store_true", help="with libFuzzer's loop instead")
    options, rest = parser.parse_known_args(words)
    if options.atheris:
        run_atheris(options.target, rest)
    print(f"{options.target}: seed {options.seed}, {options.seconds:g} s", flush=True)
    lines = search(options.target, 0, options.seed, options.seconds)
    print(f"{options.target}: nothing found; {len(lines.all)} lines of pyvmm reached")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
