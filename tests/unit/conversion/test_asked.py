"""Which hooks work under which scheme, and what is refused instead of never being asked."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from vmm.conversion.asked import HOOKS, require_asked
from vmm.conversion.making import make_scheme
from vmm.conversion.matrix import SCHEMES, UNTOLD
from vmm.conversion.schemes.pkvm import PkvmScheme
from vmm.core.errors import UsageError
from vmm.policy import Allow, Decision, Event, Policy, View
from vmm.policy.builtin import Audit, Quota
from vmm.policy.protocol import IoEvent

PAGE = Path(__file__).resolve().parents[3] / "vmm" / "docs" / "reference" / "policies.md"
ARM64 = ("pkvm", "realm", "remap")


class OnlyLooks(Policy):
    """What works under every scheme."""

    def on_boot(self, view: View) -> Decision:
        return Allow()

    def on_io(self, event: IoEvent, view: View) -> Decision:
        return Allow()


class Fault(Policy):
    def on_fault(self, event: Event, view: View) -> Decision:
        return Allow()


class Both(Policy):
    def on_share(self, event: Event, view: View) -> Decision:
        return Allow()

    def on_unshare(self, event: Event, view: View) -> Decision:
        return Allow()


def test_table_has_every_scheme_and_agrees_with_what_schemes_say() -> None:
    assert list(HOOKS) == list(SCHEMES)
    for name, hooks in HOOKS.items():
        scheme = make_scheme(name, lambda: 38, nullcontext)
        assert scheme.told == (name not in UNTOLD)
        assert ("on_share" in hooks) == ("on_unshare" in hooks) == scheme.told
        assert ("on_fault" in hooks) == scheme.converts_on_fault
        assert {"on_boot", "on_io", "on_exit"} <= set(hooks)


def test_every_hook_of_the_protocol_is_in_the_table() -> None:
    hooks = {name for name in vars(Policy) if name.startswith("on_")}

    assert hooks == {hook for row in HOOKS.values() for hook in row}


@pytest.mark.parametrize(
    ("policy", "hooks"),
    [
        (Both(), "policy Both: on_share, on_unshare can't"),
        (Fault(), "policy Fault: on_fault can't"),
        (Quota(limit=4096), "policy Quota: on_share can't"),
        (Audit(file=Path("/dev/null")), "policy Audit: on_share, on_unshare can't"),
    ],
)
def test_hook_that_is_never_asked_is_a_usage_error_with_the_remedy(
    policy: Policy, hooks: str
) -> None:
    with pytest.raises(UsageError) as caught:
        require_asked([OnlyLooks(), policy], PkvmScheme(), ARM64)

    sentence = str(caught.value)
    assert hooks in sentence
    assert "under scheme pkvm, whose guest converts pages without telling" in sentence
    assert "use --scheme realm or remap, or a policy of on_boot, on_io and on_exit" in sentence


def test_policies_that_only_look_work_without_being_told() -> None:
    require_asked([OnlyLooks(), Policy()], PkvmScheme(), ARM64)


@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in UNTOLD])
def test_every_policy_works_where_the_host_is_told(name: str) -> None:
    require_asked([Both(), Fault()], make_scheme(name, lambda: 38, nullcontext))


def test_documentation_has_the_same_table() -> None:
    rows = re.findall(r"^\| `--scheme ([a-z`, -]+)` \| (`on_.*) \|$", PAGE.read_text(), re.M)
    found = {
        name: tuple(re.findall(r"on_\w+", hooks))
        for names, hooks in rows
        for name in re.split(r"`, `", names)
    }

    assert found == HOOKS
