"""The writer of device trees, read back by a reader of the tests' own."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fdt import Read, read_tree
from vmm.arch.aarch64.fdt import Node, cells64, encode, flatten
from vmm.core.ranges import Range

NAMES = st.text("abcdefgh,@#-0123", min_size=1, max_size=12)
TREES: st.SearchStrategy[Any] = st.recursive(
    st.tuples(st.dictionaries(NAMES, st.binary(max_size=9), max_size=4), st.just({})),
    lambda inner: st.tuples(
        st.dictionaries(NAMES, st.binary(max_size=9), max_size=4),
        st.dictionaries(NAMES, inner, max_size=4),
    ),
    max_leaves=12,
)


def built(name: str, tree: Any) -> Node:
    node = Node(name, tree[0])
    node.children = [built(child, inner) for child, inner in tree[1].items()]
    return node


def read(tree: Any) -> Read:
    return Read(dict(tree[0]), {name: read(inner) for name, inner in tree[1].items()})


@given(TREES, st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 2**64 - 1))))
def test_tree_of_any_shape_is_read_back(
    tree: Any,
    reserved: list[tuple[int, int]],
) -> None:
    blob = flatten(built("", tree), [Range(*area) for area in reserved])

    assert read_tree(blob) == (read(tree), reserved)


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (None, b""),
        (b"\1\2", b"\1\2"),
        ("hvc", b"hvc\0"),
        (7, b"\0\0\0\7"),
        (("a", "bc"), b"a\0bc\0"),
        ([1, 2**32 - 1], b"\0\0\0\1\xff\xff\xff\xff"),
        (cells64(1, 2**63), struct.pack(">QQ", 1, 2**63)),
        ("\udcff", b"\xff\0"),  # a byte of a command line that is no UTF-8
    ],
)
def test_value_of_each_kind_is_encoded(value: object, data: bytes) -> None:
    assert encode(value) == data  # type: ignore[arg-type]


def test_value_with_a_nul_in_text_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        encode("a\0b")


@pytest.mark.parametrize("cell", [-1, 2**32])
def test_value_that_is_no_cell_is_refused(cell: int) -> None:
    with pytest.raises(struct.error):
        encode(cell)


def test_name_of_many_properties_is_stored_once() -> None:
    root = Node("", {"reg": 1})
    for number in range(10):
        root.add(f"n{number}", {"reg": number})

    assert flatten(root).count(b"reg\0") == 1
