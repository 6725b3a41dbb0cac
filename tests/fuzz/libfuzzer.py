"""One fuzz target, or several after each other, in libFuzzer's loop (atheris).

    python -m tests.fuzz.libfuzzer [NAME...] [--runs N | --seconds S] [--seed N] [--work FOLDER]
                                  [--factor N]

Each target has a process of its own, forked from one that has everything imported with counters
for libFuzzer. A line of JSON for each says what came of it. New inputs go to FOLDER/NAME, what
has failed to FOLDER/NAME.failed. Exit status 1 if anything has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.fuzz import native
from tests.fuzz.corpora import corpus

if TYPE_CHECKING:
    from tests.fuzz.targets.registry import Target

INSTRUMENTED = ["vmm", "kvm_bindings"]
PATIENCE = 600
"""Seconds that one input may take: it is no measure, but what hangs for good has to end."""
_COVERED = re.compile(rb"^#\d+\s+(?:INITED|DONE|NEW|REDUCE|pulse).*?cov: (\d+) ft: (\d+)", re.M)
_DONE = re.compile(rb"^Done (\d+) runs", re.M)
_TAIL = 4000


class Result(NamedTuple):
    """What a target's turn came to. Edges are libFuzzer's `cov`, features its `ft`."""

    name: str
    edges_at_first: int
    edges: int
    features: int
    runs: int
    seconds: float
    """Processor time: a busy machine's minute is no minute of fuzzing."""
    failed: list[str]
    """Files with the inputs that failed."""
    said: str
    """The end of what was printed, where something has failed."""


def available() -> bool:
    """Whether atheris is installed."""
    import importlib.util

    return importlib.util.find_spec("atheris") is not None


def import_instrumented(names: Sequence[str] = ()) -> None:
    """Import all targets, and with them pyvmm, with counters; all that `names` need (or all)."""
    import atheris

    for name in native.NATIVE:
        if name in names or (not names and native.clang()):
            native.build(name)
    # It names each module.
    with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(INSTRUMENTED):
        from tests.fuzz.targets import TARGETS

        for target in TARGETS.values():
            if not names or target.name in names:
                for data in target.seeds():
                    target.run(data)  # what it imports late has counters, too


def fuzz(name: str, words: Sequence[str], failed: Path | None = None) -> None:
    """libFuzzer's loop; ends the process. `words` begin with what it calls itself by. An input
    with which the target raises goes to `failed`."""
    if name in native.NATIVE:
        native.become(name, words)
    import atheris

    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]

    def attempt(data: bytes) -> None:
        data = bytes(data)
        try:
            target.quickly(data)
        except BaseException:
            # libFuzzer keeps what makes a process crash or hang, but no exceptions' inputs.
            if failed is not None:
                (failed / f"raises-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise

    atheris.Setup(list(words), attempt)
    atheris.Fuzz()


def named(name: str) -> Target | native.Native:
    """The target of that name."""
    from tests.fuzz.targets import TARGETS

    return native.NATIVE.get(name) or TARGETS[name]


def names() -> list[str]:
    """All that can be fuzzed here."""
    from tests.fuzz.targets import TARGETS

    return [*TARGETS, *(native.NATIVE if native.clang() else ())]


def run(name: str, work: Path, words: Sequence[str]) -> Result:
    """One turn of a target, in a child of this process, which has them all imported."""
    inputs, failed = work / name, work / f"{name}.failed"
    inputs.mkdir(parents=True, exist_ok=True)
    failed.mkdir(exist_ok=True)
    with _as_files(corpus(name)) as kept, tempfile.TemporaryFile() as log:
        before = set(os.listdir(failed))
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                places = [f"-artifact_prefix={failed}/", str(inputs), str(kept)]
                fuzz(name, [name, *words, *places], failed)
            os._exit(70)
        _, status, used = os.wait4(child, 0)
        log.seek(0)
        text = log.read()
    seen = [(int(edges), int(features)) for edges, features in _COVERED.findall(text)]
    done = _DONE.search(text)
    fresh = sorted(set(os.listdir(failed)) - before)
    if status and not fresh:
        fresh = ["no input: it ended by itself"]
    return Result(
        name,
        seen[0][0] if seen else 0,
        seen[-1][0] if seen else 0,
        seen[-1][1] if seen else 0,
        0 if done is None else int(done[1]),
        round(used.ru_utime + used.ru_stime, 1),
        fresh,
        text[-_TAIL:].decode("utf-8", "replace") if status else "",
    )


@contextlib.contextmanager
def _as_files(data: Sequence[bytes]) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        for number, each in enumerate(data):
            (folder / f"{number}").write_bytes(each)
        yield folder
    finally:
        shutil.rmtree(folder)


def common_words(longest: int) -> list[str]:
    """libFuzzer's options that every run has."""
    return [f"-max_len={longest}", f"-timeout={PATIENCE}", f"-report_slow_units={PATIENCE}",
            "-rss_limit_mb=2048", "-print_final_stats=1", "-reload=0"]  # fmt: skip


def features(name: str, inputs: Sequence[Path]) -> dict[Path, frozenset[int]]:
    """What libFuzzer says that each input reaches; those that fail are left out. This process has
    imported all with counters.

    A step of its -merge=1, which it keeps apart for the sake of such inputs: it takes a list of
    files (how many, how many of them are chosen already, names) and adds a line for each when it
    begins ("STARTED number size") and when it has ended ("FT number feature...").
    """
    found: dict[Path, frozenset[int]] = {}
    left = list(inputs)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        control = Path(scratch, "control")
        while left:
            control.write_text("\n".join([str(len(left)), "0", *map(str, left)]) + "\n")
            words = [f"-merge_control_file={control}", "-merge_inner=1", f"-timeout={PATIENCE}"]
            _in_a_child(functools.partial(fuzz, name, [name, *words]))
            begun = 0
            for line in control.read_text().splitlines()[2 + len(left) :]:
                word, number, *rest = line.split()
                begun = max(begun, int(number) + 1)
                if word == "FT":
                    found[left[int(number)]] = frozenset(map(int, rest))
            if not begun:
                raise RuntimeError(f"{name}: libFuzzer looks at no input")
            left = left[begun:]
    return found


def _in_a_child(run: Callable[[], None]) -> None:
    """Run it where it may end the process, which says nothing."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            run()
        os._exit(70)
    os.waitpid(child, 0)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.libfuzzer")
    parser.add_argument("name", nargs="*")
    parser.add_argument("--runs", type=int, help="inputs for each target, not as it says itself")
    parser.add_argument("--factor", type=int, default=1, help="so many times as many")
    parser.add_argument("--seconds", type=int)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--work", type=Path, default=Path("fuzz-work"))
    options = parser.parse_args(words)
    import_instrumented(options.name)
    from tests.fuzz.targets import TARGETS

    status = 0
    for name in options.name or TARGETS:
        target = named(name)
        limits = [f"-seed={options.seed}", *common_words(target.longest)]
        if options.seconds is not None:
            limits.append(f"-max_total_time={options.seconds}")
        else:
            # libFuzzer counts the corpus, too.
            runs = (options.runs or target.runs) * options.factor
            limits.append(f"-runs={runs + len(corpus(name))}")
        result = run(name, options.work.absolute(), limits)
        status |= bool(result.failed)
        print(json.dumps(result._asdict()), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
