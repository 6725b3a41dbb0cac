"""What a lab machine is made of: `Lab` prepares it (downloads, images; cached) and starts runs."""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from vmm._firmware import init_path
from vmm.core.errors import HostError, UsageError, tell
from vmm.core.guest_init import modules_for
from vmm.core.kernel_file import modules_beside
from vmm.core.root_disk import find_root, split_root
from vmm.lab import bochs, guest_kernel, hosts, image
from vmm.lab.apt import Apt
from vmm.lab.architecture import ARM64, HERE, foreign_kernel
from vmm.lab.built_kernels import BuiltKernels
from vmm.lab.cache import Cache, default_directory
from vmm.lab.cross import CrossCompiler
from vmm.lab.debian_python import DebianPython
from vmm.lab.emulator import Assets
from vmm.lab.hosts import Host
from vmm.lab.initramfs import guest_initramfs, host_initramfs, own_initramfs
from vmm.lab.interpreter import RunningPython
from vmm.lab.job import FIXED_DRIVES, attach, job_from_arguments
from vmm.lab.kernel_selftests import RUNNER, KernelSelftests
from vmm.lab.kvm_change import KvmChange
from vmm.lab.options import LabOptions
from vmm.lab.packages import HOST_SERIES, Bochs, Kernel, MissingFiles, Packages, Qemu, Wants
from vmm.lab.progress import Progress, Silent
from vmm.lab.python import LabPython
from vmm.lab.run import LabRun

# What --kernel says for the payload that pyvmm carries, on hosts whose default is a kernel.
PAYLOAD = "payload"
# What a run gets for --append: under emulation each character that a guest prints while it boots
# is an exit of a third of a millisecond or more, and there are 20,000 of them.
QUIET = "quiet"
# A kernel that stumbles over its new KVM stops with a trace, rather than going on half dead.
_CHANGED_KERNEL_WORDS = "oops=panic"
# With a change of the user's also where a processor or a task hasn't got on for a minute or two.
# (Where no other processor is left to see that, the heartbeat tells. Without such a change a hang
# is the emulator's rather, and the heartbeat's to tell.)
_USERS_KERNEL_WORDS = (
    f"{_CHANGED_KERNEL_WORDS} softlockup_panic=1 watchdog_thresh=30 hung_task_panic=1 "
    "rcupdate.rcu_cpu_stall_timeout=60 sysctl.kernel.panic_on_rcu_stall=1"
)


