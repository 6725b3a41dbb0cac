"""What all of pyvmm's option parsers share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from vmm.core.errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")
