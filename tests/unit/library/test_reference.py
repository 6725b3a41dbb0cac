"""The library's page in the documentation is what its docstrings say."""

from __future__ import annotations

import vmm
from vmm.library.reference import PAGE, SECTIONS, page


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "python -m vmm.library.reference > the page"


def test_page_has_every_public_name_once() -> None:
    listed = [name for _, names in SECTIONS.values() for name in names]

    assert sorted([*listed, "MachineEvent"]) == sorted(vmm.__all__)  # a union, told with the four
    text = page()
    assert [text.count(f"\n### `{name}`") for name in listed] == [1] * len(listed)


def test_page_says_something_of_every_public_name_and_has_no_pyvmms_own_paths() -> None:
    text = page()

    assert "- `start()`: Set it up and let the guest run" in text
    assert "- `vendor = 0x1AF4`" in text
    assert "make_console" not in text
