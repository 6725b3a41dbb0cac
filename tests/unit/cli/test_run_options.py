"""The options of a run: what is read without argparse is what argparse would have read."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmm.cli.run_options import OPTIONS, build_parser, parse, read_plain
from vmm.core.errors import UsageError

NAMES = [name for group in OPTIONS.values() for name in group]
VALUES = ["", "x", "1G", "a b", "a=b", "-", "-1", "--", "-x y", "--rng", "--help=", "run"]
WORDS = st.one_of(
    st.sampled_from([*NAMES, "--policy", "--policy-arg", "--kern", "-k"]),
    st.sampled_from(VALUES),
    st.builds("{}={}".format, st.sampled_from(NAMES), st.sampled_from(VALUES)),
)


@given(st.lists(WORDS, max_size=5))
@example(["--kernel=--"])
@example(["--append", "-x y"])
def test_what_is_read_plainly_is_what_argparse_reads(words: list[str]) -> None:
    plain = read_plain(words)

    if plain is not None:
        assert vars(plain) == vars(build_parser().parse_args(words))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--kernel bzImage --mem 256M",
        "--private-mem --report r.json --disk a --disk b,ro",
        "--private-mem=memfd --cpus 2 --rng --balloon",
    ],
)
def test_common_lines_do_without_argparse(line: str) -> None:
    assert read_plain(line.split()) is not None


def test_options_given_several_times_do_not_add_up_over_runs() -> None:
    assert [parse(["--disk", "a"]).disk for _ in range(2)] == [["a"], ["a"]]


@pytest.mark.parametrize("line", ["--mem", "--rng=x", "--mem --rng", "word", "--memory 1", "-m 1"])
def test_what_argparse_refuses_is_refused(line: str) -> None:
    with pytest.raises(UsageError, match="see pyvmm --help"):
        parse(line.split())


def test_policies_keep_their_own_arguments() -> None:
    words = ["--policy", "A", "--policy-arg", "x=1", "--policy", "B", "--private-mem"]

    assert parse(words).policy == [("A", ["x=1"]), ("B", [])]
