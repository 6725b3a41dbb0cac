"""What the guest's CPUID instruction answers, made from what KVM supports.

Per vCPU: topology and APIC ids. With a C-bit: the announcement of an AMD SEV guest, which is all
that makes an unmodified kernel encrypt its page tables and ask for conversions.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmm.arch.x86_64 import layout
from vmm.core.errors import HostError
from vmm.core.lean_typing import NamedTuple

DEFAULT_C_BIT = 38
SIGNIFICANT_INDEX = 1 << 0  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX

# Leaf 1
ECX_MONITOR, ECX_VMX, ECX_OSXSAVE, ECX_HYPERVISOR = 1 << 3, 1 << 5, 1 << 27, 1 << 31
EDX_HTT = 1 << 28
# Leaf 7.0
EBX_SGX, ECX_SGX_LC = 1 << 2, 1 << 30
# Leaf 0x40000001 EAX, Documentation/virt/kvm/x86/cpuid.rst
KVM_FEATURE_HC_MAP_GPA_RANGE, KVM_FEATURE_MIGRATION_CONTROL = 1 << 16, 1 << 17
# Leaf 0x80000001 ECX
ECX_SVM = 1 << 2
# Leaf 0x8000001f EAX, AMD APM vol. 3, E.4.17
EAX_SEV = 1 << 1
# Both aliases are one cached memory here, so the guest need not flush caches when it converts.
EAX_COHERENT_ACROSS_DOMAINS = 1 << 10
ENCRYPTION_FEATURES = EAX_SEV | EAX_COHERENT_ACROSS_DOMAINS

TOPOLOGY_LEAVES = (0xB, 0x1F)
CACHE_LEAVES = (0x4, 0x8000_001D)
SGX_LEAF, SVM_LEAF, ENCRYPTION_LEAF = 0x12, 0x8000_000A, 0x8000_001F
SMT_LEVEL, CORE_LEVEL = 1, 2


class CpuidEntry(NamedTuple):
    """struct kvm_cpuid_entry2 without its padding."""

    function: int
    index: int  # type: ignore[assignment]  # hides tuple.index; it is KVM's name
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def choose_c_bit(supported: Iterable[tuple[int, ...]], ram_end: int = layout.FOUR_GIB) -> int:
    """The guest-physical address bit that tells private from shared.

    Bit 38 where the processor's MAXPHYADDR (leaf 0x80000008 EAX[7:0], or the smaller
    guest-physical width in EAX[23:16]) allows it, else the highest bit there is. It must lie
    above every GPA the guest uses: RAM up to `ram_end`, and the devices below 4 GiB.
    Raises HostError when it does not.
    """
    widths = 36  # what a processor without the leaf has
    for entry in supported:
        if entry[0] == 0x8000_0008:
            host, guest = entry[3] & 0xFF, entry[3] >> 16 & 0xFF
            widths = min(host, guest) if guest else host
    c_bit = min(DEFAULT_C_BIT, widths - 1)
    needed = max(ram_end, layout.FOUR_GIB)
    if needed > 1 << c_bit:
        raise HostError(
            f"the C-bit would be bit {c_bit} (MAXPHYADDR {widths}), "
            f"but the guest uses addresses up to {needed:#x}: "
            "give it less memory (--mem) or run without --private-mem"
        )
    return c_bit


def guest_cpuid(
    supported: Iterable[tuple[int, ...]],
    vcpu_index: int,
    vcpu_count: int,
    c_bit: int | None = None,
) -> list[CpuidEntry]:
    """The entries for KVM_SET_CPUID2 of one vCPU, whose APIC id is its index.

    `supported` is KVM_GET_SUPPORTED_CPUID's answer. One package, one thread a core.
    Raises HostError when a C-bit is asked for and KVM offers no paravirtual leaves.
    """
    host = [CpuidEntry(*entry) for entry in supported]
    topology = _Topology(vcpu_index, vcpu_count, is_amd(host))
    entries = [
        topology.adapt(_strip(entry, c_bit is not None))
        for entry in host
        if entry.function not in (*TOPOLOGY_LEAVES, SGX_LEAF, ENCRYPTION_LEAF)
        and not (entry.function == SVM_LEAF and c_bit is not None)
    ]
    entries += topology.leaves(_max_basic_leaf(host))
    if c_bit is not None:
        entries = [_announce_sev(entry) for entry in entries]
        entries.append(CpuidEntry(ENCRYPTION_LEAF, 0, 0, ENCRYPTION_FEATURES, c_bit, 0, 0))
        if not any(entry.function == 0x4000_0001 for entry in entries):
            raise HostError(
                "KVM_GET_SUPPORTED_CPUID lists no leaf 0x40000001, which announces the "
                "share/unshare hypercall to Linux: run without --private-mem"
            )
    return entries


def is_amd(supported: Iterable[tuple[int, ...]]) -> bool:
    """Whether the processor is an AMD (or Hygon) one, which means vmmcall and not vmcall."""
    entries = [CpuidEntry(*entry) for entry in supported]
    vendors = (b"AuthenticAMD", b"HygonGenuine")
    return any(_vendor(entry) in vendors for entry in entries if entry.function == 0)


def _vendor(entry: CpuidEntry) -> bytes:
    return b"".join(
        register.to_bytes(4, "little") for register in (entry.ebx, entry.edx, entry.ecx)
    )


def _max_basic_leaf(entries: list[CpuidEntry]) -> int:
    return max((entry.eax for entry in entries if entry.function == 0), default=0)


def _strip(entry: CpuidEntry, private: bool) -> CpuidEntry:
    """Take away what this VMM cannot back.

    MWAIT would hold the host's processor, OSXSAVE mirrors the guest's CR4 (KVM sets it), SGX
    needs enclave memory. Nested virtualisation keeps its control blocks in guest memory that
    KVM reads through the host's mapping: not possible with private memory.
    """
    if entry.function == 1:
        ecx = entry.ecx & ~(ECX_MONITOR | ECX_OSXSAVE) | ECX_HYPERVISOR
        return entry._replace(ecx=ecx & ~ECX_VMX if private else ecx)
    if entry.function == 5:
        return entry._replace(eax=0, ebx=0, ecx=0, edx=0)
    if entry.function == 7 and entry.index == 0:
        return entry._replace(ebx=entry.ebx & ~EBX_SGX, ecx=entry.ecx & ~ECX_SGX_LC)
    if entry.function == 0x8000_0001 and private:
        return entry._replace(ecx=entry.ecx & ~ECX_SVM)
    return entry


def _announce_sev(entry: CpuidEntry) -> CpuidEntry:
    if entry.function == 0x8000_0000:
        return entry._replace(eax=max(entry.eax, ENCRYPTION_LEAF))
    if entry.function == 0x4000_0001:
        features = KVM_FEATURE_HC_MAP_GPA_RANGE | KVM_FEATURE_MIGRATION_CONTROL
        return entry._replace(eax=entry.eax | features)
    return entry


class _Topology:
    """One package of `count` single-threaded cores, seen from the core with APIC id `apic_id`."""

    def __init__(self, apic_id: int, count: int, amd: bool) -> None:
        self.apic_id = apic_id
        self.count = count
        self.amd = amd
        self.id_bits = (count - 1).bit_length()

    def adapt(self, entry: CpuidEntry) -> CpuidEntry:
        """Rewrite the fields that describe the topology in leaves that say more than that."""
        function = entry.function
        if function == 0:
            return entry._replace(eax=max(entry.eax, TOPOLOGY_LEAVES[0]))
        if function == 1:
            logical = min(1 << self.id_bits, 0xFF)
            ebx = self.apic_id << 24 & 0xFF00_0000 | logical << 16 | entry.ebx & 0xFFFF
            htt = EDX_HTT if self.count > 1 else 0
            return entry._replace(ebx=ebx, edx=entry.edx & ~EDX_HTT | htt)
        if function in CACHE_LEAVES and entry.eax & 0x1F:
            return entry._replace(eax=self._cache(entry))
        if function == 0x8000_0008 and self.amd:
            cores = min(self.count - 1, 0xFF)
            return entry._replace(ecx=entry.ecx & ~0xF0FF | self.id_bits << 12 | cores)
        if function == 0x8000_001E:
            core = self.apic_id & 0xFF
            return entry._replace(eax=self.apic_id, ebx=core, ecx=0, edx=0)
        return entry

    def _cache(self, entry: CpuidEntry) -> int:
        """EAX of a cache leaf: levels 1 and 2 belong to a core, level 3 to the package."""
        level = entry.eax >> 5 & 7
        sharing = (1 << self.id_bits) - 1 if level >= 3 else 0
        eax = entry.eax & 0x3FFF | min(sharing, 0xFFF) << 14
        if entry.function == 0x4:
            eax |= min((1 << self.id_bits) - 1, 0x3F) << 26
        return eax

    def leaves(self, max_basic_leaf: int) -> list[CpuidEntry]:
        """The extended topology leaves: threads, cores, and the level type 0 that ends them."""
        levels = [
            (0, 1, SMT_LEVEL << 8),
            (self.id_bits, self.count, CORE_LEVEL << 8 | 1),
            (0, 0, 2),
        ]
        return [
            CpuidEntry(leaf, index, SIGNIFICANT_INDEX, shift, count, ecx, self.apic_id)
            for leaf in TOPOLOGY_LEAVES
            if leaf == TOPOLOGY_LEAVES[0] or leaf <= max_basic_leaf
            for index, (shift, count, ecx) in enumerate(levels)
        ]
