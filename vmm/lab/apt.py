"""Debian packages by a private apt: its own lists, caches and sources, nothing installed.

The machine's own apt is only read: its mirror, keyrings, proxies. Packages are verified by apt
as always, then unpacked with dpkg-deb into the lab's cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmm.core.errors import HostError
from vmm.lab.architecture import AMD64
from vmm.lab.sources import Source, debian_archive, read_sources

# Suites that hold what the lab runs; `QEMU_SUITE` also gives busybox, Bochs and fio.
SUITES = ("bookworm", "trixie", "trixie-backports")
QEMU_SUITE = "trixie"
_TOOLS = ("apt-get", "apt-cache", "apt-config", "dpkg-deb")
_ETC = Path("/etc/apt")


class PackagesUnavailable(HostError):
    """apt cannot give the packages; the caller says which files would do instead."""


@dataclass(slots=True)
class Apt:
    """apt with all of its state below `root`."""

    root: Path
    etc: Path = _ETC
    architecture: str = AMD64.debian  # of the packages; the system need not know it
    _environment: dict[str, str] = field(default_factory=dict)
    _updated: bool = False

    def package_names(self, pattern: str) -> list[str]:
        """Names of all known packages that match the extended regular expression."""
        self._update()
        text = self._run("apt-cache", "--names-only", "search", pattern)
        return [line.split(" ", 1)[0] for line in text.splitlines()]

    def download(self, packages: Sequence[str], into: Path) -> None:
        """Downloads exactly these packages (NAME or NAME/SUITE) and unpacks them below `into`."""
        self._update()
        folder = self._empty_folder(self.root / "download")
        self._run("apt-get", "--quiet", "download", *packages, cwd=folder)
        _unpack(folder, into)
        shutil.rmtree(folder, ignore_errors=True)

    def download_closure(self, packages: Sequence[str], suite: str, into: Path) -> None:
        """Packages (NAME, NAME/SUITE or NAME=VERSION) with all that they depend on, down to the C
        library, unpacked below `into`.

        The package database is empty here, so nothing is left out as installed already and the
        result runs on any distribution.
        """
        archives = self._fetch(packages, suite)
        _unpack(archives, into)
        self._empty_folder(archives)

    def _fetch(self, packages: Sequence[str], suite: str) -> Path:
        self._update()
        archives = self._empty_folder(self.root / "cache" / "archives")
        (archives / "partial").mkdir()
        self._run(
            "apt-get",
            "--quiet",
            "--yes",
            "--download-only",
            "--no-install-recommends",
            "--target-release",
            suite,
            "install",
            *packages,
        )
        return archives

    def archives(self, packages: Sequence[str], suite: str, into: Path) -> None:
        """Packages with all that they depend on, as they are (.deb), in the new folder `into`."""
        folder = self._fetch(packages, suite)
        into.mkdir(parents=True)
        for package in folder.glob("*.deb"):
            package.rename(into / package.name)

    def all_names(self) -> list[str]:
        """Of all packages in the lists."""
        self._update()
        return self._run("apt-cache", "pkgnames").split()

    def _update(self) -> None:
        if self._updated:
            return
        missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
        if missing:
            raise PackagesUnavailable(f"{', '.join(missing)} not found")
        archive = debian_archive(read_sources(self.etc))
        if archive is None:
            raise PackagesUnavailable(f"no Debian archive among the apt sources in {self.etc}")
        self._configure()
        self._use(archive.uris[0], SUITES, archive.signed_by)
        try:
            self._run("apt-get", "--quiet", "update")
        except PackagesUnavailable:
            self._update_with_newer_keys(archive)
        self._updated = True

    def _update_with_newer_keys(self, archive: Source) -> None:
        """An older release's keyring may lack the keys of newer ones. The suites that this machine
        uses can be verified; the keyring package found in them vouches for the others.
        """
        self._use(archive.uris[0], archive.suites, archive.signed_by)
        self._run("apt-get", "--quiet", "update")
        folder = self._empty_folder(self.root / "download")
        self._run("apt-get", "--quiet", "download", "debian-archive-keyring", cwd=folder)
        into = self._empty_folder(self.root / "keyring")
        _unpack(folder, into)
        keyring = into / "usr" / "share" / "keyrings" / "debian-archive-keyring.gpg"
        self._use(archive.uris[0], SUITES, (*archive.signed_by, str(keyring)))
        self._run("apt-get", "--quiet", "update")

    def _use(self, uri: str, suites: Sequence[str], keyrings: Sequence[str]) -> None:
        option = f"arch={self.architecture}"
        option += f" signed-by={','.join(keyrings)}" if keyrings else ""
        lines = [f"deb [{option}] {uri} {suite} main\n" for suite in suites]
        (self.root / "etc" / "sources.list").write_text("".join(lines))

    def _configure(self) -> None:
        etc = self.root / "etc"
        for folder in (
            etc / "apt.conf.d",
            etc / "preferences.d",
            etc / "sources.list.d",
            self.root / "state" / "lists" / "partial",
            self.root / "cache" / "archives" / "partial",
        ):
            folder.mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        config = self.root / "apt.conf"
        config.write_text("".join(f"{line}\n" for line in self._settings(etc)))
        self._environment = {**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C"}

    def _settings(self, etc: Path) -> Iterator[str]:
        def setting(name: str, value: Path | str) -> str:
            return f'{name} "{value}";'

        # Proxies, time-outs and the like stay as this machine's administrator chose; apt's hooks
        # (which tidy the system's own directories) do not come along.
        dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False)
        yield from (line for line in dump.stdout.splitlines() if line.startswith("Acquire::"))
        yield setting("Dir::Etc", etc)
        yield setting("Dir::Etc::netrc", self.etc / "auth.conf")
        yield setting("Dir::Etc::netrcparts", self.etc / "auth.conf.d")
        yield setting("Dir::Etc::trusted", self.etc / "trusted.gpg")
        yield setting("Dir::Etc::trustedparts", f"{self.etc / 'trusted.gpg.d'}/")
        yield setting("Dir::State", self.root / "state")
        yield setting("Dir::State::status", self.root / "status")
        yield setting("Dir::Cache", self.root / "cache")
        yield setting("APT::Architecture", self.architecture)
        yield f'APT::Architectures {{ "{self.architecture}"; }};'
        yield setting("Acquire::Languages", "none")
        # Unreachable archives are a failure here, not a warning with old lists kept.
        yield setting("APT::Update::Error-Mode", "any")
        if os.geteuid() == 0:
            # The cache is usually below root's home, where the user _apt may not write.
            yield setting("APT::Sandbox::User", "root")

    def _empty_folder(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _run(self, *command: str, cwd: Path | None = None) -> str:
        result = subprocess.run(
            command,
            cwd=cwd,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise PackagesUnavailable(f"`{' '.join(command[:3])}` failed: {_reason(result.stderr)}")
        return result.stdout


def _reason(stderr: str) -> str:
    """apt's first error line, which names the cause; those after it are consequences."""
    errors = [line[3:].strip() for line in stderr.splitlines() if line.startswith(("E: ", "W: "))]
    lines = errors or stderr.strip().splitlines() or ["no reason given"]
    return re.sub(r"\s+", " ", lines[0])


def _unpack(folder: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for package in sorted(folder.glob("*.deb")):
        result = subprocess.run(
            ["dpkg-deb", "-x", str(package), str(into)], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise PackagesUnavailable(f"unpacking {package.name} failed: {_reason(result.stderr)}")


def newest(names: Iterable[str]) -> str | None:
    """The name whose numbers are highest, compared as numbers: 6.12.107 is after 6.12.94."""

    def numbers(name: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", name)]

    return max(names, key=numbers, default=None)
