"""What a lab machine's architecture decides: names of packages, files and devices, QEMU's words.

Everything else in the lab asks a `LabArchitecture`; nothing else compares names of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from vmm.lab.devices import VIRTIO, Devices

# Spares the emulated processor what nothing here needs: tests of the kernel's own cryptography,
# and its built-in certificates. Together a sixth of the time to the command.
_SPARING = "cryptomgr.notests initcall_blacklist=load_system_certificate_list"
# KVM intercepts PAUSE then, which QEMU's processor can do and doesn't say: a vCPU that spins leaves
# the guest, and gives its time to others. Without, a guest with several vCPUs now and then stops
# the whole machine: one spins, waiting for another, and the machine's timer interrupt, pending, is
# not let through to end that (QEMU 10.0; an NMI isn't, either). setcpuid= is in Linux since 6.15.
_PAUSES = "setcpuid=pausefilter,pfthreshold"


@dataclass(frozen=True, slots=True)
class LabArchitecture:
    """One architecture of lab machines, and of the kernels that guests run in them."""

    name: str  # as `uname -m` says it
    label: str  # for people
    debian: str  # Debian's name of it
    triplet: str  # names its libraries' folder and its compilers
    loader: str  # of its C library
    qemu_program: str
    qemu_package: str
    qemu_machine: tuple[str, ...]  # options: machine and processor, KVM's hardware in it
    kernel_words: str  # the lab machine's kernel command line
    linux: str  # Linux's name of it, a folder of arch/
    kernel_image: str  # what its kernels' makefiles call what boots
    early_console: str  # word for it: a kernel's messages from its first moments on
    kernel_mark: tuple[int, bytes]  # where its kernels say in their first bytes what they are
    kvm_modules: tuple[str, ...] = ()  # in the order of loading; none where KVM is built in
    devices: Devices = VIRTIO
    plugs: bool = False  # QEMU's machine takes drives while it runs (arm64's root bus doesn't)
    qemu_data: tuple[str, ...] = field(default=("qemu",))  # firmware, below usr/share

    @property
    def kernel_flavour(self) -> str:
        """What Debian's cloud kernels' package names end with."""
        return f"cloud-{self.debian}"

    def marks(self, head: bytes) -> bool:
        """Whether a file that begins with `head` is one of this architecture's kernels."""
        at, mark = self.kernel_mark
        return head[at : at + len(mark)] == mark

    def suffix(self) -> str:
        """What is added to the names of cache entries that differ by architecture.

        The one that the lab began with has none, so that its entries stay good.
        """
        return "" if self is AMD64 else f"-{self.debian}"

    def libraries(self, tree: Path) -> Path:
        """The libraries' folder below an unpacked tree of packages."""
        return tree / "usr" / "lib" / self.triplet


AMD64 = LabArchitecture(
    name="x86_64",
    label="x86",
    debian="amd64",
    triplet="x86_64-linux-gnu",
    loader="ld-linux-x86-64.so.2",
    qemu_program="qemu-system-x86_64",
    qemu_package="qemu-system-x86",
    qemu_machine=("-machine", "pc", "-cpu", "EPYC,+svm"),
    kernel_words="console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable "
    f"{_SPARING} {_PAUSES}",
    linux="x86",
    kernel_image="bzImage",
    early_console="earlyprintk=ttyS0",
    kernel_mark=(0x202, b"HdrS"),  # Documentation/arch/x86/boot.rst of Linux
    kvm_modules=("irqbypass", "kvm", "kvm-amd"),
    plugs=True,
    qemu_data=("qemu", "seabios"),
)
ARM64 = LabArchitecture(
    name="aarch64",
    label="arm64",
    debian="arm64",
    triplet="aarch64-linux-gnu",
    loader="ld-linux-aarch64.so.1",
    qemu_program="qemu-system-aarch64",
    qemu_package="qemu-system-arm",
    # The processor must be one with virtualization host extensions (Armv8.1): protected KVM is
    # unwell without. GICv3 is the interrupt controller that KVM can give guests of any number.
    qemu_machine=("-machine", "virt,virtualization=on,gic-version=3", "-cpu", "neoverse-n1"),
    kernel_words=f"console=ttyAMA0 quiet panic=-1 mitigations=off nokaslr {_SPARING}",
    linux="arm64",
    kernel_image="Image",
    early_console="earlycon",
    kernel_mark=(0x38, b"ARM\x64"),  # Documentation/arch/arm64/booting.rst of Linux
    devices=replace(VIRTIO, serial="/dev/ttyAMA0"),
)
ARCHITECTURES = (AMD64, ARM64)
HERE = AMD64
"""The one that the lab's own programs (emulators, compilers) are taken for."""


def foreign_kernel(path: Path, wanted: LabArchitecture) -> LabArchitecture | None:
    """The architecture that a kernel file is for when that isn't `wanted`; None when unknown."""
    try:
        with open(path, "rb") as file:
            head = file.read(0x400)
    except OSError:
        return None
    return next((a for a in ARCHITECTURES if a is not wanted and a.marks(head)), None)
