"""Names what a file is, from its first bytes: what people give by mistake instead of a kernel."""

from __future__ import annotations

from vmm.boot.errors import ImageError
from vmm.boot.source import Source

PREFIX = 0x400

# Magics at offset 0x38 of the EFI-bootable Image that these machines share, and the zImage's.
_IMAGE_MAGICS = {
    b"ARM\x64": "an arm64 kernel Image",
    b"RSC\x05": "a RISC-V kernel Image",
    b"\xcd\x23\x82\x81": "a LoongArch kernel Image",
}
_ARM_ZIMAGE = bytes.fromhex("18286f01")  # at 0x24
_PE_MACHINES = {
    0x014C: "32-bit x86",
    0x01C2: "32-bit ARM",
    0x01C4: "32-bit ARM",
    0x5064: "64-bit RISC-V",
    0x6264: "64-bit LoongArch",
    0x8664: "x86-64",
    0xAA64: "arm64",
}
_OTHERS = (
    (b"\x27\x05\x19\x56", "a U-Boot uImage"),
    (b"\xd0\x0d\xfe\xed", "a device tree or FIT image"),
    (b"070701", "an initramfs (cpio)"),
    (b"070702", "an initramfs (cpio)"),
    (b"!<arch>\n", "an archive or Debian package"),
    (b"#!", "a script"),
)


def describe(source: Source, prefix: bytes, machine: str, wanted: str) -> tuple[str, str]:
    """(what is wrong, what to do) for a file that can't be booted on `machine`.

    `prefix` are its first PREFIX bytes, `wanted` what to give instead.
    """
    from vmm.boot.decompress import find_codec  # what can be booted may do without

    for magic, name in _IMAGE_MAGICS.items():
        if prefix[0x38:0x3C] == magic:
            return f"is {name}, not for {machine}", wanted
    if prefix[0x24:0x28] == _ARM_ZIMAGE:
        return f"is a 32-bit ARM zImage, not for {machine}", wanted
    if prefix[:2] == b"MZ":
        return _describe_pe(source, prefix), wanted
    for magic, name in _OTHERS:
        if prefix.startswith(magic):
            return f"is {name}, not a kernel", wanted
    codec = find_codec(prefix)
    if codec is not None:
        return (
            f"is a bare {codec.name} file (magic {codec.magic.hex(' ')})",
            "uncompress it first if a vmlinux is in it, or give the bzImage",
        )
    if prefix[0x1FE:0x200] == b"\x55\xaa":
        return "is a boot sector without a Linux setup header (HdrS)", wanted
    if len(prefix) < PREFIX and b"MZ".startswith(prefix[:2]):
        return f"has only {source.size} bytes", "the file is truncated, get a fresh copy"
    return f"is no known kernel image (it starts with {prefix[:8].hex(' ')})", wanted


def _describe_pe(source: Source, prefix: bytes) -> str:
    """What an EFI program (or a kernel in the shape of one) without a setup header is."""
    if prefix[4:8] == b"zimg":
        return "is a compressed EFI boot image (zboot), which only EFI can start"
    machine = "an unknown machine"
    if len(prefix) >= 0x40:
        offset = int.from_bytes(prefix[0x3C:0x40], "little")
        try:
            header = source.read(offset, 6, "the PE header")
        except ImageError:
            header = b""
        if header[:4] == b"PE\0\0":
            machine = _PE_MACHINES.get(int.from_bytes(header[4:6], "little"), machine)
    return f"is an EFI program (PE only) for {machine}, without a Linux setup header"
