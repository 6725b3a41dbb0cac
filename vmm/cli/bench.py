"""`pyvmm bench`: measures this host and pyvmm on it, and shows two runs side by side."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvm_bindings import System
from vmm.arch import architecture
from vmm.bench import (
    accessors,
    conversions,
    disk,
    exits,
    iommu,
    iommu_guest,
    linux,
    network,
    results,
    start_up,
)
from vmm.bench.chart import chart
from vmm.bench.host import host_facts
from vmm.bench.processes import bench_guest
from vmm.bench.series import Series
from vmm.cli.output import printing
from vmm.cli.parsers import BENCH_SECTIONS, QEMU
from vmm.cli.parsers import bench_parser as parser
from vmm.core.errors import HostError, PyvmmError, UsageError, one_line, tell
from vmm.core.output import Output
from vmm.exits.run_loop import install_kick_handler
from vmm.host.kvm import open_kvm

IF_ASKED = ("linux", "iommu")
"""They take minutes; linux needs a stock kernel, which this host may not run."""


class _Run:
    """What is to be measured, and with what."""

    def __init__(self, options: Any, opened: ExitStack) -> None:
        self.quick: bool = options.quick
        self._rounds: int | None = options.rounds
        self._options = options
        self._opened = opened
        self.qemu = _qemu(options.qemu)
        directory = options.disk_dir
        self.directory = Path(
            opened.enter_context(tempfile.TemporaryDirectory(prefix="pyvmm-bench-", dir=directory))
        )
        self._system: System | None = None

    def rounds(self, quick: int, full: int) -> int:
        return self._rounds or (quick if self.quick else full)

    def system(self) -> System:
        """KVM. Raises HostError where there is none."""
        if self._system is None:
            self._system = self._opened.enter_context(open_kvm(architecture(), complete=False))
        return self._system

    def _system_or_none(self) -> System | None:
        try:
            return self.system()
        except HostError:
            return None

    def measure(self, section: str) -> Iterator[Series]:
        """One section's series. Raises HostError for what can't be measured here."""
        sections: dict[str, Callable[[], Iterator[Series]]] = {
            "accessors": self._accessors,
            "conversions": self._conversions,
            "exits": lambda: exits.measure(
                self.system(), self.rounds(5, 15), 3000 if self.quick else 20000
            ),
            "disk": self._disk,
            "start-up": lambda: start_up.measure(self.rounds(7, 25), self.qemu),
            "memory": lambda: start_up.measure_memory(self.rounds(1, 3)),
            "linux": self._linux,
            "iommu": self._iommu,
        }
        return sections[section]()

    def _accessors(self) -> Iterator[Series]:
        sizes = accessors.QUICK_SIZES if self.quick else accessors.SIZES
        return accessors.measure(self._system_or_none(), self.rounds(5, 15), sizes)

    def _conversions(self) -> Iterator[Series]:
        sizes = conversions.QUICK_SIZES if self.quick else conversions.SIZES
        return conversions.measure(self.system(), self.rounds(3, 9), sizes)

    def _disk(self) -> Iterator[Series]:
        self.system()
        image = self.directory / "disk.img"
        disk.fill(image)
        tests = disk.QUICK_TESTS if self.quick else disk.TESTS
        from vmm.host.probes.file_io import vm_io  # most benches have no disk

        engines: tuple[str, ...] = disk.ENGINES
        if vm_io(architecture(), self.system()).status == "yes":
            engines = (*engines, "vmfd")
        return disk.measure(image, tests, self.rounds(3, 7), self.qemu, engines)

    def _guest(self, section: str) -> linux.Guest:
        """The stock kernel that was named, with a disk of random bytes. Raises UsageError."""
        options = self._options
        if options.kernel is None or options.initrd is None:
            more = " --lab-with-qemu" if section == "linux" else ""
            raise UsageError(
                f"--only {section} needs --kernel and --initrd; in the lab: pyvmm lab{more} "
                f"bench --only {section} --kernel debian:6.12"
            )
        for name in ("kernel", "initrd", "fio"):
            path = getattr(options, name)
            if path is not None and not Path(path).is_file():
                raise UsageError(f"--{name} {path}: no such file")
        image = self.directory / "linux.img"
        with open(image, "wb") as file:
            file.write(os.urandom(1 << 20) * (linux.DISK_BYTES >> 20))
        if options.fio is None:
            tell("bench: fio is left out: no --fio FILE")
        return linux.Guest(options.kernel, options.initrd, str(image), options.fio, None)

    def _iommu(self) -> Iterator[Series]:
        if self._options.kernel is None:
            return self._iommu_guest()
        started = time.monotonic()
        return iommu.measure(
            self._guest("iommu"),
            self.quick,
            self.rounds(1, 2),
            lambda turn: _progress(f"iommu: {turn}", time.monotonic() - started),
        )

    def _iommu_guest(self) -> Iterator[Series]:
        bench_guest()
        self.system()
        image = self.directory / "disk.img"
        disk.fill(image)
        works = iommu_guest.QUICK if self.quick else iommu_guest.FULL
        yield from iommu_guest.measure_calls(image, 10 if self.quick else 40)
        yield from iommu_guest.measure(image, works, self.rounds(3, 3))

    def _linux(self) -> Iterator[Series]:
        guest = self._guest("linux")._replace(peer=self._peer_or_none())
        started = time.monotonic()
        return linux.measure(
            guest,
            self.rounds(1, 3),
            self.qemu,
            lambda turn: _progress(f"linux: {turn}", time.monotonic() - started),
        )

    def _peer_or_none(self) -> network.Peer | None:
        try:
            return self._opened.enter_context(network.peer())
        except HostError as error:
            tell(f"bench: the network is left out: {error}")
            return None


def run(arguments: Sequence[str]) -> int:
    """Measure and print; the exit status. Raises UsageError and HostError."""
    options = parser().parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        raise UsageError(f"--rounds {options.rounds} is no number of rounds; use 1 or more")
    if options.compare is not None:
        (_, before), (_, after) = map(results.load, options.compare)
        with printing():
            # The files' names are anybody's, terminal sequences in them too.
            print("\n".join(map(one_line, results.compared(before, after).split("\n"))))
        return 0
    sections = options.only or [name for name in BENCH_SECTIONS if name not in IF_ASKED]
    outputs = {name: _output(name, getattr(options, name)) for name in ("json", "html", "svg")}
    install_kick_handler()
    with ExitStack() as opened:
        measuring = _Run(options, opened)
        host = host_facts(measuring.qemu, str(measuring.directory))
        series, failed = _all(measuring, sections)
    if not series:
        raise HostError("nothing could be measured here; pyvmm check says what this host lacks")
    facts = {"quick": options.quick, "sections": sections}
    contents: dict[str, Callable[[], str]] = {
        "json": lambda: json.dumps(results.as_json(host, facts, series), indent=1),
        "html": lambda: results.page(host, series),
        "svg": lambda: chart(host, series),
    }
    for name, output in outputs.items():
        if output is not None:
            output.write(contents[name]().encode("utf-8", "backslashreplace"))
            output.close()
    with printing():
        print(results.text(host, series))
    return 1 if failed else 0


def _all(measuring: _Run, sections: Sequence[str]) -> tuple[list[Series], bool]:
    """Every section's series, and whether one of them broke off."""
    series: list[Series] = []
    failed = False
    started = time.monotonic()
    for section in sections:
        case = None
        try:
            for one in measuring.measure(section):
                series.append(one)
                if one.case != case:
                    case = one.case
                    _progress(f"{section}: {case}", time.monotonic() - started)
        except UsageError:
            raise
        except (PyvmmError, OSError) as error:
            _progress("", 0)
            tell(f"bench: {section} broke off: {error}")
            failed = True
    _progress("", 0)
    return series, failed


def _progress(what: str, seconds: float) -> None:
    """On a terminal a line that is rewritten, elsewhere one for each series' case."""
    if not sys.stderr.isatty():
        if what:
            print(f"bench: {seconds:4.0f} s {what}", file=sys.stderr, flush=True)
        return
    line = f"{seconds:4.0f} s  {what}"[:100] if what else ""
    print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _qemu(given: str | None) -> list[str] | None:
    """The words that start QEMU: the one given, on PATH, or in the lab's cache, if any.

    Raises UsageError for one that isn't there.
    """
    if given is not None:
        if shutil.which(given) is None:
            raise UsageError(f"--qemu {given}: no such program")
        return [given]
    on_path = shutil.which(QEMU)
    if on_path is not None:
        return [on_path]
    from vmm.lab.machine import Lab
    from vmm.lab.options import LabOptions
    from vmm.lab.progress import Silent

    try:
        return Lab(LabOptions(offline=True), Silent()).packages.qemu(None).command()
    except HostError:
        return None


def _output(name: str, path: str | None) -> Output | None:
    """Looked at before anything is measured, so that a bad path costs nothing. UsageError."""
    return None if path is None else Output(f"--{name} {path}", path)
