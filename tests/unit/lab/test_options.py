"""The lab's options, and what is left of the line for the inner command."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.core.errors import UsageError
from vmm.lab.hosts import HOSTS
from vmm.lab.options import HELP, parse


def test_inner_arguments_pass_in_order_around_the_labs_own() -> None:
    command = parse(["--kernel", "k", "--lab-cpus", "4", "--private-mem", "--lab-mem=1G", "check"])

    assert command.arguments == ["--kernel", "k", "--private-mem", "check"]
    assert (command.options.cpus, command.options.memory_mib) == (4, 1024)
    assert not command.is_program


def test_exec_takes_the_rest_even_what_looks_like_the_labs() -> None:
    command = parse(["--lab-with-qemu", "--lab-exec", "sh", "-c", "x", "--lab-cpus", "9"])

    assert command.is_program and command.options.with_qemu
    assert command.arguments == ["sh", "-c", "x", "--lab-cpus", "9"]
    assert command.options.cpus is None


def test_environment_and_time_limit_are_parsed() -> None:
    options = parse(["--lab-env", "A=b=c", "--lab-time-limit", "1.5", "--lab-out", "r"]).options

    assert options.environment == {"A": "b=c"}
    assert (options.time_limit, options.outputs) == (1.5, [Path("r")])


def test_host_is_the_labs_own_option() -> None:
    command = parse(["check", "--host=sw-protected", "--json"])

    assert command.options.host == "sw-protected"
    assert command.arguments == ["check", "--json"]
    assert parse([]).options.host == "stock"


def test_help_names_every_host() -> None:
    for name in HOSTS:
        assert f"--host {name} " in HELP


def test_whole_kernel_is_asked_for_among_other_words() -> None:
    command = parse(["--kernel-build", "--kvm-patch", "a.patch", "selftest"])

    assert command.options.kernel_build
    assert command.arguments == ["selftest"]
    assert not parse(["selftest"]).options.kernel_build


def test_help_before_an_inner_command_is_the_labs() -> None:
    assert parse(["--help"]).help
    assert parse(["check", "--help"]).arguments == ["check", "--help"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (["--lab-nonsense"], "--lab-nonsense"),
        (["--lab-mem"], "--lab-mem"),
        (["--host", "tdx"], "--host tdx: .* stock, sw-protected"),
        (["--host"], "--host"),
        (["--lab-mem", "12Q"], "12Q"),
        (["--lab-mem", "64M"], "64M"),
        (["--lab-cpus", "0"], "--lab-cpus 0"),
        (["--lab-cpus", "nan"], "--lab-cpus nan"),
        (["--lab-time-limit", "soon"], "soon"),
        (["--lab-env", "1=2"], "1=2"),
        (["--lab-file", "/nonexistent/file"], "/nonexistent/file"),
        (["--lab-exec"], "--lab-exec"),
        (["check", "--lab-exec", "sh"], "check"),
    ],
)
def test_bad_option_is_named_in_the_error(line: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        parse(line)
