"""What starts and ends devices' processes, where the host lacks something."""

from __future__ import annotations

import errno
import os

import pytest

from vmm.devices.process.spawner import Job, Spawner
from vmm.devices.virtio.rng import VirtioRng


def test_process_is_ended_though_there_is_no_descriptor_to_wait_for_it_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", none_left)
    spawner = Spawner(None)
    number = spawner.add(Job(VirtioRng(), [], []))
    spawner.begin()
    link, _ = spawner.start(number)

    while "still" in (said := spawner.end(number)):
        pass

    assert said == "was killed by SIGKILL"
    again, _ = spawner.start(number)
    link.close()
    again.close()
    spawner.close()
