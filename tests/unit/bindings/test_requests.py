"""ioctl numbers, beside those that ioctl-opt computes."""

from __future__ import annotations

import pytest
from ioctl_opt import IO, IOC, IOC_READ, IOC_WRITE

from kvm_bindings import requests

KVMIO = 0xAE


@pytest.mark.parametrize("number", [0x00, 0x80, 0xFF])
@pytest.mark.parametrize("size", [0, 1, 8, 0x3FFF])
def test_number_is_what_ioctl_opt_computes(number: int, size: int) -> None:
    assert requests.none(number) == IO(KVMIO, number)
    assert requests.read(number, size) == IOC(IOC_READ, KVMIO, number, size)
    assert requests.write(number, size) == IOC(IOC_WRITE, KVMIO, number, size)
    assert requests.both(number, size) == IOC(IOC_READ | IOC_WRITE, KVMIO, number, size)
