"""Small arm64 guests: their instructions are what their assembly says, and where they lie."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from vmm.arch.aarch64 import guest_cpu, machine_code, micro_guest
from vmm.arch.aarch64.machine_code import VECTOR_SIZE, VECTORS, Code, assembled, vectors
from vmm.arch.guest_cpu import CODE_SIZE

CODES = {name: code for name, code in vars(machine_code).items() if isinstance(code, tuple)}
PREFIX = "aarch64-linux-gnu-"


@pytest.mark.parametrize("name", CODES)
def test_words_of_a_code_are_what_its_assembly_assembles_to(name: str, tmp_path: Path) -> None:
    if shutil.which(f"{PREFIX}as") is None:
        pytest.skip("no arm64 assembler; install binutils-aarch64-linux-gnu")
    code: Code = CODES[name]
    source, object_file, flat = (tmp_path / end for end in ("code.s", "code.o", "code.bin"))
    source.write_text("\n".join(assembly for _, assembly in code) + "\n")
    subprocess.run([f"{PREFIX}as", "-o", object_file, source], check=True)
    subprocess.run([f"{PREFIX}objcopy", "-O", "binary", object_file, flat], check=True)

    assert flat.read_bytes() == assembled(code)


def test_vectors_hold_the_handler_in_each_of_their_places() -> None:
    table = vectors()

    assert len(table) == VECTORS * VECTOR_SIZE
    handler = assembled(machine_code.EXCEPTION)
    assert {table[at : at + len(handler)] for at in range(0, len(table), VECTOR_SIZE)} == {handler}


def test_guest_code_lies_in_its_memslot_without_overlap() -> None:
    places = sorted((gpa, gpa + len(data)) for gpa, data in guest_cpu.guest_code())

    assert places[0][0] >= 0
    assert places[-1][1] <= CODE_SIZE
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


def test_micro_guests_area_is_free_of_code() -> None:
    longest = max(len(assembled(code)) for code in CODES.values())

    assert micro_guest.CODE_GPA + longest <= micro_guest.AREA_GPA