class Lab:
    """Makes lab machines; prepares what they need on first use."""

    def __init__(self, options: LabOptions, progress: Progress | None = None) -> None:
        if platform.machine() != "x86_64":
            raise HostError(f"the lab runs this machine's Python on x86_64, not on {os.uname()[4]}")
        self.options = options
        self.progress = progress if progress is not None else Silent()
        self.cache = Cache(options.cache or default_directory())
        self.host = hosts.named(options.host)
        self.kvm_change = KvmChange(
            self.host.sw_protected,
            self.host.additions,
            tuple(options.kvm_patches),
            options.kvm_source,
            tuple(options.kvm_symbols),
        )
        wanted = self.host.architecture
        if options.kernel_build or (self.kvm_change and not wanted.kvm_modules):
            # Where KVM is no module, the whole kernel has to be compiled.
            self.kvm_change = replace(self.kvm_change, kernel=wanted.linux)
            self._refuse_for_own_kernel()
        if options.kvm_parameters and (wanted is not HERE or self.host.bochs):
            raise UsageError(
                f"--kvm-parameter {options.kvm_parameters[0]}: the {self.host.name} host's kernel "
                "takes none; use an x86 host under QEMU"
            )
        self.kvm_change.check()
        other = None
        if wanted is not HERE:
            other = Apt(self.cache.path(f"apt{wanted.suffix()}"), architecture=wanted.debian)
        apt = Apt(self.cache.path("apt"))
        self.packages = Packages(self.cache, self.progress, apt, options.offline, wanted, other)
        self.python: LabPython = (
            RunningPython()
            if wanted is HERE
            else DebianPython(self.packages, CrossCompiler(self.packages))
        )
        if options.with_qemu and wanted is not HERE:
            raise UsageError(
                f"--lab-with-qemu: the {self.host.name} host has no QEMU inside; leave it out"
            )
        self._assets: Assets | None = None

    def prepare(self) -> Assets:
        """Downloads and builds what is missing; all that can't be had is named in one error."""
        if self._assets is not None:
            return self._assets
        options = self.options
        wants = Wants()
        host = self.host
        emulator: Qemu | Bochs | None
        if host.bochs:
            emulator = wants.gather(self._bochs)
        else:
            emulator = wants.gather(lambda: self.packages.qemu(options.qemu))
        busybox = wants.gather(lambda: self.packages.busybox(options.busybox))
        change = self.kvm_change
        kernel = None
        if change.kernel is None:
            kernel = wants.gather(
                lambda: self.packages.host_kernel(options.host_kernel, options.host_modules)
            )
        wants.gather(self.python.key)
        wants.settle(self.cache.root)
        if kernel is None:  # minutes, so only once all else is there
            kernel = self._built_kernels().host(change)
        assert emulator is not None and busybox is not None
        self._refuse_foreign("--lab-host-kernel", kernel.image)
        kvm = None
        if change:
            users = (change.is_users or change.kernel is not None) and not host.bochs
            more = _USERS_KERNEL_WORDS if users else _CHANGED_KERNEL_WORDS
            host = replace(host, kernel_words=f"{host.kernel_words} {more}")
        if change.kernel is not None:
            early = host.architecture.early_console
            host = replace(host, kernel_words=f"{host.kernel_words} {early}")
        elif change:
            kvm = self.packages.changed_kvm(kernel, change, self._changed_by())
        words = [host.kernel_words, *options.kvm_parameters]
        assets = Assets(
            host=replace(host, kernel_words=" ".join(words)),
            emulator=emulator,
            kernel=kernel.image,
            initramfs=self._initramfs("host", busybox, kernel.modules, kvm),
            root=image.root_image(self.cache, self.progress, busybox, self.python),
            project=image.project_image(self.cache, self.progress, self.python),
            inner_qemu=self._inner_qemu() if options.with_qemu else None,
            cache=self.cache,
        )
        self._assets = assets
        return assets

    def _refuse_for_own_kernel(self) -> None:
        """Raises UsageError for what doesn't go with a kernel that is compiled for the machine."""
        if self.host.bochs:
            raise UsageError(
                "--kernel-build: the small kernel has no drivers for Bochs' disks; use an x86 host "
                "under QEMU, or --kvm-patch alone"
            )
        given = self.options.host_kernel or self.options.host_modules
        if given is not None:
            raise UsageError(
                f"{self._changed_by()}: the lab machine's kernel is compiled; leave "
                f"--lab-host-kernel and --lab-host-modules out ({given})"
            )

    def _built_kernels(self) -> BuiltKernels:
        python = self.python
        unpacked = python.compiler.unpacked if isinstance(python, DebianPython) else None
        return BuiltKernels(self.packages, unpacked)

    def _changed_by(self) -> str:
        """The option for which KVM is compiled."""
        options = self.options
        if options.kernel_build:
            return "--kernel-build"
        if options.kvm_patches:
            return f"--kvm-patch {options.kvm_patches[0]}"
        if options.kvm_source is not None:
            return f"--kvm-source {options.kvm_source}"
        return f"--host {self.host.name}"

    def _inner_qemu(self) -> Path:
        return image.qemu_image(self.cache, self.progress, self.packages.qemu(self.options.qemu))

    def fio_image(self) -> Path:
        """A disk with fio, for guests (vmm.lab.image.fio_image)."""
        return image.fio_image(self.cache, self.progress, self.packages.fio_tree())

    def _bochs(self) -> Bochs:
        tree = self.packages.bochs_tree()
        key = hashlib.sha256(bochs.LOADER_SCRIPT.encode()).hexdigest()[:12]
        floppy = self.cache.entry(
            f"images/floppy-{key}.img", lambda path: bochs.build_floppy(tree, path)
        )
        return Bochs(tree, floppy)

    def _initramfs(
        self,
        kind: str,
        busybox: Path,
        modules: Path | None,
        kvm: Path | None = None,
    ) -> Path:
        host = self.host

        def build(path: Path) -> None:
            self.progress.step(f"building the {kind} initramfs")
            if kind == "host":
                path.write_bytes(
                    host_initramfs(busybox, modules, kvm, host.devices, host.architecture)
                )
            else:
                path.write_bytes(guest_initramfs(busybox, modules))

        key = image.initramfs_key(busybox, modules, kvm, host.devices)
        entry = self.cache.entry(f"images/{kind}-{key}.cpio", build)
        self.cache.prune(f"images/{kind}-", keep=8)
        return entry

    def guest_kernel(self, name: str) -> Kernel:
        """A kernel named as `debian:6.12`, or a file with its modules where they are to be had."""
        if name.startswith("debian:"):
            return self.packages.debian_kernel(name)
        if name == guest_kernel.NAME:
            return self._built_guest_kernel()
        path = Path(name)
        given = self.options.guest_modules
        return Kernel(path, Path(given) if given is not None else modules_beside(path))

    def _built_guest_kernel(self) -> Kernel:
        if not isinstance(self.python, DebianPython):
            others = " or ".join(h.name for h in hosts.HOSTS.values() if h.architecture is ARM64)
            raise UsageError(
                f"--kernel {guest_kernel.NAME}: an {ARM64.label} kernel, and "
                f"--host {self.host.name} runs {self.host.architecture.label} guests; "
                f"use --host {others}"
            )
        return self._built_kernels().guest()

    def guest_initramfs(self, kernel: Kernel) -> Path:
        """busybox with the kernel's virtio modules: a guest that boots to a shell."""
        busybox = self.packages.busybox(self.options.busybox)
        return self._initramfs("guest", busybox, kernel.modules)

    def _initramfs_for(self, words: Sequence[str], kernel: Kernel) -> Path:
        """What a guest that brings no initramfs gets: a shell, or what finds its root disk."""
        executes, root = value_of(words, "--exec"), value_of(words, "--root")
        if executes is None and root is None:
            return self.guest_initramfs(kernel)
        kind = None if root is None else root_file_system(root[1], words)
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        modules = modules_for(kernel.modules, kind, options)
        busybox = None if root is not None else self.packages.busybox(self.options.busybox)
        init = Path(init_path(self.host.architecture.name)).read_bytes()
        archive = own_initramfs(init, modules, busybox)
        key = hashlib.sha256(archive).hexdigest()[:16]

        def build(path: Path) -> None:
            path.write_bytes(archive)

        entry = self.cache.entry(f"images/own-{key}.cpio", build)
        self.cache.prune("images/own-", keep=8)
        return entry

    def pyvmm_words(self, arguments: Sequence[str]) -> list[str]:
        """pyvmm's arguments with stock kernels' names replaced and an initrd supplied."""
        words = with_kernel(arguments, self.host)
        at = value_of(words, "--kernel")
        if at is None:
            return words
        index, name = at
        kernel = self.guest_kernel(name)
        if not kernel.image.exists():
            raise UsageError(f"--kernel {name}: no such file")
        self._refuse_foreign("--kernel", kernel.image)
        words[index] = words[index].replace(name, str(kernel.image))
        if value_of(words, "--initrd") is None:
            words += ["--initrd", str(self._initramfs_for(words, kernel))]
        if _is_run(words) and value_of(words, "--append") is None:
            words += ["--append", QUIET]
        if measures_linux(words) and value_of(words, "--fio") is None:
            try:
                words += ["--fio", str(self.fio_image())]
            except MissingFiles as error:
                tell(f"the lab goes on without fio: not to be downloaded ({error.reason})")
        return words

    def selftest_words(self, tree: Path, names: Sequence[str]) -> list[str]:
        """A program's words that run the kernel's self-tests, built from its tree."""
        if self.host.architecture is not HERE or self.host.bochs:
            raise UsageError(
                f"--kernel-selftests {tree}: built for x86 hosts under QEMU, which "
                f"--host {self.host.name} is not"
            )
        if self.options.cpus is None:
            # Some have several vCPUs (`runs_several_vcpus`).
            self.options = replace(self.options, cpus=1)
        programs = KernelSelftests(tree, names, self.cache, self.progress).programs()
        return ["sh", "-c", RUNNER, "sh", *map(str, programs)]

    def _refuse_foreign(self, option: str, kernel: Path) -> None:
        """Raises UsageError for a kernel of another architecture than the machine's."""
        mine = self.host.architecture
        other = foreign_kernel(kernel, mine)
        if other is not None:
            fitting = [h.name for h in hosts.HOSTS.values() if h.architecture is other]
            raise UsageError(
                f"{option} {kernel}: a kernel for {other.label}, and --host {self.host.name} is "
                f"{mine.label}; use --host {' or '.join(fitting)}"
            )

    def start(
        self,
        arguments: Sequence[str],
        *,
        program: bool = False,
        directory: Path | None = None,
        terminal: tuple[int, int] | None = None,
    ) -> LabRun:
        """Boots the machine with a job: pyvmm with `arguments`, or they are a program's words."""
        # What the user named comes first: a mistake in it needs no download to be told.
        first = FIXED_DRIVES + self.options.with_qemu
        words = list(arguments) if program else self.pyvmm_words(arguments)
        job = job_from_arguments(
            words, (directory or Path.cwd()).absolute(), first_drive=first, is_program=program
        )
        for disk in self.options.disks:
            attach(job, disk, "--lab-disk")
        if self.host.bochs:
            bochs.refuse(job, self.options)
        if not program:
            job.words = [str(self.python.executable), "-sP", "/lab/project/pyvmm", *job.words]
        job.inputs += [p.absolute() for p in self.options.files]
        job.outputs += [p.absolute() for p in self.options.outputs]
        job.inputs = [p for p in job.inputs if p not in job.outputs]
        options = self.options
        if options.cpus is None and not program and runs_several_vcpus(arguments):
            options = replace(options, cpus=1)
        assets = self.prepare()
        self.progress.step("booting the lab machine")
        return LabRun(assets, options, job, terminal)


