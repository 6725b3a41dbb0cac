"""The embedded payload: its committed image is what its sources build, and it fits its place."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import firmware
from firmware import build

OF_X86 = ("--architecture", "x86_64", "--source")


def copied_sources(architecture: str, tmp_path: Path) -> Path:
    """A copy of the payload's directory, in a place of another name."""
    try:
        build.find_binutils(architecture)
    except build.BuildError as error:
        pytest.skip(str(error))
    copy = tmp_path / "elsewhere"
    shutil.copytree(build.SOURCES / architecture, copy)
    return copy


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return copied_sources("x86_64", tmp_path)


def equ(source: Path, name: str) -> int:
    """The value that a `.equ` line of an assembly file gives to a name."""
    found = re.search(rf"^\.equ {name},\s+(\w+)", source.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1], 0)


@pytest.mark.parametrize("architecture", build.TARGETS)
def test_payload_rebuilt_from_a_copy_is_the_committed_image(
    architecture: str, tmp_path: Path
) -> None:
    sources = copied_sources(architecture, tmp_path)

    image = build.build(sources, architecture)

    assert image == firmware.payload_bytes(architecture)


def test_bench_guest_rebuilt_from_a_copy_is_the_committed_image(sources: Path) -> None:
    image = build.build_bench(sources)

    assert image == Path(firmware.bench_path()).read_bytes()


@pytest.mark.parametrize("file", ["console.S", "bench/main.S"])
def test_check_with_a_changed_source_fails_and_says_what_to_run(
    sources: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources / file
    source.write_text(source.read_text() + "    .section .rodata\n    .byte 1\n")

    status = build.main(["--check", *OF_X86, str(sources)])

    assert status == 1
    assert "run python firmware/build.py" in capsys.readouterr().err


def test_check_with_unchanged_sources_succeeds(sources: Path) -> None:
    assert build.main(["--check", *OF_X86, str(sources)]) == 0


def test_build_with_a_broken_source_names_the_tool_and_its_message(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sources / "console.S").write_text("    no_such_instruction rax\n")

    status = build.main([*OF_X86, str(sources)])

    assert status == 2
    assert "no_such_instruction" in capsys.readouterr().err


def test_payload_outgrowing_its_place_is_refused_by_the_linker(sources: Path) -> None:
    console = sources / "console.S"
    console.write_text(console.read_text() + "    .skip 0x100000\n")

    with pytest.raises(build.BuildError, match="must stay below private memory"):
        build.build(sources)


def test_source_directory_without_its_architecture_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build.main(["--source", str(tmp_path)])

    assert "--source needs one --architecture" in capsys.readouterr().err


def test_payload_for_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(LookupError, match="no embedded payload for vax"):
        firmware.payload_bytes("vax")


def test_bench_guest_for_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(LookupError, match="no bench guest for vax"):
        firmware.bench_path("vax")


def test_addresses_the_loader_relies_on_are_those_of_the_sources() -> None:
    definitions = build.SOURCES / "x86_64" / "defs.inc"

    assert equ(definitions, "MIN_RAM_BYTES") == firmware.MIN_RAM_BYTES
    assert equ(definitions, "MIN_PRIVATE_START") == firmware.MEMORY_END
    linker_script = (build.SOURCES / "x86_64" / "payload.ld").read_text()
    assert f". = {firmware.LOAD_ADDRESS:#x};" in linker_script
