"""A command in a guest has the process' standard streams: not for a program's machines."""

from __future__ import annotations

import pytest

from vmm.core.errors import UsageError
from vmm.library.machine import Machine
from vmm.machine.config import MachineConfig


def test_configuration_with_a_command_is_refused() -> None:
    with pytest.raises(UsageError, match="pyvmm --exec"):
        Machine(MachineConfig(kernel="k", execute="true"))
