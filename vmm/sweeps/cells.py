"""One cell, carried out in this process: a guest of some kind, the policies, and the figures."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vmm.core.errors import PyvmmError, UsageError
from vmm.policy import Policy, PolicyError
from vmm.policy.loader import load_policy
from vmm.replay.figures import Figures, recorded, replayed
from vmm.replay.replay import Replay
from vmm.scenario import library as scenario
from vmm.scenario.models import find as find_model
from vmm.scenario.running import run as run_scenario
from vmm.sweeps import content
from vmm.trace.cost import CostModel, Requests, learn, requests_of
from vmm.trace.reader import Trace
from vmm.trace.summary import duration_ns

_TRACES_HELD = 16
_PRINTED = 8 << 10
"""Characters of what a lab run printed that a failure's log keeps."""


class Done(NamedTuple):
    """What came of a cell. `ended`: why its guest ended otherwise than it wished."""

    figures: Figures
    ended: str | None = None


class CellFailed(PyvmmError):
    """A cell without figures: one line, with the log of what happened."""

    def __init__(self, sentence: str, log: str = "") -> None:
        super().__init__(sentence)
        self.log = log


class _OpenTrace(NamedTuple):
    trace: Trace
    requests: Requests
    model: CostModel
    until: int


class Cells:
    """Carries out cells; what one has read stays for the next."""

    def __init__(self, waits: Callable[[], None], begins: Callable[[], None]) -> None:
        """`waits` is called when a cell has to wait for its turn, `begins` when it has it."""
        self._waits = waits
        self._begins = begins
        self._traces: dict[str, _OpenTrace] = {}
        self._sources: dict[str, str] = {}
        self._folders: set[str] = set()

    def run(self, words: Mapping[str, Any]) -> Done:
        """Raises UsageError for what doesn't load, CellFailed for what breaks on the way."""
        random.seed(words["seed"])
        policies = self.policies(words)
        for spec, digest in words.get("modules", {}).items():
            if self._sources[spec] != digest:
                raise CellFailed(
                    f"the module of {spec} is another one on {socket.gethostname()} than where "
                    "the sweep was started; install the same on all machines"
                )
        about = words["about"]
        run = {
            "replay": self._replay,
            "scenario": self._scenario,
            "kvm": self._kvm,
            "lab": self._lab,
        }[words["kind"]]
        try:
            return run(about, policies, words)
        except PolicyError as error:
            from vmm.policy.failure import explain

            raise CellFailed(str(error), explain(error)) from error

    def check(self, words: Mapping[str, Any]) -> dict[str, str]:
        """Load what a part of a job names; digests of the modules its policies are from.

        Raises UsageError.
        """
        if "policies" in words:
            self.policies(words)
            specs = [each["spec"] for each in words["policies"]]
            return {spec: self._sources[spec] for spec in specs if spec in self._sources}
        if words["kind"] == "replay":
            opened = self._open(words["about"]["trace"])
            Replay(opened.trace, opened.requests, []).close()
        elif words["kind"] == "scenario":
            self._enter_folders(words)
            about = words["about"]
            scenario.load(about["scenario"]).bound(about["parameters"])
            find_model(about["model"])
        elif words["kind"] == "kvm":
            _configuration(words["about"], None, "").validate(_limits())
        return {}

    # -- policies -----------------------------------------------------------------------------

    def policies(self, words: Mapping[str, Any]) -> list[Policy]:
        """Those of a job, made anew. Raises UsageError."""
        made = []
        self._enter_folders(words)
        for each in words["policies"]:
            spec = each["spec"]
            policy = load_policy(spec, each["words"])
            if not spec.rpartition(":")[0].endswith(".py") and spec not in self._sources:
                self._sources[spec] = _source_digest(type(policy))
            made.append(policy)
        return made

    def _enter_folders(self, words: Mapping[str, Any]) -> None:
        """Modules beside a policy are known by bare names: forget those of other cells' policies
        and scenarios."""
        folders = {os.path.dirname(os.path.abspath(path)) for path in _source_files(words)}
        for gone in self._folders - folders:
            for name, module in list(sys.modules.items()):
                file = getattr(module, "__file__", None)
                if file and file.startswith(gone + os.sep):
                    del sys.modules[name]
            sys.path[:] = [each for each in sys.path if each != gone]
        self._folders = folders

    # -- replay -------------------------------------------------------------------------------

    def _open(self, path: str) -> _OpenTrace:
        found = self._traces.pop(path, None)
        if found is None:
            trace = Trace(path)
            requests = requests_of(trace)
            found = _OpenTrace(trace, requests, learn(trace, requests), duration_ns(trace))
        self._traces[path] = found  # the one used last is the last
        if len(self._traces) > _TRACES_HELD:
            self._traces.pop(next(iter(self._traces))).trace.close()
        return found

    def _replay(
        self, about: Mapping[str, Any], policies: Sequence[Policy], words: Mapping[str, Any]
    ) -> Done:
        opened = self._open(about["trace"])
        with closing(Replay(opened.trace, opened.requests, policies)) as replay:
            replay.run(opened.model, opened.until)
            ended = replay.ended and f"at {replay.ended[0]:.3f} s: {replay.ended[1]}"
            return Done(replayed(replay, opened.until), ended)

    # -- scenario -----------------------------------------------------------------------------

    def _scenario(
        self, about: Mapping[str, Any], policies: Sequence[Policy], words: Mapping[str, Any]
    ) -> Done:
        result = run_scenario(
            scenario.load(about["scenario"]),
            policies,
            seed=words["seed"],
            parameters=about["parameters"],
            model=about["model"],
        )
        ended = result.ended and f"at {result.ended.s:.3f} s: {result.ended.why}"
        return Done(dict(result.figures), ended)

    # -- guests on this machine's KVM ---------------------------------------------------------

    def _kvm(
        self, about: Mapping[str, Any], policies: Sequence[Policy], words: Mapping[str, Any]
    ) -> Done:
        from vmm.library.machine import Machine

        with _scratch() as folder:
            trace = os.path.join(folder, "trace")
            config = _configuration(about, trace, folder)
            with Machine(config, policies=policies) as machine:
                try:
                    outcome = machine.run(about.get("seconds", words["seconds"]))
                except TimeoutError as error:
                    raise CellFailed(str(error)) from error
            ended = f"{outcome.exit}: {outcome.reason}" if outcome.exit_status else None
            return Done(_figures_of(trace), ended)

    def _lab(
        self, about: Mapping[str, Any], policies: Sequence[Policy], words: Mapping[str, Any]
    ) -> Done:
        with _scratch() as folder:
            trace = os.path.join(folder, "trace")
            command = [sys.executable, "-m", "vmm", "lab", "--lab-quiet"]
            command += [*_with_own_disks(about["words"], folder), "--trace", trace]
            if not any(word.startswith("--private-mem") for word in command):
                command.append("--private-mem")
            for each in words["policies"]:
                command += ["--policy", each["spec"]]
                for word in each["words"]:
                    command += ["--policy-arg", word]
            self._waits()
            with _turn_at("lab"):
                self._begins()
                done = subprocess.run(
                    command,
                    input=about["input"].encode(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    check=False,
                )
            printed = done.stdout.decode(errors="replace")[-_PRINTED:]
            if not os.path.isdir(trace):
                last = printed.strip().rpartition("\n")[2]
                raise CellFailed(f"pyvmm lab ended with status {done.returncode}: {last}", printed)
            ended = f"pyvmm lab ended with status {done.returncode}" if done.returncode else None
            return Done(_figures_of(trace), ended)


def _source_files(words: Any) -> Iterator[str]:
    """The FILE.py of every FILE.py:NAME in a job."""
    if isinstance(words, str):
        path = words.rpartition(":")[0]
        if path.endswith(".py"):
            yield path.partition("=")[2] or path  # of=FILE.py:CLASS
    elif isinstance(words, dict | list):
        for each in words.values() if isinstance(words, dict) else words:
            yield from _source_files(each)


def _configuration(about: Mapping[str, Any], trace: str | None, folder: str) -> Any:
    from vmm.machine.config import MachineConfig, parse_size

    words = {name: value for name, value in about.items() if name != "seconds"}
    if isinstance(words.get("memory"), str):
        words["memory"] = parse_size(words["memory"])
    words.setdefault("private_memory", "auto")
    disks = words.pop("disks", [])
    if folder:
        disks = _with_own_disks([word for disk in disks for word in ("--disk", disk)], folder)[1::2]
    return MachineConfig(**words, disks=tuple(disks), trace=trace)


def _limits() -> Any:
    from vmm.arch import architecture

    return architecture()


def _figures_of(path: str) -> Figures:
    """What a run recorded. The guest's waiting time is what was measured, not a model's."""
    with closing(Trace(path)) as trace:
        requests = requests_of(trace)
        found = recorded(trace, requests, learn(trace, requests), duration_ns(trace))
    found["modelled_guest_ns"] = found["guest_ns"]
    found["guest_ns"] = found.pop("waited_ns")
    return found


_DISKS = ("--disk", "--lab-disk", "--root")


def _with_own_disks(words: Sequence[str], folder: str) -> list[str]:
    """The words with a copy for each disk that a guest may write: the next cell wants it new."""
    made = list(words)
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if at and words[at - 1] in _DISKS:
            option, equals, value = "", "", word
        elif option not in _DISKS or not equals:
            continue
        path, comma, rest = value.partition(",")
        if "ro" in rest.split(","):
            continue
        copy = os.path.join(folder, f"disk{at}-{os.path.basename(path)}")
        try:
            shutil.copyfile(path, copy)
        except OSError as error:
            raise CellFailed(f"{path} can't be copied for a guest: {error.strerror}") from None
        made[at] = f"{option}{equals}{copy}{comma}{rest}"
    return made


@contextmanager
def _scratch() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="pyvmm-sweep-", ignore_cleanup_errors=True) as folder:
        yield folder


@contextmanager
def _turn_at(what: str) -> Iterator[None]:
    """Held by one process of this user's on this machine; the kernel drops it with the process."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvmm"
    base.mkdir(parents=True, exist_ok=True)
    with open(base / f"sweep-{what}-{socket.gethostname()}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _source_digest(made: type[Policy]) -> str:
    """Of the file that a policy's class is in, with what it imports of its own package."""
    try:
        file = inspect.getsourcefile(made)
    except TypeError:
        file = None
    if file is None or not os.path.isfile(file):
        return "built in"
    parts = made.__module__.split(".")
    if parts[0] == "vmm":  # the rest of pyvmm goes by its version
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    root = Path(file).resolve().parents[len(parts) - (os.path.basename(file) != "__init__.py")]
    return content.of_module(str(root), os.path.relpath(file, root), file)


def log_of(error: BaseException) -> str:
    """What a failure's log has: the policy's part of the traceback where there is one."""
    if isinstance(error, CellFailed):
        return error.log
    if isinstance(error, UsageError) and error.__cause__ is None:
        return ""
    with contextlib.suppress(Exception):
        return "".join(traceback.format_exception(error))
    return repr(error)
