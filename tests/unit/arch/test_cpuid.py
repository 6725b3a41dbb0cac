"""CPUID for guests, from a small host of the test's own."""

from __future__ import annotations

import pytest

from vmm.arch.x86_64.cpuid import CpuidEntry, choose_c_bit, guest_cpuid
from vmm.core.errors import HostError

AMD = (0x6874_7541, 0x444D_4163, 0x6974_6E65)  # EBX, ECX, EDX
INTEL = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)


def host(vendor: tuple[int, int, int] = AMD, physical_bits: int = 40) -> list[tuple[int, ...]]:
    """(function, index, flags, eax, ebx, ecx, edx), the way KVM lists them."""
    return [
        (0, 0, 0, 0x10, *vendor),
        (1, 0, 0, 0xA10F11, 0x0102_0800, 1 << 3 | 1 << 5 | 1 << 21 | 1 << 27, 0x078B_FBFF),
        (4, 0, 1, 0x1C00_4121, 0x01C0_003F, 0x3F, 0),
        (4, 1, 1, 0x1C03_C163, 0x02C0_003F, 0x3FFF, 0),
        (4, 2, 1, 0, 0, 0, 0),
        (5, 0, 0, 0x40, 0x40, 3, 0),
        (7, 0, 1, 1, 0x0180_0006, 1 << 30 | 0x104, 0),
        (0xB, 0, 1, 1, 2, 0x100, 99),
        (0x12, 0, 1, 1, 0, 0, 0),
        (0x4000_0000, 0, 0, 0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D),
        (0x4000_0001, 0, 0, 0x0100_7EFB, 0, 0, 0),
        (0x8000_0000, 0, 0, 0x8000_0008, *vendor),
        (0x8000_0001, 0, 0, 0, 0, 0x0040_0397 | 1 << 2, 0x2000_0000),
        (0x8000_0008, 0, 0, 0x3000 | physical_bits, 0, 0x7001, 0),
        (0x8000_000A, 0, 0, 1, 8, 0, 0xFF),
        (0x8000_001D, 0, 1, 0x4121, 0x01C0_003F, 0x3F, 0),
        (0x8000_001D, 3, 1, 0x0003_C163, 0x03C0_003F, 0x7FFF, 0),
        (0x8000_001E, 0, 0, 7, 0x107, 0x300, 0),
        (0x8000_001F, 0, 0, 0x1F, 51 | 5 << 6, 509, 1),
    ]


def leaf(entries: list[CpuidEntry], function: int, index: int = 0) -> CpuidEntry:
    [entry] = [e for e in entries if (e.function, e.index) == (function, index)]
    return entry


def functions(entries: list[CpuidEntry]) -> set[int]:
    return {entry.function for entry in entries}


@pytest.mark.parametrize("vcpu", [0, 1, 3])
def test_apic_id_is_the_same_in_every_leaf(vcpu: int) -> None:
    entries = guest_cpuid(host(), vcpu, 4)

    assert leaf(entries, 1).ebx >> 24 == vcpu
    assert leaf(entries, 0x8000_001E).eax == vcpu
    assert {e.edx for e in entries if e.function == 0xB} == {vcpu}


def test_topology_of_four_vcpus_is_four_cores_in_one_package() -> None:
    entries = guest_cpuid(host(), 0, 4)

    threads, cores, end = (leaf(entries, 0xB, i) for i in range(3))
    assert (threads.eax, threads.ebx, threads.ecx) == (0, 1, 0x100)
    assert (cores.eax, cores.ebx, cores.ecx) == (2, 4, 0x201)
    assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
    assert all(e.flags & 1 for e in (threads, cores, end))
    assert leaf(entries, 1).ebx >> 16 & 0xFF == 4
    assert leaf(entries, 1).edx >> 28 & 1
    assert leaf(entries, 0x8000_0008).ecx == 2 << 12 | 3
    assert leaf(entries, 0x8000_001E).ebx >> 8 & 0xFF == 0


def test_topology_of_three_vcpus_rounds_the_id_width_up() -> None:
    entries = guest_cpuid(host(), 2, 3)

    assert leaf(entries, 0xB, 1).eax == 2
    assert leaf(entries, 0xB, 1).ebx == 3
    assert leaf(entries, 0x8000_0008).ecx == 2 << 12 | 2


def test_topology_of_one_vcpu_has_no_htt() -> None:
    entries = guest_cpuid(host(), 0, 1)

    assert leaf(entries, 1).edx >> 28 & 1 == 0
    assert leaf(entries, 0xB, 1).eax == 0
    assert leaf(entries, 0x8000_0008).ecx & 0xF0FF == 0


def test_topology_of_300_vcpus_does_not_overflow_fields() -> None:
    entries = guest_cpuid(host(), 299, 300)

    assert all(0 <= value < 1 << 32 for entry in entries for value in entry)
    assert leaf(entries, 0xB, 1).edx == 299


