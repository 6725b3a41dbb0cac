"""The fuzz targets on their corpus, and a moment of libFuzzer beyond it (PYVMM_FUZZ: a longer one).

How they are run for hours, and how to add one: tests/fuzz/README.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import corpora, hours, libfuzzer
from tests.fuzz.corpora import corpus
from tests.fuzz.drawing import Choices, patched, patches, recorded
from tests.fuzz.native import NATIVE
from tests.fuzz.oracles import Resources
from tests.fuzz.targets import TARGETS
from vmm.conversion.transaction import Converter
from vmm.core.errors import UsageError
from vmm.core.ranges import Range
from vmm.memory.lending import READ, WRITE, IommuMemory, LendingMemory, _Plan

ROOT = Path(__file__).parents[2]
MOST_CORPUS = 1 << 20
"""Bytes of all corpora together."""


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_inputs_are_survived_and_leave_nothing_behind(name: str) -> None:
    target, inputs = TARGETS[name], corpus(name)
    for data in inputs:
        target.run(data)  # everything is imported now
    resources = Resources()

    for _ in range(2):
        for data in inputs:
            target(data)
        resources.assert_given_back()


@pytest.fixture(scope="session")
def fuzzed(
    tmp_path_factory: pytest.TempPathFactory, fuzz_seed: int, fuzz_factor: int
) -> dict[str, dict[str, Any]]:
    """What a moment of libFuzzer came to, by target."""
    if not libfuzzer.available():
        pytest.skip("atheris is not installed; pip install 'pyvmm[dev]' has it on x86-64 Linux")
    work = tmp_path_factory.mktemp("fuzz")
    command = [sys.executable, "-m", "tests.fuzz.libfuzzer", "--work", str(work)]
    # The ordinary run is the same each time: new ground is for the hours' runs.
    is_wanted = fuzz_factor > 1 or "PYVMM_FUZZ_SEED" in os.environ
    seed = (fuzz_seed % (1 << 31) or 1) if is_wanted else 1
    ended = subprocess.run(
        [*command, "--factor", str(fuzz_factor), "--seed", str(seed)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=7200,
    )  # fmt: skip
    assert ended.returncode in (0, 1), ended.stderr
    results = [json.loads(line) for line in ended.stdout.splitlines()]
    return {result["name"]: result for result in results}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_libfuzzer_makes_are_survived(
    name: str, fuzzed: dict[str, dict[str, Any]], fuzz_seed: int, fuzz_factor: int
) -> None:
    result = fuzzed[name]

    again = f"PYVMM_FUZZ_SEED={fuzz_seed} PYVMM_FUZZ={fuzz_factor}"
    assert not result["failed"], f"{again}: {result['failed']}\n{result['said']}"
    assert result["runs"] >= TARGETS[name].runs
    assert result["edges"] > 5, "the target has to get somewhere for this to mean anything"


def test_every_target_has_a_corpus_and_all_of_them_are_small() -> None:
    assert len(TARGETS) >= 24
    assert [name for name in TARGETS if not corpora.found(name)] == []
    sizes = {path.name: path.stat().st_size for path in corpora.FOLDER.iterdir()}
    assert sum(sizes.values()) < MOST_CORPUS
    names = {path.partition(".")[0] for path in sizes}
    assert names <= TARGETS.keys() | NATIVE.keys(), "corpora of targets that are no more"


# --- the machinery ---


def test_input_that_fails_is_kept_and_said(tmp_path: Path) -> None:
    if not libfuzzer.available():
        pytest.skip("atheris is not installed; pip install 'pyvmm[dev]' has it on x86-64 Linux")
    program = (
        "import sys\n"
        "from tests.fuzz import libfuzzer\n"
        "from tests.fuzz.targets.registry import TARGETS, target\n"
        "from tests.fuzz import targets\n"
        "TARGETS.clear()\n"
        "@target('bad')\n"
        "def bad(data):\n"
        "    assert not data, 'found'\n"
        "sys.exit(libfuzzer.main(['bad', '--work', sys.argv[1], '--runs', '50']))\n"
    )

    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert ended.returncode == 1, ended.stderr
    result = json.loads(ended.stdout)
    (kept,) = result["failed"]
    assert (tmp_path / "bad.failed" / kept).read_bytes()
    assert "AssertionError: found" in result["said"]


def test_recorded_program_is_played_again_by_its_bytes() -> None:
    told: list[list[object]] = []

    def play(choices: Choices) -> None:
        words: list[object] = []
        for _ in range(5):
            words += [choices.random() < 0.5, choices.randrange(3, 1000), choices.choice("abc"),
                      choices.randbytes(20), choices.getrandbits(33),
                      choices.sample("xyz", 2)]  # fmt: skip
        told.append(words)

    data = recorded(play, 7, most=4096)
    play(Choices(data))

    assert told[0] == told[1]
    play(Choices(data[:-1] + bytes([data[-1] ^ 1])))
    assert told[2] != told[1]


def test_patches_make_one_file_of_another() -> None:
    base, wanted = bytes(1 << 17), bytearray(1 << 17)
    for at in (0, 5, 300, 65535, 100_000, (1 << 17) - 1):
        wanted[at] = 1 + at % 255
    wanted[1000:2000] = b"\1" * 1000

    assert patched(base, patches(base, bytes(wanted))) == wanted


def test_archive_of_a_corpus_is_the_same_for_the_same_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "FOLDER", tmp_path)
    corpora.keep("some", [b"bb", b"", b"a", b"bb"])
    first = (tmp_path / "some.zip").read_bytes()

    assert corpora.keep("some", [b"a", b"bb", b""]) == len(first)

    assert (tmp_path / "some.zip").read_bytes() == first
    (tmp_path / "some.txt").write_text("0102  # what it is\n# nothing\n")
    assert corpora.corpus("some") == [b"\1\2", b"", b"a", b"bb"]


def test_target_with_the_fewest_seconds_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / hours.TURNS).write_text('{"name": "elf", "seconds": 9, "failed": []}\n')
    asked: list[str] = []

    def run(name: str, work: Path, words: list[str]) -> libfuzzer.Result:
        asked.append(name)
        return libfuzzer.Result(name, 2, 3, 4, 5, 6.0, [], "")

    clock = iter(range(100))
    monkeypatch.setattr(libfuzzer, "run", run)
    monkeypatch.setattr("tests.fuzz.hours.time.monotonic", lambda: next(clock))

    hours.take_turns(tmp_path, ["elf", "queue"], 6 / 3600, 60)

    assert asked[0] == "queue"
    assert any(line.startswith("| queue ") for line in hours.table(tmp_path))


def test_several_that_share_a_folder_have_a_target_each(tmp_path: Path) -> None:
    (tmp_path / hours.TURNS).write_text('{"name": "elf", "seconds": 9, "failed": []}\n')
    names = ["elf", "queue"]

    with hours.next_target(tmp_path, names) as first:
        with hours.next_target(tmp_path, names) as second:
            assert [first, second] == ["queue", "elf"]
            with pytest.raises(ValueError, match="at work on each of elf, queue"):
                hours.next_target(tmp_path, names).__enter__()
        with hours.next_target(tmp_path, names) as again:
            assert again == "elf"


# --- faults that are put in, and found ---


def test_target_that_keeps_memory_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytes] = []
    doorbell = TARGETS["doorbell"]

    def leaking(data: bytes) -> None:
        kept.append(b"x" * (4 << 20))
        doorbell.run(data)

    monkeypatch.setitem(TARGETS, "doorbell", doorbell._replace(run=leaking))

    with pytest.raises(AssertionError, match="resident memory has grown"):
        test_corpus_inputs_are_survived_and_leave_nothing_behind("doorbell")


def test_input_that_costs_too_much_is_found() -> None:
    def busy(data: bytes) -> None:
        for _ in range(1000):
            len(data)

    target = TARGETS["elf"]._replace(run=busy, most_calls=500)
    for attempt in (target, target.quickly):
        with pytest.raises(AssertionError, match="calls for 3 bytes"):
            attempt(b"abc")


def play_all(name: str) -> None:
    for data in (*corpus(name), *TARGETS[name].seeds()):
        TARGETS[name].run(data)


@pytest.mark.parametrize("name", ["hypercall", "fault", "doorbell"])
def test_target_notices_a_request_that_is_not_validated(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trust(converter: Converter, request: object) -> Range:
        return Range(request.gpa, request.pages * 4096)  # type: ignore[attr-defined]

    monkeypatch.setattr(Converter, "_validate", trust)

    with pytest.raises(Exception) as caught:
        play_all(name)
    assert not isinstance(caught.value, ValueError) or "range" in str(caught.value)


def test_iommu_target_notices_pages_that_stay_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LendingMemory, "take_back", lambda memory, mapping: [])

    with pytest.raises(AssertionError):
        play_all("iommu")


def test_dma_target_notices_a_translation_that_ignores_the_direction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = IommuMemory._begin

    def lax(memory: IommuMemory, pieces: list[int], access: int) -> _Plan:
        return begin(memory, pieces, READ | WRITE)

    monkeypatch.setattr(IommuMemory, "_begin", lax)

    with pytest.raises(AssertionError, match="are not mapped, and were reached"):
        play_all("dma")


def test_dma_target_notices_bytes_in_the_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    write = IommuMemory._write

    def astray(memory: IommuMemory, plan: _Plan, data: bytes) -> None:
        write(memory, plan, data)
        memory._memory.shared.pwrite(b"x", 0)

    monkeypatch.setattr(IommuMemory, "_write", astray)

    with pytest.raises(AssertionError, match="another byte has changed"):
        play_all("dma")


@pytest.mark.parametrize("name", ["elf", "bzimage"])
def test_image_targets_notice_an_unforeseen_exception(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(*arguments: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr("vmm.arch.x86_64.kernel.parse_elf", careless)

    with pytest.raises(IndexError):
        play_all(name)


def nothing(*arguments: object, **keywords: object) -> None:
    """What a step comes to that has been forgotten."""


def accept(*arguments: object) -> int:
    return 0


def any_moves(body: memoryview, *bounds: object) -> list[int]:
    """Moves, wherever in the file they begin and end."""
    moves: list[int] = body.cast("Q").tolist()
    return moves


def odd(*arguments: object, **keywords: object) -> None:
    raise IndexError("nobody foresaw this")


@pytest.mark.parametrize(
    ("name", "where", "broken"),
    [
        ("queue", "vmm.devices.virtio.queue.SplitQueue._write", nothing),
        ("msix", "vmm.devices.msix.MsixTable._send_all", nothing),
        ("bars", "vmm.devices.pci.PciFunction.unmap_changed", nothing),
        ("share", "vmm.core.share._stays_inside", lambda parts, target: True),
        ("share", "vmm.core.share.os.replace", nothing),
        ("gdb-session", "vmm.control.gdb.target.Target.remove_software", nothing),
        ("gdb-packets", "vmm.control.gdb.packets.unescaped", lambda data: data),
        ("control-socket", "vmm.control.control_socket._number", lambda request, name: 1 << 70),
        ("exec-init", "vmm.machine.execution._Fd.write", accept),
        ("load-window", "vmm.devices.load_window.LoadWindow._fail", nothing),
        ("root-disk", "vmm.core.root_disk._uuid", lambda data: "x"),
        ("disk-image", "vmm.core.disk_image._format", nothing),
        ("replay", "vmm.replay.replay.Replay.run", nothing),
        ("trace", "vmm.trace.summary.duration_ns", odd),
        ("recording", "vmm.scenario.recording.pairwise", lambda numbers: [(0, 0)] * 99),
        ("smc", "vmm.conversion.transaction.Converter.convert", accept),
        ("conversions", "vmm.memory.guest_memory.GuestMemory.discard_private", nothing),
        ("iommu-program", "vmm.memory.lending.LendingMemory.take_back", lambda *_: []),
        ("arm-image", "vmm.arch.aarch64.kernel.parse_header", odd),
        ("payload", "vmm.boot.decompress._stream", odd),
        ("options", "vmm.machine.config.parse_size", odd),
        ("config", "vmm.cli.config_file._File._policies", lambda *_: [[]]),
        ("modules", "vmm.core.kmodules.dependencies", odd),
        ("cpio", "vmm.core.cpio.CpioWriter._parents_of", nothing),
        ("device-tree", "vmm.arch.aarch64.fdt._padded", lambda data: data),
        ("end-mark", "vmm.lab.streams.EndMark.rest", lambda mark: b""),
        ("blk", "vmm.devices.virtio.block.VirtioBlock.close", nothing),
        ("device-process", "vmm.devices.process.protocol.moves_in", any_moves),
        ("vhost-user", "vmm.devices.vhost_user.rings.unreturned", odd),
        ("snapshot", "vmm.devices.msix.MsixTable.restore", odd),
        ("vsock", "vmm.devices.virtio.vsock.VirtioVsock.close", nothing),
        ("rng", "vmm.devices.virtio.queue.SplitQueue.publish", odd),
    ],
)
def test_target_finds_a_fault_that_is_put_in(
    name: str, where: str, broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, broken)

    with pytest.raises((AssertionError, IndexError, ValueError, OSError, UsageError)):
        play_all(name)
