"""What pyvmm writes is as its JSON Schemas say: real runs here, and what needs other hosts made of
fakes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.schemas import REFERENCE, faults, schema
from tests.docs.test_snippets import _no_kvm
from tests.support import command
from tests.support.iommu import IommuRig
from tests.support.memory import pages
from tests.support.protected import protected_memory
from tests.support.trace import Events
from vmm.cli import replay as replay_command
from vmm.cli import report as report_command
from vmm.cli.ctl_saving import send_files
from vmm.conversion.accounting import Accounting, Refinements
from vmm.conversion.events import Lost, Noted, as_json
from vmm.devices.virtio.balloon import BalloonStatistics
from vmm.devices.virtio.iommu import S_OK, IommuStatistics
from vmm.exits.outcome import Outcome
from vmm.machine.report import build_report
from vmm.trace.layout import Kind

SCHEMAS = sorted(path.name.removesuffix(".schema.json") for path in REFERENCE.glob("*.schema.json"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report and the trace of a run of the payload."""
    if reason := _no_kvm():
        pytest.skip(f"needs a usable /dev/kvm: {reason}")
    folder = tmp_path_factory.mktemp("run")
    (folder / "disk.img").write_bytes(bytes(1 << 20))
    done = command.run(
        "--private-mem", "--disk", str(folder / "disk.img"), "--rng",
        "--policy", "vmm.policy.builtin:AllowAll",
        "--report", str(folder / "r.json"), "--trace", str(folder / "t"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_one(name: str) -> None:
    assert schema(name)["title"]


@pytest.mark.kvm
def test_report_of_a_run_is_as_its_schema_says(run: Path) -> None:
    assert not faults("report", json.loads((run / "r.json").read_text()))


@pytest.mark.kvm
def test_trace_of_a_run_is_as_its_schemas_say(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = str(run / "t")

    assert not faults("trace", json.loads((run / "t" / "trace.json").read_text()))
    assert report_command.run([trace, trace, "--json"]) == 0
    assert not faults("summary", said(capsys))
    assert replay_command.run([trace, "--json"]) == 0
    assert not faults("replay", said(capsys))


class Socket:
    """A connection to a run's control socket."""

    def __init__(self, path: Path, run: command.Session) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(command.TIME_LIMIT)
        while self._connection.connect_ex(str(path)):  # not there yet, or not listening
            assert run.process.poll() is None
        self.lines = self._connection.makefile("rb")

    def ask(self, *files: int, **request: object) -> Any:
        assert not faults("control", request, part="request")
        send_files(self._connection, json.dumps(request).encode() + b"\n", files)
        return json.loads(self.lines.readline())

    def close(self) -> None:
        self.lines.close()
        self._connection.close()


@pytest.mark.kvm
def test_control_socket_of_a_run_is_as_its_schema_says(tmp_path: Path, run: Path) -> None:
    path, disk = tmp_path / "control", run / "disk.img"
    words = ["--private-mem=memfd", "-S", "--control", str(path), "--disk", str(disk)]
    with command.Session([*words, "--policy", "vmm.policy.builtin:AllowAll"]) as session:
        asking, following = Socket(path, session), Socket(path, session)

        found = {
            "status": asking.ask(command="status"),
            "dump": asking.ask(command="dump-state"),
            "done": following.ask(command="follow"),
            "refused": asking.ask(command="convert", kind="share", gpa="16T", size=4096),
        }
        with (tmp_path / "m").open("wb") as memory, (tmp_path / "p").open("wb") as private:
            files = memory.fileno(), private.fileno()
            found["core"] = asking.ask(files[0], command="dump")
            found["snapshot"] = asking.ask(files[0], command="snapshot")
            found["snapshot"] |= asking.ask(*files, command="snapshot", private=True)
        assert not asking.ask(command="resume").get("error")
        events = [json.loads(line) for line in following.lines]

        assert session.wait()[0] == 0
        asking.close()
        following.close()
    for part, answer in found.items():
        assert not faults("control", answer, part=part), part
    assert {event["event"] for event in events} >= {"share", "unshare", "state", "ended"}
    for event in events:
        assert not faults("control", event, part="event"), event


def test_lost_events_are_as_the_schema_says() -> None:
    assert not faults("control", as_json(Lost(1.0, 3)), part="event")
    stopped = as_json(Noted(1.0, "device-stopped", {"device": "blk0"}))
    assert not faults("control", stopped, part="event")


@pytest.fixture
def eventful(tmp_path: Path) -> Path:
    """A trace with an event of every kind."""
    events = Events((0, 64, "shared"), (64, 4096, "private"))
    events.facts |= {"dropped_events": 3}
    for chunk in range(4):
        events.convert(Kind.SHARE, 1.0 + chunk, 64 + 512 * chunk, 512)
    events.convert(Kind.UNSHARE, 6, 64, 512)
    events.request(Kind.SHARE, 7, 64, 1, decision="deny", errno=13, by="Quota")
    for kind in (Kind.IO_IN, Kind.IO_OUT, Kind.IO_REFUSED):
        events.add(kind, 8, "blk0", gpa=0, size=4096, errno=14 if kind == Kind.IO_REFUSED else 0)
    events.add(Kind.LEND, 9, "blk0", gpa=4096 * 3000, size=4096, high=1)
    events.add(Kind.RETURN, 10, "blk0", gpa=4096 * 3000, size=4096, took=1.0)
    events.add(Kind.EXIT, 11, "io", gpa=0x3F8, took=0.1)
    events.add(Kind.FAULT, 12, "shared", gpa=4096 * 3000)
    return events.write(tmp_path / "t")


def test_trace_of_everything_is_as_its_schemas_say(
    eventful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_command.run([str(eventful), "--json"]) == 0
    (summary,) = (whole := said(capsys))["traces"]
    assert not faults("summary", whole)
    assert summary["bounce_buffer"] and summary["lending"] and summary["io"] and summary["refusals"]

    policy = ["--policy", "vmm.policy.builtin:Quota", "--policy-arg", "limit=2M"]
    assert replay_command.run([str(eventful), "--json", *policy]) == 0
    found = said(capsys)
    assert not faults("replay", found)
    assert found["refused"] and found["replayed"]["lends"]


def test_report_of_a_protected_guest_is_as_its_schema_says() -> None:
    with protected_memory(pages(0, 48)) as (memory, _):
        report = build_report(
            scheme="pkvm", not_taken={}, doorbell="hypercall", memory=memory,
            outcome=Outcome("poweroff"), accounting=Accounting(), refinements=Refinements(),
            io={"balloon": BalloonStatistics().as_dict(), "iommu": IommuStatistics().as_dict()},
            exits={"io": 1}, ports={0x3F8: 1}, wall_seconds=1.0,
        )  # fmt: skip

    assert not faults("report", report)


@pytest.fixture
def rig() -> Iterator[IommuRig]:
    made = IommuRig()
    assert made.attach() == S_OK
    yield made
    made.close()


def test_reports_iommu_is_as_its_schema_says(rig: IommuRig) -> None:
    assert rig.map(0x4000_0000, 20) == S_OK

    assert not faults("report", rig.lender.as_dict(), part="iommu")


@pytest.mark.parametrize(
    ("part", "document", "fault"),
    [
        ("tally", {"calls": 1, "bytes": 0, "denied": 0}, "'failed' is a required property"),
        ("tally", {"calls": -1, "bytes": 0, "denied": 0, "failed": 0}, "less than the minimum"),
        ("tally", {"calls": 1, "bytes": 0, "denied": 0, "failed": 0, "new": 1}, "'new' was unexp"),
    ],
)
def test_document_that_differs_is_found(part: str, document: object, fault: str) -> None:
    (found,) = faults("report", document, part=part)

    assert fault in found