def test_cache_leaves_share_level_3_only() -> None:
    entries = guest_cpuid(host(), 0, 4)

    for function, third in ((4, 1), (0x8000_001D, 3)):
        first_level, last_level = leaf(entries, function, 0), leaf(entries, function, third)
        assert first_level.eax >> 14 & 0xFFF == 0
        assert last_level.eax >> 14 & 0xFFF == 3
    assert leaf(entries, 4, 0).eax >> 26 == 3
    assert leaf(entries, 4, 2).eax == 0


def test_intel_core_count_stays_out_of_the_amd_leaf() -> None:
    entries = guest_cpuid(host(INTEL), 0, 4)

    assert leaf(entries, 0x8000_0008).ecx == 0x7001


def test_v2_topology_leaf_appears_when_the_host_reaches_it() -> None:
    newer = [(0, 0, 0, 0x20, *INTEL), *host(INTEL)[1:]]

    assert leaf(guest_cpuid(newer, 1, 2), 0x1F, 1).edx == 1
    assert 0x1F not in functions(guest_cpuid(host(), 1, 2))


def test_hypervisor_bit_is_always_set() -> None:
    assert leaf(guest_cpuid(host(), 0, 1), 1).ecx >> 31


def test_features_without_backing_are_gone() -> None:
    entries = guest_cpuid(host(), 0, 2)

    assert leaf(entries, 1).ecx & (1 << 3 | 1 << 27) == 0, "MONITOR, OSXSAVE"
    assert leaf(entries, 7).ebx & 1 << 2 == 0, "SGX"
    assert leaf(entries, 7).ecx & 1 << 30 == 0, "SGX_LC"
    assert leaf(entries, 5)[3:] == (0, 0, 0, 0)
    assert 0x12 not in functions(entries)


def test_tsc_deadline_timer_is_the_hosts_to_offer() -> None:
    assert leaf(guest_cpuid(host(), 0, 1), 1).ecx & 1 << 24 == 0


def test_real_sev_of_the_host_is_hidden_without_c_bit() -> None:
    entries = guest_cpuid(host(), 0, 2)

    assert 0x8000_001F not in functions(entries)
    assert leaf(entries, 0x4000_0001).eax == 0x0100_7EFB
    assert leaf(entries, 0x8000_0000).eax == 0x8000_0008


def test_c_bit_announces_plain_sev_and_migration_control() -> None:
    entries = guest_cpuid(host(), 0, 2, c_bit=38)

    assert leaf(entries, 0x8000_001F)[3:] == (1 << 10 | 1 << 1, 38, 0, 0)
    assert leaf(entries, 0x8000_0000).eax == 0x8000_001F
    assert leaf(entries, 0x4000_0001).eax == 0x0100_7EFB | 1 << 16 | 1 << 17


def test_c_bit_keeps_a_higher_extended_limit() -> None:
    newer = [e if e[0] != 0x8000_0000 else (*e[:3], 0x8000_0021, *AMD) for e in host()]

    assert leaf(guest_cpuid(newer, 0, 1, c_bit=38), 0x8000_0000).eax == 0x8000_0021


def test_c_bit_hides_nested_virtualisation() -> None:
    private, ordinary = guest_cpuid(host(), 0, 1, c_bit=38), guest_cpuid(host(), 0, 1)

    assert leaf(private, 0x8000_0001).ecx & 4 == 0
    assert leaf(private, 1).ecx & 1 << 5 == 0
    assert 0x8000_000A not in functions(private)
    assert leaf(ordinary, 0x8000_0001).ecx & 4


def test_c_bit_without_kvm_leaves_raises() -> None:
    bare = [entry for entry in host() if entry[0] >> 16 != 0x4000]

    with pytest.raises(HostError, match="0x40000001"):
        guest_cpuid(bare, 0, 1, c_bit=38)


def test_entries_are_unique_by_function_and_index() -> None:
    entries = guest_cpuid(host(), 0, 4, c_bit=38)

    keys = [(entry.function, entry.index) for entry in entries]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(("bits", "expected"), [(48, 38), (40, 38), (39, 38), (38, 37), (36, 35)])
def test_c_bit_choice_follows_maxphyaddr(bits: int, expected: int) -> None:
    assert choose_c_bit(host(physical_bits=bits)) == expected


def test_c_bit_choice_respects_a_smaller_guest_width() -> None:
    entries = [e if e[0] != 0x8000_0008 else (*e[:3], 37 << 16 | 48, 0, 0, 0) for e in host()]

    assert choose_c_bit(entries) == 36


def test_c_bit_choice_below_ram_raises_with_the_numbers() -> None:
    with pytest.raises(HostError, match=r"bit 35 \(MAXPHYADDR 36\).*0x1000000000"):
        choose_c_bit(host(physical_bits=36), ram_end=1 << 36)


def test_c_bit_choice_below_4_gib_raises() -> None:
    with pytest.raises(HostError, match="bit 31"):
        choose_c_bit(host(physical_bits=32))
