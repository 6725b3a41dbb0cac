"""The machines that the lab can be: what emulates them, and which KVM their Linux has."""

from __future__ import annotations

from dataclasses import dataclass

from vmm.core.errors import UsageError
from vmm.lab.architecture import AMD64, ARM64, LabArchitecture
from vmm.lab.devices import PC, Devices


@dataclass(frozen=True, slots=True)
class Host:
    """One kind of lab machine, as `--host` names it."""

    name: str
    summary: str
    sw_protected: bool = False  # its KVM is compiled anew, with KVM_X86_SW_PROTECTED_VM
    additions: tuple[str, ...] = ()  # to its KVM, folders of vmm/lab/kernel
    bochs: bool = False  # emulated by Bochs, else by QEMU
    cpus: int = 2
    architecture: LabArchitecture = AMD64
    other_devices: Devices | None = None  # than QEMU's of that architecture
    kernel_words: str = ""  # more for its kernel's command line
    silence: float = 120.0  # seconds without its heartbeat after which it stands still
    guest_kernel: str | None = None  # what a guest runs when no --kernel is given

    @property
    def devices(self) -> Devices:
        """What its devices are called inside."""
        return self.other_devices or self.architecture.devices

    @property
    def command_line(self) -> str:
        """Its kernel's."""
        return f"{self.architecture.kernel_words} {self.kernel_words}".strip()


HOSTS = {
    host.name: host
    for host in (
        Host("stock", "Debian's kernel as it is, under QEMU (the default)"),
        Host(
            "sw-protected",
            "KVM compiled with KVM_X86_SW_PROTECTED_VM (once, half a minute)",
            sw_protected=True,
        ),
        Host(
            "experimental",
            "the same with KVM interfaces that no kernel has yet (vmm/lab/kernel)",
            sw_protected=True,
            additions=("own-reads", "in-place", "file-io", "vm-io"),
        ),
        # QEMU's emulated SVM has no nrip-save: KVM there reads each instruction that it emulates.
        Host(
            "bochs",
            "sw-protected under Bochs: guests' code may be private; slow, 1 CPU, no disks",
            sw_protected=True,
            bochs=True,
            cpus=1,
            silence=1200.0,  # its clock goes with its instructions, of which there are few
            other_devices=PC,
        ),
        Host(
            "arm64",
            "an arm64 machine with Debian's kernel; guests are arm64",
            cpus=1,
            architecture=ARM64,
        ),
        Host(
            "pkvm",
            "the same with protected KVM: guests' memory is out of the host's reach",
            cpus=1,
            architecture=ARM64,
            kernel_words="kvm-arm.mode=protected",
            guest_kernel="pkvm-guest",
        ),
    )
}
DEFAULT = HOSTS["stock"]


def named(name: str) -> Host:
    """The host of that name; UsageError lists what there is."""
    host = HOSTS.get(name)
    if host is None:
        raise UsageError(f"--host {name}: no such host of the lab; there are {', '.join(HOSTS)}")
    return host
