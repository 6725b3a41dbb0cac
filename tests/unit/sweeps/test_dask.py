"""A sweep on a Dask cluster: a scheduler and workers, processes of their own, on loopback."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from distributed.client import FutureState

from tests.unit.cli.conftest import Command
from tests.unit.sweeps.conftest import SWEEP
from tests.unit.sweeps.test_sweep import rows
from vmm.sweeps import dask_executor, versions
from vmm.sweeps.dask_executor import DaskExecutor
from vmm.sweeps.executor import Answer
from vmm.sweeps.far import Piece

ROOT = Path(__file__).resolve().parents[3]


class Cluster:
    """A scheduler, and workers with one cell at a time each."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self.address, _ = self._started("scheduler", "--host", "127.0.0.1", "--port", "0")

    def add_worker(self, *more: str) -> int:
        """One more, which is there when this returns; its process."""
        words = ["--nthreads", "1", "--no-nanny", "--host", "127.0.0.1", *more]
        _, process = self._started("worker", self.address, *words)
        return process

    def _started(self, what: str, *words: str) -> tuple[str, int]:
        process = self._stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "dask", what, *words, "--no-dashboard"],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self._folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        )  # fmt: skip
        self._stack.callback(process.kill)
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if what == "scheduler" and "Scheduler at:" in line:
                return line.split()[-1], process.pid
            if what == "worker" and "Registered to:" in line:
                return "", process.pid
        raise AssertionError(f"dask {what} did not start:\n{said}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        made = Cluster(tmp_path_factory.mktemp("cluster"), stack)
        for _ in range(2):
            made.add_worker()
        yield made


@pytest.fixture
def own_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Without a worker yet."""
    with ExitStack() as stack:
        yield Cluster(tmp_path_factory.mktemp("own_cluster"), stack)


@pytest.fixture
def sweep(command: Command, cluster: Cluster) -> Callable[..., Any]:
    """`pyvmm sweep s.toml` on the cluster."""
    return lambda *words: command("sweep", "s.toml", "--scheduler", cluster.address, *words)


def test_cluster_comes_to_what_this_machine_comes_to(
    command: Command, sweep: Callable[..., Any], folder: Path
) -> None:
    (folder / "common.py").write_text("MOST = 2\n")
    (folder / "q.py").write_text(
        "import common, json, os\nfrom p import Some\nclass Other(Some):\n"
        "    def __init__(self):\n"
        "        there = os.path.join(os.path.dirname(__file__), 'n.json')\n"
        "        super().__init__(json.load(open(there)) + common.MOST)\n"
    )
    (folder / "numbers.json").write_text("3")
    with (folder / "s.toml").open("a") as file:
        file.write('\n[[policy]]\nuse = "q.py:Other"\nfiles = { "n.json" = "numbers.json" }\n')

    there = json.loads(sweep("--json").out)
    here = json.loads(command("sweep", "s.toml", "--json", "--store", "here.sqlite").out)

    assert [each["error"] for each in there["cells"]] == [None] * 4
    assert [each["figures"] for each in there["cells"]] == [
        each["figures"] for each in here["cells"]
    ]
    assert there["cells"][3]["figures"]["conversions"] == 5
    assert all(each["worker"].startswith("tcp://127.0.0.1:") for each in there["cells"])


def test_contents_reach_each_worker_once(
    sweep: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: Counter[tuple[str, str, str]] = Counter()
    really = DaskExecutor._send

    def send(
        self: DaskExecutor, workers: Sequence[str], digest: str, pieces: Sequence[Piece]
    ) -> str | None:
        sent.update((worker, digest, name) for worker in workers for name, _, _ in pieces)
        return really(self, workers, digest, pieces)

    monkeypatch.setattr(DaskExecutor, "_send", send)
    monkeypatch.setattr(dask_executor, "_BATCH_SECONDS", 0.0)  # a task for each cell
    (folder / "s.toml").write_text("repetitions = 8\n" + SWEEP)
    (folder / "p.py").write_text((folder / "p.py").read_text() + f"# {folder}\n")  # sent never yet

    told = json.loads(sweep("--json").out)

    assert told["missing"] == told["failed"] == 0
    users = {each["worker"] for each in told["cells"] if each["policy"] == "Some"}
    assert {worker for worker, _, name in sent if name == "p.py"} >= users
    assert set(sent.values()) == {1}


def test_worker_that_is_killed_in_the_middle_costs_no_cell_and_doubles_none(
    cluster: Cluster, sweep: Callable[..., Any], folder: Path
) -> None:
    victim = cluster.add_worker()
    (folder / "p.py").write_text(
        # The cell's process is a child of the worker.
        "import os, signal\nfrom vmm.policy import Policy\nclass Some(Policy):\n"
        "    def __init__(self, most: int): pass\n"
        "    def on_boot(self, view):\n"
        f"        if os.getppid() == {victim}:\n"
        f"            open({str(folder / 'met')!r}, 'a').write('x')\n"
        f"            os.kill({victim}, signal.SIGKILL)\n"
        "            signal.pause()\n"
        "        return super().on_boot(view)\n"
    )
    (folder / "s.toml").write_text("repetitions = 40\n" + SWEEP)

    result = sweep("--json")

    told = json.loads(result.out)
    assert (folder / "met").read_text() == "x"
    assert (result.status, told["missing"], told["failed"]) == (0, 0, 0)
    assert [tries for _, tries in rows(folder)] == [1] * 120


def test_answer_that_is_lost_with_its_worker_is_found_anew(
    command: Command, own_cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The only worker ends when a task of it has ended, and nobody has asked for the answer yet.
    victim = own_cluster.add_worker()
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    really_lose: Callable[..., None] = FutureState.lose
    really_answers = DaskExecutor._answers
    met: list[str] = []

    def lose(self: Any) -> None:
        really_lose(self)
        lost.put(self.key)

    def answers(self: DaskExecutor, ended: Sequence[str]) -> list[Answer]:
        if met or not ended:
            return really_answers(self, ended)
        os.kill(victim, signal.SIGKILL)
        while not set(ended) <= set(met):
            met.append(lost.get(timeout=60))
        found = really_answers(self, ended)
        own_cluster.add_worker()
        return found

    monkeypatch.setattr(FutureState, "lose", lose)
    monkeypatch.setattr(DaskExecutor, "_answers", answers)

    result = command("sweep", "s.toml", "--scheduler", own_cluster.address, "--json")

    assert (result.status, result.err) == (0, "")
    assert [each["status"] for each in json.loads(result.out)["cells"]] == ["ok"] * 3


def test_worker_that_cannot_keep_what_cells_need_is_named(
    command: Command, own_cluster: Cluster, folder: Path
) -> None:
    own_cluster.add_worker("--local-directory", str(folder / "there"))
    (place,) = (folder / "there" / "dask-scratch-space").glob("worker-*/")
    (place / "pyvmm-sweep").write_text("no folder")

    result = command("sweep", "s.toml", "--scheduler", own_cluster.address)

    assert result.status == 2
    assert f" can't keep it in {place}/pyvmm-sweep: Not a directory; " in result.complaint
    assert "--local-directory" in result.complaint


def test_answer_that_fails_while_it_is_asked_for_is_a_failed_cell(
    sweep: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where its worker goes then, it is done again, and Dask may give that up.
    really: Callable[..., Any] = Client.gather

    def gather(self: Client, futures: Mapping[str, Any], **words: Any) -> Any:
        for future in futures.values():
            future._state.set_error(RuntimeError("workers died under it"), None)
        return really(self, futures, **words)

    monkeypatch.setattr(Client, "gather", gather)

    told = json.loads(sweep("--json").out)

    assert [each["error"] for each in told["cells"]] == [
        "Dask gave it up: workers died under it"
    ] * 3


def test_policy_that_fails_on_a_worker_is_kept_with_its_log(
    sweep: Callable[..., Any], folder: Path
) -> None:
    with (folder / "s.toml").open("a") as file:
        file.write('\n[[policy]]\nuse = "p.py:Broken"\n')

    told = json.loads(sweep("--json").out)

    broken = told["cells"][3]
    assert [each["status"] for each in told["cells"]] == ["ok", "ok", "ok", "failed"]
    assert "return missing_name" in broken["log"]
    assert "printed:\nabout to break" in broken["log"]


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("pyvmm_version", "9.9", " has pyvmm 0"),
        ("dask_version", "1.0", " has distributed "),
        ("code_digest", "other", " runs other sources of pyvmm "),
    ],
)
def test_worker_with_another_version_is_refused(
    sweep: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch,
    what: str, value: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(versions, what, lambda: value)

    result = sweep()

    assert result.status == 2
    assert message in result.complaint
    assert "install the same on all machines" in result.complaint


def test_worker_whose_sources_differ_carries_out_nothing(
    sweep: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One that has joined after the others were looked at.
    monkeypatch.setattr(DaskExecutor, "_look", lambda self, first=False: None)
    monkeypatch.setattr(DaskExecutor, "room", 10)
    monkeypatch.setattr(versions, "code_digest", lambda: "mine")

    result = sweep()

    assert result.status == 2
    assert " runs other sources of pyvmm " in result.complaint
    assert rows(folder) == []


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("tcp://127.0.0.1:1", "no Dask scheduler answers there"),
        ("127.0.0.1:1", "no Dask scheduler answers there"),
        ("nonsense://x", "no Dask scheduler answers there"),
        ("tcp://no-such-host.invalid:8786", "no Dask scheduler answers there"),
    ],
)
def test_scheduler_that_is_not_there_is_one_line(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    monkeypatch.setattr(dask_executor, "CONNECT_SECONDS", 0.2)

    result = command("sweep", "s.toml", "--scheduler", address)

    assert result.status == 2
    assert result.complaint.startswith(f"--scheduler {address}: {reason}: ")


def test_without_dask_one_line_says_how_to_get_it(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)

    result = command("sweep", "s.toml", "--scheduler", "tcp://127.0.0.1:1")

    assert result.status == 2
    assert result.complaint == (
        "--scheduler needs Dask, which is not installed; pip install 'pyvmm[sweep]'"
    )


def test_interrupted_sweep_on_a_cluster_goes_on(
    cluster: Cluster, sweep: Callable[..., Any], folder: Path
) -> None:
    (folder / "p.py").write_text(
        "from vmm.policy import Policy\nclass Some(Policy):\n"
        "    def __init__(self, most: int): self.most = most\n"
        "    def on_boot(self, view):\n"
        f"        if self.most == 3: open({str(folder / 'reached')!r}, 'w').close()\n"
        "        return super().on_boot(view)\n"
    )
    numbers = ", ".join(map(str, range(200)))
    (folder / "s.toml").write_text(SWEEP.replace("[1, 3]", f"[{numbers}]"))
    os.mkfifo(folder / "reached")
    with subprocess.Popen(
        [sys.executable, "-m", "vmm", "sweep", "s.toml", "--scheduler", cluster.address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        with open(folder / "reached"):
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    before = rows(folder, "key, at")
    (folder / "reached").unlink()

    told = json.loads(sweep("--json").out)

    assert (process.returncode, err) == (
        130, "pyvmm: interrupted; the same command goes on where it was\n",
    )  # fmt: skip
    assert 0 < len(before) < 201
    assert told["missing"] == 0
    assert set(before) <= set(rows(folder, "key, at"))
