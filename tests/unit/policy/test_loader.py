"""--policy MODULE:CLASS and FILE.py:CLASS: found, or one line that says what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vmm.core.errors import UsageError
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.policy import Allow, Deny, Event, Policy
from vmm.policy.loader import load_policy

DENY_ALL = """
from __future__ import annotations
from dataclasses import dataclass, field
from vmm.policy import Deny, Event, Policy, View

@dataclass
class DenyAll(Policy):
    limit: int = 3
    seen: list[Event] = field(default_factory=list)

    def on_share(self, event: Event, view: View) -> Deny:
        self.seen.append(event)
        return Deny(13)

class Fussy(Policy):
    def __init__(self) -> None:
        raise RuntimeError("no config")

class NeedsArgument(Policy):
    def __init__(self, path: str) -> None: ...

class NoPolicy: ...

number = 3
"""


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(DENY_ALL)
    return path


def test_class_in_a_file_is_made_and_asked(policy_file: Path) -> None:
    """With a dataclass and postponed annotations, as people write policies."""
    policy = load_policy(f"{policy_file}:DenyAll")

    event = Event(Kind.SHARE, Range(0, 4096), 0, "port")
    assert policy.on_share(event, None) == Deny(13)  # type: ignore[arg-type]
    assert policy.on_unshare(event, None) == Allow()  # type: ignore[arg-type]
    assert vars(policy) == {"limit": 3, "seen": [event]}


def test_two_files_of_the_same_name_do_not_get_mixed_up(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        code = f"from vmm.policy import Policy\nclass P(Policy):\n    name = {folder!r}\n"
        (tmp_path / folder / "policy.py").write_text(code)

    loaded = [load_policy(f"{tmp_path}/{folder}/policy.py:P") for folder in ("a", "b")]

    assert [policy.name for policy in loaded] == ["a", "b"]  # type: ignore[attr-defined]


def test_class_in_a_module_is_made() -> None:
    assert type(load_policy("vmm.policy:Policy")) is Policy


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "write MODULE:CLASS"),
        ("DenyAll", "write MODULE:CLASS"),
        (":DenyAll", "write MODULE:CLASS"),
        ("{file}", "write MODULE:CLASS"),
        ("{file}:", "write MODULE:CLASS"),
        ("{file}:Missing", "has no class Missing"),
        ("{file}:NoPolicy", "not a subclass"),
        ("{file}:number", "not a subclass"),
        ("{file}:Fussy", "no config"),
        ("{file}:NeedsArgument", "path"),
        ("{directory}/none.py:P", "No such file"),
        ("{directory}/syntax.py:P", "syntax"),
        ("{directory}/raises.py:P", "ZeroDivisionError"),
        ("{directory}/binary.py:P", "loading"),
        ("no_such_module:P", "no module no_such_module on Python's path"),
        ("vmm..policy:P", "write MODULE:CLASS"),
        ("../policy:P", "write MODULE:CLASS"),
        ("vmm.policy:Polic", "has no class Polic"),
        ("vmm.policy:Event", "not a subclass"),
    ],
)
def test_bad_spec_is_one_line_with_the_spec_and_the_reason(
    policy_file: Path, spec: str, words: str
) -> None:
    directory = policy_file.parent
    (directory / "syntax.py").write_text("class P(:\n")
    (directory / "raises.py").write_text("1 / 0\n")
    (directory / "binary.py").write_bytes(b"\0\xff\xfe")
    given = spec.format(file=policy_file, directory=directory)

    with pytest.raises(UsageError) as raised:
        load_policy(given)

    text = str(raised.value)
    assert text.startswith(f"--policy {given}: ")
    assert words in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def on_shared(self, event, view): ...", "P.on_shared is no hook .* mean on_share?"),
        ("def on_migrate(self): ...", "P.on_migrate is no hook .*; the hooks are on_share, "),
        (
            "def on_share(self, event): ...",
            r"P.on_share is called with 2 arguments; write def on_share\(self, event, view\)",
        ),
        ("def on_boot(self): ...", r"P.on_boot is called with 1 arguments; .*\(self, view\)"),
        ("def on_io(self, event, view, more): ...", "P.on_io is called with 2 arguments"),
        ("on_exit = 3", "P.on_exit is 3, not a method"),
        ("def on_save(self, view): ...", "P has one of on_save and on_restore; write the other"),
        ("def on_restore(self, state, view): ...", "P has one of on_save and on_restore"),
    ],
)
def test_hook_that_could_not_be_called_is_refused(tmp_path: Path, body: str, words: str) -> None:
    """It would fail open."""
    path = tmp_path / "p.py"
    path.write_text(f"from vmm.policy import Policy\nclass P(Policy):\n    {body}\n")

    with pytest.raises(UsageError, match=words) as raised:
        load_policy(f"{path}:P")

    assert "\n" not in str(raised.value)


def test_hook_that_takes_more_than_it_is_given_is_called(tmp_path: Path) -> None:
    path = tmp_path / "p.py"
    path.write_text(
        "from vmm.policy import Deny, Policy\nclass P(Policy):\n"
        "    @staticmethod\n    def on_share(*given): return Deny(len(given))\n"
        "    def on_boot(self, view, extra=None, *, also=1): ...\n"
        "    def once(self): ...\n"
    )

    policy = load_policy(f"{path}:P")

    assert policy.on_share(None, None) == Deny(2)  # type: ignore[arg-type]


def test_file_imports_the_modules_beside_it_but_none_of_them_stands_in_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "a_neighbour", raising=False)
    (tmp_path / "a_neighbour.py").write_text("LIMIT = 7\n")
    (tmp_path / "colorsys.py").write_text("1 / 0\n")  # as in the standard library
    (tmp_path / "p.py").write_text(
        "from vmm.policy import Policy\nfrom a_neighbour import LIMIT\nimport colorsys\n"
        "class P(Policy):\n    limit = LIMIT\n"
    )

    policy = load_policy(f"{tmp_path}/p.py:P")

    assert vars(type(policy))["limit"] == 7
    sys.modules.pop("a_neighbour")


def test_file_that_raises_leaves_no_half_made_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "pyvmm_user_policy", raising=False)
    before = set(sys.modules)
    path = tmp_path / "raises.py"
    path.write_text("1 / 0\n")

    with pytest.raises(UsageError):
        load_policy(f"{path}:P")

    assert set(sys.modules) == before
