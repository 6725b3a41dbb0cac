"""`pyvmm sweep` and `vmm.sweep`, by processes of this machine."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import selectors
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.unit.cli.conftest import Command
from tests.unit.sweeps.conftest import SWEEP, write_trace
from vmm.cli.sweep import interruptible
from vmm.core.errors import UsageError
from vmm.policy import Allow, Decision, Event, Policy, View
from vmm.sweeps.running import Progress

ROOT = Path(__file__).resolve().parents[3]


def rows(folder: Path, columns: str = "key, tries") -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / "s.sqlite")) as db:
        return db.execute(f"SELECT {columns} FROM results ORDER BY key").fetchall()


def test_sweep_gives_the_figures_of_a_replay(command: Command, folder: Path) -> None:
    swept = json.loads(command("sweep", "s.toml", "--json").out)
    words = ["--policy", "p.py:Some", "--policy-arg", "most=3", "--json"]
    replayed = json.loads(command("replay", "t", *words).out)["replayed"]

    cell = next(each for each in swept["cells"] if each["parameters"] == {"most": "3"})
    assert (cell["status"], cell["kind"], cell["policy"]) == ("ok", "replay", "Some")
    assert {name: cell["figures"][name] for name in replayed} == replayed
    assert cell["figures"]["refused"] == replayed["denied"] == 3


def test_sweep_again_runs_nothing(command: Command, folder: Path) -> None:
    assert command("sweep", "s.toml").status == 0
    before = rows(folder, "key, at")

    again = command("sweep", "s.toml")

    assert again.status == 0
    assert len(before) == 3
    assert rows(folder, "key, at") == before


def test_changed_policy_is_run_again_and_no_other(command: Command, folder: Path) -> None:
    (folder / "q.py").write_text("from p import Some\nclass Other(Some):\n    pass\n")
    (folder / "r.py").write_text("from vmm.policy import Policy\nclass Alone(Policy):\n    pass\n")
    for name in ("q.py:Other", "r.py:Alone"):
        with (folder / "s.toml").open("a") as file:
            file.write(f'\n[[policy]]\nuse = "{name}"\n')
    command("sweep", "s.toml")
    before = {key for key, _ in rows(folder)}

    with (folder / "p.py").open("a") as file:
        file.write("\n# another\n")
    command("sweep", "s.toml")

    new = {key for key, _ in rows(folder)} - before
    with closing(sqlite3.connect(folder / "s.sqlite")) as db:
        cells = [json.loads(cell) for key, cell in db.execute("SELECT key, cell FROM results")
                 if key in new]  # fmt: skip
    # q.py imports p.py; AllowAll and Alone have nothing to do with it.
    assert sorted(cell["policy"] for cell in cells) == ["Other", "Some", "Some"]


def test_changed_trace_is_run_again(command: Command, folder: Path) -> None:
    command("sweep", "s.toml")
    subprocess.run(["rm", "-r", str(folder / "t")], check=True)
    write_trace(folder / "t", shares=7)

    swept = json.loads(command("sweep", "s.toml", "--json").out)

    assert {cell["figures"]["requests"] for cell in swept["cells"]} == {7}
    assert len(rows(folder)) == 6


def test_changed_pyvmm_is_run_again(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("sweep", "s.toml")
    monkeypatch.setattr("vmm.sweeps.jobs.figures_digest", lambda: "another converter")

    command("sweep", "s.toml")

    assert len(rows(folder)) == 6


def test_definition_and_contents_are_in_the_store(command: Command, folder: Path) -> None:
    command("sweep", "s.toml")

    with closing(sqlite3.connect(folder / "s.sqlite")) as db:
        (text,) = db.execute("SELECT definition FROM definitions").fetchone()
        named = dict(db.execute("SELECT digest, name FROM contents"))
        used = {digest for (all_of,) in db.execute("SELECT contents FROM results")
                for digest in json.loads(all_of)}  # fmt: skip
    assert [each["name"] for each in json.loads(text)["policies"]] == ["AllowAll", "Some", "Some"]
    assert sorted(named.values()) == ["p.py", "t"]
    assert used == named.keys()


def test_failure_is_kept_with_its_log_and_the_rest_goes_on(command: Command, folder: Path) -> None:
    with (folder / "s.toml").open("a") as file:
        file.write('\n[[policy]]\nuse = "p.py:Broken"\n')

    result = command("sweep", "s.toml", "--json")

    swept = json.loads(result.out)
    broken = next(each for each in swept["cells"] if each["policy"] == "Broken")
    assert (result.status, swept["failed"], broken["status"]) == (1, 1, "failed")
    assert "name 'missing_name' is not defined" in broken["error"]
    assert 'File "p.py", line' in broken["log"]
    assert "return missing_name" in broken["log"]
    assert "printed:\nabout to break" in broken["log"]
    assert [each["status"] for each in swept["cells"]] == ["ok"] * 3 + ["failed"]


class AnswersOnly(selectors.DefaultSelector):
    """As where an answer is looked at before what was printed."""

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return super().register(fileobj, events, data) if isinstance(fileobj, int) else KEY


KEY = selectors.SelectorKey(-1, -1, 0, None)


def test_what_was_printed_before_a_failure_is_kept_whatever_is_read_first(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selectors, "DefaultSelector", AnswersOnly)
    with (folder / "s.toml").open("a") as file:
        file.write('\n[[policy]]\nuse = "p.py:Broken"\n')

    told = json.loads(command("sweep", "s.toml", "--json", "--workers", "1").out)

    assert "printed:\nabout to break" in told["cells"][3]["log"]


def test_failed_cells_are_run_again_when_it_is_asked_for(command: Command, folder: Path) -> None:
    (folder / "p.py").write_text(
        "import os\nfrom vmm.policy import Allow, Policy\nclass Some(Policy):\n"
        "    def __init__(self, most: int): pass\n"
        f"    def on_share(self, event, view): return open({str(folder / 'there')!r}) and Allow()\n"
    )
    assert command("sweep", "s.toml").status == 1
    (folder / "there").touch()

    without = command("sweep", "s.toml")
    retried = command("sweep", "s.toml", "--retry-failed")

    assert (without.status, retried.status) == (1, 0)
    assert sorted(tries for _, tries in rows(folder)) == [1, 2, 2]


@pytest.mark.parametrize(
    ("hook", "error"),
    [
        ("os._exit(3)", "its process ended with status 3 in the middle"),
        ("os.kill(os.getpid(), 11)", "its process was ended by signal 11 (SIGSEGV)"),
        ("[None for _ in iter(int, 1)]", "it took longer than its time limit of 0.1 s"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise SystemExit(5)", "SystemExit(5)"),
    ],
)
def test_policy_that_takes_its_process_along_costs_its_cell_alone(
    command: Command, folder: Path, hook: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.sweeps.pool._GRACE", 1.0)
    (folder / "p.py").write_text(
        "import os\nfrom vmm.policy import Policy\nclass Some(Policy):\n"
        f"    def on_share(self, event, view):\n        {hook}\n"
    )
    (folder / "s.toml").write_text(
        "time_limit = 0.1\n" + SWEEP.replace("parameters = { most = [1, 3] }\n", "")
    )

    swept = json.loads(command("sweep", "s.toml", "--json").out)

    assert [each["status"] for each in swept["cells"]] == ["ok", "failed"]
    assert error in swept["cells"][1]["error"]


def test_neighbours_of_two_policies_with_one_name_are_not_mixed_up(
    command: Command, folder: Path
) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "common.py").write_text(f"NAME = {name!r}\n")
        (folder / name / "p.py").write_text(
            "import common\nfrom vmm.policy import Kill, Policy\nclass P(Policy):\n"
            "    def on_share(self, event, view): return Kill(common.NAME)\n"
        )
    (folder / "s.toml").write_text(
        "repetitions = 2\n"
        + "".join(f'[[policy]]\nname = "{n}"\nuse = "{n}/p.py:P"\n' for n in ("a", "b"))
        + '[[workload]]\nreplay = "t"\n'
    )

    swept = json.loads(command("sweep", "s.toml", "--json").out)

    assert [(each["policy"], each["ended"][-1]) for each in swept["cells"]] == [
        ("a", "a"), ("b", "b"), ("a", "a"), ("b", "b"),
    ]  # fmt: skip


def test_policy_edited_while_it_runs_is_run_as_it_was(command: Command, folder: Path) -> None:
    path = folder / "p.py"
    path.write_text(
        "from vmm.policy import Allow, Policy\nclass Some(Policy):\n"
        "    def __init__(self, most: int): pass\n"
        "    def on_boot(self, view):\n"
        f"        open({str(path)!r}, 'a').write('garbage (')\n"
        "        return Allow()\n"
    )

    result = command("sweep", "s.toml")

    assert result.status == 0
    assert "garbage" in path.read_text()


def test_random_policy_is_seeded_by_its_repetition(command: Command, folder: Path) -> None:
    (folder / "p.py").write_text(
        "import random\nfrom vmm.policy import Kill, Policy\nclass Some(Policy):\n"
        "    def __init__(self, most: int): pass\n"
        "    def on_share(self, event, view): return Kill(str(random.random()))\n"
    )
    (folder / "s.toml").write_text("repetitions = 2\nseed = 5\n" + SWEEP)

    first = json.loads(command("sweep", "s.toml", "--json").out)
    again = json.loads(command("sweep", "s.toml", "--json", "--store", "other").out)

    ended = [each["ended"] for each in first["cells"]]
    assert ended == [each["ended"] for each in again["cells"]]
    assert ended[1] == ended[2] != ended[4]
    assert [each["seed"] for each in first["cells"]] == [5, 5, 5, 6, 6, 6]


def test_table_fits_80_columns_and_marks_the_front(command: Command, folder: Path) -> None:
    long = "A policy whose name is so long that no table of 80 columns has room for all of it " * 2
    (folder / "s.toml").write_text(
        SWEEP.replace(
            "[[workload]]",
            f'[[policy]]\nname = "{long.strip()}"\nuse = "p.py:Broken"\n[[workload]]',
        )
    )

    lines = command("sweep", "s.toml").out.splitlines()

    assert max(map(len, lines)) <= 80
    assert any(re.match(r"\* AllowAll +\S+ \S+ ", line) for line in lines)
    assert any(re.match(r"  Some most=1 .* 5 +1$", line) for line in lines)
    assert any("1 cells failed; --retry-failed runs them again." in line for line in lines)


def test_csv_has_a_line_for_each_cell(command: Command, folder: Path) -> None:
    found = list(csv.DictReader(io.StringIO(command("sweep", "s.toml", "--csv").out)))

    assert [(each["policy"], each["policy.most"], each["status"]) for each in found] == [
        ("AllowAll", "", "ok"), ("Some", "1", "ok"), ("Some", "3", "ok"),
    ]  # fmt: skip
    assert [int(each["conversions"]) for each in found] == [6, 1, 3]


def test_results_only_runs_nothing(command: Command, folder: Path) -> None:
    assert command("sweep", "s.toml", "--results-only").complaint.startswith(
        "s.sqlite: no such store; it is made by running the sweep"
    )
    command("sweep", "s.toml")
    with (folder / "s.toml").open("a") as file:
        file.write('\n[[policy]]\nuse = "vmm.policy.builtin:KeepShared"\n')

    told = json.loads(command("sweep", "s.toml", "--results-only", "--json").out)

    assert (told["missing"], len(rows(folder))) == (1, 3)


def test_progress_is_quiet_without_a_terminal(command: Command, folder: Path) -> None:
    assert command("sweep", "s.toml").err == ""


@pytest.mark.parametrize(
    ("words", "change", "message"),
    [
        (["nowhere.toml"], "", "nowhere.toml cannot be read: No such file or directory; give a"),
        ([], "", "the following arguments are required: FILE.toml; see pyvmm sweep --help"),
        (["s.toml", "--workers", "0"], "", "--workers 0: use 1 to 1024"),
        (["s.toml", "--workers", "2", "--scheduler", "tcp://h:1"], "", "--workers is for process"),
        (["s.toml", "--results-only", "--retry-failed"], "", "--results-only runs nothing; leave"),
        (["s.toml"], 'use = "p.py:Nobody"', "--policy p.py:Nobody: p.py has no class Nobody"),
        (["s.toml"], 'use = "q.py:A"', "--policy q.py:A: loading q.py failed: it cannot be read"),
        (["s.toml"], 'use = "no.module:A"', "--policy no.module:A: no module no on Python's path"),
        (["s.toml"], 'use = "p.py:Some"\nparameters = { mots = 1 }',
         "--policy p.py:Some: --policy-arg mots=1: Some takes most"),
        (["s.toml"], 'use = "p.py:Some"\nparameters = { most = "many" }',
         "--policy p.py:Some: --policy-arg most=many: Some wants int"),
        (["s.toml"], 'use = "p.py:Some"\nfiles = { "../x" = "p.py" }',
         "--policy p.py:Some: files: '../x' is no file name"),
        (["s.toml"], 'use = "a.b:C"\nfiles = { x = "p.py" }',
         "--policy a.b:C: files go beside a FILE.py; this one names a module"),
        (["s.toml"], 'use = "p.py:Some"\n[[workload]]\nreplay = "u"',
         "workload u: u: no such folder; give the DIR of a run with --trace DIR"),
        (["s.toml"], 'use = "p.py:Some"\n[[workload]]\nreplay = "s.toml"',
         "workload s.toml: s.toml: is not a folder; give the DIR of a run with --trace DIR"),
        (["s.toml"], 'use = "p.py:Some"\n[[workload]]\nreplay = "."',
         "/"),
        (["s.toml"], 'use = "p.py:Some"\n[[workload]]\nkvm = { kernel = "bzImage" }',
         "workload kvm: bzImage cannot be read: No such file or directory"),
        (["s.toml"], 'use = "p.py:Some"\n[[workload]]\nkvm = { memory = "1M" }',
         "--mem 1M is out of range"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_has_run(
    command: Command, folder: Path, words: list[str], change: str, message: str
) -> None:
    if change:
        (folder / "s.toml").write_text(SWEEP + f"\n[[policy]]\n{change}\n")

    result = command("sweep", *words)

    assert result.status == 2
    assert result.complaint.startswith(message)
    assert not (folder / "s.sqlite").exists() or not rows(folder)


def test_trace_that_changes_under_the_sweep_fails_its_cells(command: Command, folder: Path) -> None:
    # The first cell damages the trace and ends its process; the next process looks at it anew.
    (folder / "p.py").write_text(
        "import os\nfrom vmm.policy import Policy\nclass Some(Policy):\n"
        "    def __init__(self, most: int): pass\n"
        "    def on_boot(self, view):\n"
        f"        open({str(folder / 't' / 'kind' / 'data.ninja')!r}, 'ab').write(b'x')\n"
        "        os._exit(0)\n"
    )

    swept = json.loads(command("sweep", "s.toml", "--json").out)

    assert [each["status"] for each in swept["cells"]] == ["ok", "failed", "failed"]
    assert swept["cells"][2]["error"] == (
        f"{folder}/t has changed since the sweep looked at it; start the sweep again"
    )


def interrupted(folder: Path) -> subprocess.CompletedProcess[str]:
    """A sweep of many cells that gets SIGINT after a few."""
    (folder / "p.py").write_text(
        "import os\nfrom vmm.policy import Allow, Policy\nclass Some(Policy):\n"
        "    def __init__(self, most: int): self.most = most\n"
        "    def on_boot(self, view):\n"
        f"        if self.most == 20: open({str(folder / 'reached')!r}, 'w').close()\n"
    )
    numbers = ", ".join(map(str, range(200)))
    (folder / "s.toml").write_text(SWEEP.replace("[1, 3]", f"[{numbers}]"))
    os.mkfifo(folder / "reached")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "vmm", "sweep", "s.toml", "--workers", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment,
    ) as process:  # fmt: skip
        with open(folder / "reached"):
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def test_interrupt_keeps_what_was_done_and_the_next_run_does_the_rest(
    command: Command, folder: Path
) -> None:
    done = interrupted(folder)
    before = rows(folder, "key, at")
    (folder / "reached").unlink()

    again = command("sweep", "s.toml", "--json")

    assert done.returncode == 130
    assert done.stderr == "pyvmm: interrupted; the same command goes on where it was\n"
    assert 20 <= len(before) < 201
    after = rows(folder, "key, at")
    assert len(after) == 201
    assert set(before) <= set(after)
    assert json.loads(again.out)["missing"] == 0


NOW = Progress(cells=2, stored=1, failed=0, slots=1, seconds_left=None)


def test_interrupt_is_raised_where_a_sweep_says_how_far_it_is_and_nowhere_else() -> None:
    heard: list[Progress] = []

    with interruptible(heard.append) as told:
        told(NOW)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            told(NOW)

    assert heard == [NOW]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_before_anything_runs_is_raised_at_once() -> None:
    with interruptible(lambda now: None), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_second_interrupt_is_raised_at_once() -> None:
    with interruptible(lambda now: None) as told:
        told(NOW)
        signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


class FromHere(Policy):
    """A class that a program hands over."""

    def on_share(self, event: Event, view: View) -> Decision:
        return Allow()


def test_sweep_from_a_program_takes_classes_and_gives_results(folder: Path) -> None:
    told: list[int] = []

    results = vmm.sweep(
        {
            "policy": [{"use": FromHere}, {"use": "vmm.policy.builtin:AllowAll"}],
            "workload": [{"replay": folder / "t"}],
        },
        store=folder / "s.sqlite",
        progress=lambda now: told.append(now.stored),
    )

    assert [each.policy for each in results.cells] == ["FromHere", "AllowAll"]
    assert [each.figures["conversions"] for each in results.cells] == [6, 6]
    assert told[-1] == 2
    assert [group.on_front for group in results.groups()] == [True, True]


def test_class_that_no_other_process_finds_is_refused(folder: Path) -> None:
    class Hidden(Policy):
        pass

    with pytest.raises(UsageError, match="is defined inside something else"):
        vmm.sweep({"policy": [{"use": Hidden}], "workload": [{"replay": str(folder / "t")}]})
