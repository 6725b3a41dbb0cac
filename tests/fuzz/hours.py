"""Fuzzing for hours: all targets in turn, and what each of them came to.

    python -m tests.fuzz.hours --work FOLDER [--hours H] [--turn SECONDS] [NAME...]
    python -m tests.fuzz.hours --work FOLDER --table          what has come of it so far
    python -m tests.fuzz.hours --work FOLDER --merge [NAME...]  the corpus anew, minimised
    python -m tests.fuzz.hours --work FOLDER --again FILE NAME  one input

The target that has had the least processor time is next, each in a process of its own, at the
lowest priority. FOLDER/turns.jsonl has a line for each turn. A failure ends the target's turn and
no more. Several of these may share a FOLDER, one for each processor: none takes a target that
another one has.
`--merge` chooses few inputs that together reach what all do by libFuzzer's word (as its -merge=1
does), and puts them into tests/fuzz/corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.fuzz import corpora, libfuzzer

TURNS = "turns.jsonl"
MOST_BYTES = 24 << 10
"""Of one target's archive."""
MOST_INPUTS, MOST_INPUTS_SLOW = 40, 12
"""In it, so that a test run can replay all of them."""


def turns(work: Path) -> list[dict[str, Any]]:
    """Those that have been."""
    path = work / TURNS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def take_turns(work: Path, names: list[str], hours: float, seconds: int) -> int:
    """Fuzz until the time is over; 1 if anything has failed. This process has imported all with
    counters."""
    end = time.monotonic() + hours * 3600
    status = 0
    while time.monotonic() < end:
        with next_target(work, names) as name:
            write_seeds(work, name)
            words = [
                *libfuzzer.common_words(libfuzzer.named(name).longest),
                f"-max_total_time={seconds}",
            ]
            result = libfuzzer.run(name, work, words)
            status |= bool(result.failed)
            with open(work / TURNS, "a") as file:
                file.write(json.dumps(result._asdict()) + "\n")
        print(f"{name}: {result.runs} runs, {result.edges} edges", *result.failed, flush=True)
    return status


@contextlib.contextmanager
def next_target(work: Path, names: list[str]) -> Iterator[str]:
    """That of `names` with the fewest seconds that nobody else has; ours until the block ends.
    ValueError: others have them all."""
    spent: dict[str, float] = defaultdict(float)
    for turn in turns(work):
        spent[turn["name"]] += turn["seconds"]
    for name in sorted(names, key=lambda each: spent[each]):
        with open(work / f"{name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield name
            return
    raise ValueError(f"others are at work on each of {', '.join(names)}")


def write_seeds(work: Path, name: str) -> None:
    """Put the target's seeds among its inputs."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stderr(io.StringIO()):  # devices say what becomes of them
        for number, data in enumerate(libfuzzer.named(name).seeds()):
            (folder / f"seed-{number}").write_bytes(data)


def table(work: Path) -> list[str]:
    """What each target came to, a line each."""
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for turn in turns(work):
        by_name[turn["name"]].append(turn)
    rows = ["| target | kept | edges at first | edges | minutes | runs | failures |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, own in sorted(by_name.items()):
        whole = [turn for turn in own if turn.get("edges")]
        rows.append(
            f"| {name} | {len(corpora.corpus(name))} "
            f"| {whole[0]['edges_at_first'] if whole else '-'} "
            f"| {max((turn['edges'] for turn in whole), default='-')} "
            f"| {sum(turn['seconds'] for turn in own) / 60:.0f} "
            f"| {sum(turn.get('runs', 0) for turn in own)} "
            f"| {sum(len(turn['failed']) for turn in own)} |"
        )
    return rows


def merge(work: Path, name: str) -> int:
    """Minimise what there is of a target, and keep it; bytes of its archive."""
    write_seeds(work, name)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        for number, data in enumerate(corpora.corpus(name)):
            Path(scratch, f"kept-{number}").write_bytes(data)
        everything = [*(work / name).iterdir(), *Path(scratch).iterdir()]
        everything.sort(key=lambda path: path.stat().st_size)
        reached = libfuzzer.features(name, everything)
        chosen = covering(reached, MOST_INPUTS_SLOW if is_slow(name) else MOST_INPUTS)
        inputs = [path.read_bytes() for path in chosen]
    while corpora.keep(name, inputs) > MOST_BYTES:
        inputs.pop()
    return (corpora.FOLDER / f"{name}.zip").stat().st_size


def is_slow(name: str) -> bool:
    """Whether the ordinary test run tries few inputs of it, as each takes a while."""
    return libfuzzer.named(name).runs <= 60


def covering(reached: Mapping[Path, frozenset[int]], most: int) -> list[Path]:
    """Few inputs that together reach what all do, the one that adds most first; of those that add
    as much the one that comes first."""
    left = dict(reached)
    chosen: list[Path] = []
    covered: frozenset[int] = frozenset()
    while left and len(chosen) < most:
        best = max(left, key=lambda path: len(left[path] - covered))
        if not left[best] - covered:
            break
        covered |= left.pop(best)
        chosen.append(best)
    return chosen


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.hours")
    parser.add_argument("name", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--turn", type=int, default=300, metavar="SECONDS")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--again", type=Path, metavar="FILE", help="run the target on this input")
    options = parser.parse_args(words)
    os.nice(19)
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.absolute()
    if options.table:
        print("\n".join(table(work)))
        return 0
    if options.again is not None:
        from tests.fuzz.targets import TARGETS

        TARGETS[options.name[0]](options.again.read_bytes())
        return 0
    libfuzzer.import_instrumented(options.name)
    names = options.name or libfuzzer.names()
    if options.merge:
        for name in names:
            size = merge(work, name)
            print(f"{name}: {len(corpora.found(name))} inputs, {size} bytes", flush=True)
        return 0
    return take_turns(work, names, options.hours, options.turn)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
