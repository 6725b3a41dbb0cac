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
ROUND = 500
"""Inputs before a search starts again."""


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


def search(name: str, examples: int, run_seed: int) -> LineCounter:
    """Run a target on its corpus and on `examples` inputs. Raises what the target raises, with
    the input in a note. The lines reached."""
    lines = LineCounter()
    run = TARGETS[name]

    def tried(data: bytes) -> int:
        try:
            return lines.run(lambda: run(data))
        except Exception as error:
            error.add_note(f"for the corpus: {data.hex()}  # seed {run_seed}")
            raise

    @seed(run_seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.target, Phase.shrink],
    )
    @given(inputs(name))
    def attempt(data: bytes) -> None:
        target(float(tried(data)), label="lines of pyvmm run")

    for data in corpus(name):
        tried(data)
    attempt()
    return lines


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
    end = time.monotonic() + options.seconds
    reached: set[tuple[CodeType, int]] = set()
    rounds = 0
    while time.monotonic() < end:
        # In rounds, each climbing anew: from one summit there is no other way on.
        reached |= search(options.target, ROUND, options.seed + rounds).all
        rounds += 1
    inputs_tried = rounds * ROUND
    print(f"{options.target}: nothing in {inputs_tried} inputs; {len(reached)} lines reached")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
