"""What all of pyvmm's option parsers share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from vmm.cli.output import printing
from vmm.core.errors import UsageError
from vmm.core.near import did_you_mean

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

_USUAL, _LEAST = 80, 40


def width() -> int:
    """Columns for help and other texts, as argparse finds them."""
    try:
        columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(1).columns)
    except (OSError, ValueError):
        columns = 0
    return max(columns or _USUAL, _LEAST) - 2  # a terminal may not know its own: 0


class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line and exit status 2."""

    def _get_formatter(self) -> argparse.HelpFormatter:
        # With a width, because finding one out imports shutil and all archive formats behind it,
        # for each option that is added.
        formatter: Callable[..., argparse.HelpFormatter] = self.formatter_class
        return formatter(prog=self.prog, width=width())

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """As argparse's own, but a misspelt option is told with the one that it is like."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            words = [self._about(word.partition("=")[0]) for word in unknown]
            self.error(f"unrecognized arguments: {' '.join(words)}")
        return found

    def _about(self, word: str) -> str:
        options = (name for name in self._option_string_actions if name.startswith("--"))
        remedy = did_you_mean(word, options) if word.startswith("--") else None
        return f"{word} ({remedy})" if remedy else word

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """argparse's own says nothing where the text can't be written."""
        if file is None or file is not sys.stdout:
            super()._print_message(message, file)
            return
        with printing():
            file.write(message)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


class Version(argparse.Action):
    """Prints the version that is installed, which only this option needs to find out."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> NoReturn:
        from importlib import metadata

        try:
            version = metadata.version("pyvmm")
        except metadata.PackageNotFoundError:
            version = "of a source tree that is not installed"
        print(f"pyvmm {version}")
        parser.exit()


def add_policy_options(options: argparse._ActionsContainer) -> None:
    """--policy and --policy-arg; `policy` becomes a list of (spec, NAME=VALUE words)."""
    options.add_argument(
        "--policy",
        metavar="MODULE:CLASS|FILE.py:CLASS",
        action="append",
        default=[],
        type=lambda spec: (spec, []),
        help="a subclass of vmm.policy.Policy that decides about conversions; given several "
        "times, all must allow (default: all conversions are allowed)",
    )
    options.add_argument(
        "--policy-arg",
        metavar="NAME=VALUE",
        action=_PolicyArgument,
        help="an argument for the constructor of the --policy before it; checked against the "
        "type that the constructor declares; may be given several times",
    )


class _PolicyArgument(argparse.Action):
    """Hands NAME=VALUE to the --policy that came before it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if not namespace.policy:
            raise UsageError(f"--policy-arg {values} has no --policy before it; put it after one")
        namespace.policy[-1][1].append(values)
