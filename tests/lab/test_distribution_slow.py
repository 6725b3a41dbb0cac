"""Debian from its image, with systemd and all of its memory private: minutes, when asked for."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.lab.conftest import Starter
from tests.lab.slow import slow
from tests.lab.test_exec import pyvmm
from tests.lab.test_lab_command import environment
from vmm.lab.apt import Apt
from vmm.lab.distribution import ImageMaker, ImageRequest
from vmm.lab.machine import Lab
from vmm.lab.progress import Silent

_MAKING_SECONDS = 900.0
_LOGIN_SECONDS = 450.0
_SECONDS = 120.0

pytestmark = [pytest.mark.timeout(_MAKING_SECONDS + 2 * _LOGIN_SECONDS), slow]


@pytest.fixture
def image(lab: Lab, tmp_path: Path) -> Path:
    maker = ImageMaker(lab.cache, Apt(lab.cache.path("apt")), Silent())
    target = tmp_path / "debian.ext4"
    return maker.make(ImageRequest("trixie", ("fio", "stress-ng"), target))


def test_debian_comes_to_its_login_in_private_memory_and_powers_off(
    lab_start: Starter, image: Path
) -> None:
    words = ["--kernel", "debian:7.3", "--root", str(image), "--private-mem", "--mem", "512M"]
    began = time.monotonic()
    run = lab_start(words)

    run.expect(b"login: ", _LOGIN_SECONDS)
    login = time.monotonic() - began
    run.send(b"root\n")
    run.expect(b"# ", _SECONDS)
    run.send(b"systemctl is-system-running; systemctl --failed --no-legend; systemd-analyze\n")
    said = run.expect(b"graphical.target", _SECONDS) + run.expect(b"# ", _SECONDS)
    run.send(b"systemctl poweroff\n")
    status = run.wait(_SECONDS)

    print(f"login after {login:.1f} s; {said.decode(errors='replace')}")
    assert status == 0, bytes(run.stderr.data)
    assert re.search(rb"running\r?\n", said), said  # of the command itself, its echo goes on
    subprocess.run(["e2fsck", "-fn", str(image)], check=True, timeout=60, capture_output=True)


def test_program_of_the_image_runs_as_a_command(image: Path) -> None:
    command = "fio --version && stress-ng --version && stat -c %U:%G:%a /etc/shadow /var/mail"
    words = pyvmm("--lab-quiet", "--root", image.name, "--private-mem", "--exec", command)

    result = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, cwd=image.parent,
        env=environment(), check=False, timeout=_LOGIN_SECONDS,
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    assert re.match(rb"fio-3\.\d+\nstress-ng, version ", result.stdout)
    assert result.stdout.endswith(b"root:shadow:640\nroot:mail:2775\n")
