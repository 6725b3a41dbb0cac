"""A sweep's definition: the grid that it says, and what is wrong with it in one line."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from vmm.core.errors import UsageError
from vmm.sweeps.definition import Definition, parse, read

ROOT = Path(__file__).resolve().parents[3]
POLICY = '[[policy]]\nuse = "m:A"\n'
WORKLOAD = '[[workload]]\nreplay = "t"\n'


def parsed(text: str) -> Definition:
    return parse(tomllib.loads(text), "s.toml", "s", "")


def test_grid_has_every_combination_and_repeats_come_last() -> None:
    found = parsed(
        """
        kernel = ["6.12", "7.3"]
        repetitions = 2
        [[policy]]
        use = "m:A"
        parameters = { limit = ["1M", "2M"], fast = [true] }
        [[policy]]
        use = "m:B"
        [[workload]]
        name = "boot"
        replay = "traces/boot-{kernel}"
        [[workload]]
        replay = "other"
        """
    )

    cells = list(found.cells())

    assert len(cells) == len(found) == 3 * 3 * 2
    assert [policy.label for policy in found.policies] == [
        "A limit=1M fast=yes", "A limit=2M fast=yes", "B",
    ]  # fmt: skip
    assert [(each.label, each.about["trace"]) for each in found.workloads] == [
        ("boot 6.12", "traces/boot-6.12"), ("boot 7.3", "traces/boot-7.3"), ("other", "other"),
    ]  # fmt: skip
    assert [cell.repetition for cell in cells] == [0] * 9 + [1] * 9


def test_stack_of_policies_is_a_grid_of_its_own() -> None:
    found = parsed(
        """
        [[policy]]
        stack = [
          { use = "m:A", parameters = { limit = [1, 2] } },
          { use = "p.py:B", parameters = { limit = 3 } },
        ]
        """
        + WORKLOAD
    )

    assert [policy.label for policy in found.policies] == [
        "A + B A.limit=1 B.limit=3", "A + B A.limit=2 B.limit=3",
    ]  # fmt: skip
    assert found.policies[1].stack == (("m:A", ("limit=2",)), ("p.py:B", ("limit=3",)))


def test_repetition_in_a_trace_names_one_for_each() -> None:
    found = parsed("repetitions = 2\n" + POLICY + WORKLOAD.replace('"t"', '"t-{repetition}"'))

    cells = list(found.cells())

    assert [cell.words(cell.workload.about)["trace"] for cell in cells] == ["t-0", "t-1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("repetition = 2\n" + POLICY + WORKLOAD,
         "s.toml: unknown key 'repetition'; did you mean repetitions?"),
        ("repetitions = 0\n" + POLICY + WORKLOAD, "s.toml: repetitions = 0: use 1 to 1000000"),
        ("repetitions = true\n" + POLICY + WORKLOAD,
         "s.toml: repetitions = True is not a whole number"),
        ("time_limit = -1\n" + POLICY + WORKLOAD, "s.toml: time_limit = -1: use more than 0"),
        ("repetitions = 1_000_000\n" + POLICY.replace("A", "A1") + POLICY + WORKLOAD,
         "s.toml: 2 policies x 1 workloads x 1000000 repetitions are 2000000 cells; 1000000 at"),
        (WORKLOAD, "s.toml: there is no [[policy]]; give one at least"),
        (POLICY, "s.toml: there is no [[workload]]; give one at least"),
        ('policy = "m:A"\n' + WORKLOAD, "s.toml: policy = 'm:A' is not a list of tables: write"),
        ('[[policy]]\nuse = "m:A"\nparamters = {}\n' + WORKLOAD,
         "s.toml: policy 1: unknown key 'paramters'; did you mean parameters?"),
        ("[[policy]]\nname = 'x'\n" + WORKLOAD,
         "s.toml: policy 1: exactly one of use and stack is needed"),
        ('[[policy]]\nuse = "m:A"\nparameters = { a = [] }\n' + WORKLOAD,
         "s.toml: policy 1, parameters: a = []: give one value at least"),
        ('[[policy]]\nuse = "m:A"\nparameters = { a = [[1]] }\n' + WORKLOAD,
         "s.toml: policy 1, parameters: a = [1]: give text, a number, true or false"),
        ('[[policy]]\nstack = [{ uses = "m:A" }]\n' + WORKLOAD,
         "s.toml: policy 1, stack 1: unknown key 'uses'; did you mean use?"),
        (POLICY + POLICY + WORKLOAD,
         "s.toml: there are two policy entries 'A'; give one another name"),
        (POLICY + WORKLOAD + WORKLOAD,
         "s.toml: there are two workload entries 't'; give one another name"),
        (POLICY + "[[workload]]\nname = 'x'\n",
         "s.toml: workload 1: exactly one of replay, scenario, kvm, lab is needed"),
        (POLICY + '[[workload]]\nreplay = "t-{kernel}"\n',
         's.toml: workload 1: {kernel} is used, but there is no kernel = ["...", "..."]'),
        (POLICY + '[[workload]]\nreplay = "t-{kernle}"\n',
         "s.toml: workload 1: {kernle} stands for nothing; did you mean kernel?"),
        (POLICY + '[[workload]]\nreplay = "t"\nkernel = "6.12"\n',
         "s.toml: workload 1: kernel is given, but {kernel} is used nowhere"),
        (POLICY + '[[workload]]\nreplay = "t"\nparameters = { a = 1 }\n',
         "s.toml: workload 1: parameters is for scenario, not for replay"),
        (POLICY + '[[workload]]\nkvm = { memori = "64M" }\n',
         "s.toml: workload 1, kvm: unknown key 'memori'; did you mean memory?"),
        (POLICY + '[[workload]]\nkvm = { cpus = "2" }\n',
         "s.toml: workload 1, kvm: cpus = '2' is not a whole number"),
        (POLICY + '[[workload]]\nkvm = { disks = [1] }\n',
         "s.toml: workload 1, kvm: disks holds 1, which is not a line of text"),
        (POLICY + '[[workload]]\nlab = ["--trace", "t"]\n',
         "s.toml: workload 1: lab holds --trace, which the sweep gives itself; leave it out"),
        (POLICY + '[[workload]]\nreplay = 5\n', "s.toml: workload 1: replay = 5 is not text"),
        ('name = "two\\nlines"\n' + POLICY + WORKLOAD, "s.toml: name = 'two\\nlines': a name is"),
    ],
)  # fmt: skip
def test_definition_with_a_mistake_is_one_line_with_the_place(text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parsed(text)

    assert str(raised.value).startswith(message)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = [", "is no TOML: "),
        (b"a = " + b"1" * 5000, "is no TOML: "),
        (b"\xff", "is no TOML: "),
        (None, "cannot be read: No such file"),
    ],
)
def test_file_that_is_no_toml_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "s.toml"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UsageError, match=message):
        read(str(path))


def test_sweep_is_called_as_its_file_unless_it_says(tmp_path: Path) -> None:
    path = tmp_path / "night.toml"
    path.write_text(POLICY + WORKLOAD)

    assert read(str(path)).name == "night"
    path.write_text('name = "other"\n' + POLICY + WORKLOAD)
    assert read(str(path)).name == "other"


def test_example_is_the_sweep_of_the_how_to() -> None:
    example = read(str(ROOT / "vmm/examples/sweep/boots.toml"))
    page = (ROOT / "vmm/docs/howto/sweep-on-many-machines.md").read_text()
    block = page.partition("```toml boots.toml\n")[2].partition("```")[0]

    shown = parse(tomllib.loads(block), "boots.toml", "boots", example.folder)

    assert shown == example
    assert len({policy.name for policy in shown.policies}) >= 6
    assert {workload.kernel for workload in shown.workloads} == {"6.12", "7.3"}
