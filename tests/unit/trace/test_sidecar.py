"""The sidecar's JSON is JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.trace.sidecar import to_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)  # fmt: skip


@given(values)
def test_to_json_says_what_json_reads(value: object) -> None:
    assert json.loads(to_json(value)) == value


def test_to_json_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="no place in a sidecar"):
        to_json({"what": object()})