def with_kernel(arguments: Sequence[str], host: Host) -> list[str]:
    """pyvmm's words with the host's own guest kernel where a run names none.

    `--kernel payload` is the embedded payload, which pyvmm runs when none is named.
    """
    words = list(arguments)
    at = value_of(words, "--kernel")
    if at is None and _is_run(words):
        boots = any(value_of(words, option) is not None for option in ("--exec", "--root"))
        guest_kernel = host.guest_kernel or (f"debian:{HOST_SERIES}" if boots else None)
        if guest_kernel is not None:
            return [*words, "--kernel", guest_kernel]
    if at is not None and at[1] == PAYLOAD:
        index = at[0]
        first = index if words[index].startswith("--") else index - 1
        del words[first : index + 1]
    return words


def _is_run(words: Sequence[str]) -> bool:
    """Whether these are the words of a run, and not of another command."""
    return not words or words[0] == "run" or words[0].startswith("-")


def runs_several_vcpus(words: Sequence[str]) -> bool:
    """Whether pyvmm, given these words, runs several vCPUs at once.

    That needs a lab machine of one processor. Where two of QEMU's emulated ones run guests at the
    same time, one now and then is still under nested paging when it is back in its host. KVM then
    takes that host's registers for the guest's: the guest ends in a triple fault, or the lab's
    kernel crashes. Seen with QEMU 10.0 in one of three boots with four vCPUs, also of QEMU itself,
    and in none of 16 with one processor; never with one vCPU. QEMU 11.1 is no better: there QEMU's
    own guests crash with one vCPU, too.
    """
    cpus = value_of(words, "--cpus")
    return "selftest" in words[:1] or (cpus is not None and cpus[1] != "1")


