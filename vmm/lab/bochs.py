"""How Bochs is started: a PC with ATA disks, four serial lines, and a floppy that boots from them.

Slower than QEMU, but its SVM has nrip-save and decode assists: KVM on it need not read the guest's
instructions, so guests run whose code KVM cannot read.
Configuration: bochsrc(5).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from vmm.core.errors import HostError, UsageError
from vmm.lab.architecture import AMD64
from vmm.lab.emulator import Assets, Launch
from vmm.lab.job import Drive, Job
from vmm.lab.options import LabOptions
from vmm.lab.packages import Bochs
from vmm.lab.programs import run_unpacked, unpacked_command
from vmm.lab.streams import Pieces, Stream, TerminalEnd

# The job's image carries them: the loader reads ext4 by the BIOS, from the third disk.
KERNEL_INSIDE, INITRAMFS_INSIDE = "boot/vmlinuz", "boot/initrd"
LOADER_SCRIPT = f"""\
set root=(hd2)
linux /{KERNEL_INSIDE} {AMD64.kernel_words}
initrd /{INITRAMFS_INSIDE}
boot
"""
_LOADER_MODULES = ("biosdisk", "ext2", "linux", "boot")
_SECTOR = 512
_FLOPPY_BYTES = 1440 * 1024
_DISKS = ("ata0-master", "ata0-slave", "ata1-master", "ata1-slave")

# The processor is AMD's, with SVM, nested paging and nrip-save. Guest time follows the number of
# instructions, and never runs ahead of ours: time-outs inside mean what they say.
_CONFIGURATION = """\
config_interface: textconfig
display_library: term
cpu: model=ryzen, count=1, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=slowdown, time0=utc
memory: guest={memory_mib}, host={memory_mib}
romimage: file="{share}/BIOS-bochs-latest", options=fastboot
vgaromimage: file="{share}/VGABIOS-lgpl-latest"
vga: extension=vbe, update_freq=1
pci: enabled=1, chipset=i440fx
speaker: enabled=0
boot: floppy
floppya: 1_44="{floppy}", status=inserted, write_protected=1
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
log: "{log}"
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"""

# Bochs implements decode assists (an access to CR4 says which register goes with it), but none of
# its processors has them, and no option gives them one. What they have is a constant, 0x44f, that
# get_svm_extensions_bitmask() returns and CPUID's leaf 0x8000000a shows, where the compiler put the
# function's value next to a comparison. Bit 7 of it is what they lack (AMD APM vol. 3, E.4.9).
# And a read of a control register says its register without bit 63, which makes it valid (APM vol.
# 2, 15.8.1): "if decode assists, edx = register" becomes "edx = register, with bit 63". A selective
# intercept of a write to CR0 (exit 0x65) says none at all: it is told as other writes are, in as
# many bytes, for which EXITINFO2 keeps what is in rcx (it means nothing there).
_DECODE_ASSISTS = {
    "b8 4f 04 00 00 c3": "b8 cf 04 00 00 c3",  # mov eax, 0x44f; ret
    "b8 4f 04 00 00 48 39 ca": "b8 cf 04 00 00 48 39 ca",  # mov eax, 0x44f; cmp rdx, rcx
    # xor edx, edx; test byte ptr [rdi+88], 128; je .+4; movzx edx, byte ptr [rsi+36]
    "31 d2 f6 47 58 80 74 04 0f b6 56 24": (
        "0f b6 56 24 48 0f ba ea 3f 0f 1f 00"  # movzx; bts rdx, 63; nop
    ),
    # xor ecx, ecx; xor edx, edx; mov esi, 0x65; mov rdi, rbx; call Svm_Vmexit; jmp; nop
    "31 c9 31 d2 be 65 00 00 00 48 89 df e8 30 eb fb ff e9 9e fe ff ff 0f 1f 00": (
        # movzx edx, byte ptr [r13+37]; bts rdx, 63; push 0x65; pop rsi; push rbx; pop rdi;
        # call; jmp
        "41 0f b6 55 25 48 0f ba ea 3f 6a 65 5e 53 5f e8 2d eb fb ff e9 9b fe ff ff"
    ),
}


def refuse(job: Job, options: LabOptions) -> None:
    """Raises UsageError for what this machine has no place for."""
    if job.drives:
        raise UsageError(
            f"{job.drives[0].path}: the bochs host has no place for disks (its four are the lab's "
            "own); leave --disk and --lab-disk out"
        )
    if options.with_qemu:
        raise UsageError("--lab-with-qemu: the bochs host has no place for it")
    if options.cpus not in (None, 1):
        raise UsageError(f"--lab-cpus {options.cpus}: the bochs host has one processor")


def launch(
    bochs: Bochs, options: LabOptions, drives: Sequence[Drive], streams: list[str], folder: Path
) -> Launch:
    """How Bochs is started, with a serial line for each of the streams."""
    ends = {name: TerminalEnd() for name in streams}
    configuration = _CONFIGURATION.format(
        memory_mib=options.memory_mib,
        share=bochs.tree / "usr" / "share" / "bochs",
        floppy=bochs.floppy,
        log=folder / "bochs.log",
    )
    for number, (place, drive) in enumerate(zip(_DISKS, drives, strict=True)):
        mode = "flat"
        if drive.read_only:
            # Bochs opens flat images for writing, and would lock what several runs share.
            mode = f'volatile, journal="{folder / f"journal{number}"}"'
        configuration += f'{place}: type=disk, path="{drive.path}", mode={mode}\n'
    for number, end in enumerate(ends.values(), start=1):
        configuration += f"com{number}: enabled=1, mode=term, dev={end.name}\n"
    file = folder / "bochsrc"
    file.write_text(configuration)
    program = folder / "bochs-bin"
    give_decode_assists(bochs.tree / "usr" / "bin" / "bochs-bin", program)
    libraries = bochs.tree / "usr" / "lib" / "x86_64-linux-gnu"
    return Launch(
        [*unpacked_command(bochs.tree, program), "-q", "-f", str(file)],
        {name: _stream(name, end) for name, end in ends.items()},
        _complaint,
        environment={
            "LTDL_LIBRARY_PATH": str(libraries / "bochs" / "plugins"),
            "TERM": "vt100",
            "TERMINFO_DIRS": ":".join(
                str(bochs.tree / place / "terminfo") for place in ("lib", "usr/lib", "usr/share")
            ),
        },
    )


def give_decode_assists(program: Path, copy: Path) -> None:
    """A copy of Bochs whose AMD processors have decode assists.

    Raises HostError for a Bochs that is built differently.
    """
    code = program.read_bytes()
    for words in _DECODE_ASSISTS.items():
        without, having = map(bytes.fromhex, words)
        if without not in code:
            raise HostError(
                f"{program}: this Bochs doesn't say what its processors have as Debian's 3.0 "
                "does; give the lab that version"
            )
        code = code.replace(without, having)
    copy.write_bytes(code)
    copy.chmod(0o755)


def _stream(name: str, end: TerminalEnd) -> Stream:
    return Stream(name, end, pieces=Pieces() if name == "in" else None)


def _complaint(output: str) -> str | None:
    """What Bochs says as it gives up; that the guest switched it off is said the same way."""
    _, found, rest = output.partition("exiting with the following message:")
    message = rest.strip().split("\n", 1)[0].strip()
    return f"Bochs said: {message}" if found and "soft power off" not in message else None


def add_boot_files(assets: Assets, stage: Path) -> None:
    """Kernel and initramfs to where the loader looks for them in the job's image."""
    for source, inside in ((assets.kernel, KERNEL_INSIDE), (assets.initramfs, INITRAMFS_INSIDE)):
        (stage / inside).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, stage / inside)


def build_floppy(tree: Path, image: Path) -> None:
    """A floppy image with GRUB on it, which does LOADER_SCRIPT.

    GRUB's boot sector loads the next one, which loads the rest by a list of blocks in its last 12
    bytes (first sector, count, segment; grub-core/boot/i386/pc/diskboot.S): grub-mkimage writes
    it for an image that begins at sector 1, as it does here.
    """
    modules = tree / "usr" / "lib" / "grub" / "i386-pc"
    script = image.with_name("loader.cfg")
    script.write_text(LOADER_SCRIPT)
    core = image.with_name("core.img")
    arguments = ["-d", str(modules), "-O", "i386-pc", "-p", "/", "-c", str(script)]
    arguments += ["-o", str(core), *_LOADER_MODULES]
    run_unpacked(tree, tree / "usr" / "bin" / "grub-mkimage", arguments)
    content = (modules / "boot.img").read_bytes() + core.read_bytes()
    if len(content) > _FLOPPY_BYTES or (modules / "boot.img").stat().st_size != _SECTOR:
        raise HostError(f"GRUB of {tree} does not fit a floppy ({len(content)} bytes)")
    image.write_bytes(content)
    os.truncate(image, _FLOPPY_BYTES)