def measures_linux(words: Sequence[str]) -> bool:
    """Whether pyvmm, given these words, measures a stock kernel, which takes fio."""
    only = [value for option, value in itertools.pairwise(words) if option == "--only"]
    only += [word.removeprefix("--only=") for word in words if word.startswith("--only=")]
    return "bench" in words[:1] and not {"linux", "iommu"}.isdisjoint(only)


def root_file_system(root: str, words: Sequence[str]) -> str:
    """The driver of the file system that --root names, looked at where its disk lies.

    Raises UsageError.
    """
    disk, wanted = split_root(root)
    specs = [] if disk is None else [disk]
    specs += [value for option, value in itertools.pairwise(words) if option == "--disk"]
    specs += [word.removeprefix("--disk=") for word in words if word.startswith("--disk=")]
    names = [s.replace(",,", "\0").split(",")[0].replace("\0", ",") for s in specs]
    with ExitStack() as stack:
        disks: list[tuple[str, int]] = []
        for name in names:
            try:
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise UsageError(f"--root {name} cannot be read: {error.strerror}") from error
            stack.callback(os.close, fd)
            disks.append((name, fd))
        return find_root(wanted, disks).file_system.kind


def value_of(words: Sequence[str], option: str) -> tuple[int, str] | None:
    """Where an option's value stands, and the value."""
    for index, word in enumerate(words):
        if word == option and index + 1 < len(words):
            return index + 1, words[index + 1]
        if word.startswith(f"{option}="):
            return index, word.partition("=")[2]
    return None
