// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM's own accesses to guest pages that only a guest_memfd has.
 *
 * The guest's faults are served from the guest_memfd, but what KVM itself reads of a guest
 * (instructions that it emulates or skips, page tables, operands) it takes from userspace_addr. Of
 * a slot whose pages the host's user space may not touch, there is nothing to be read there, or
 * something else. Here KVM goes to the page.
 */
#include <linux/highmem.h>
#include <linux/kvm_host.h>

#define ACCESS_READ	false
#define ACCESS_WRITE	true

bool kvm_gmem_owns(struct kvm *kvm, const struct kvm_memory_slot *slot, gfn_t gfn)
{
	if (!kvm_slot_has_gmem(slot))
		return false;
#ifdef CONFIG_X86
	/* Encrypted by hardware: the page's bytes are of no use to KVM. */
	if (kvm->arch.has_protected_state)
		return false;
#endif
	return kvm_memslot_is_gmem_only(slot) || kvm_mem_is_private(kvm, gfn);
}
EXPORT_SYMBOL_FOR_KVM_INTERNAL(kvm_gmem_owns);

static int kvm_gmem_copy(struct kvm *kvm, struct kvm_memory_slot *slot, gfn_t gfn,
			 void *data, int offset, int len, bool write)
{
	struct page *page;
	kvm_pfn_t pfn;
	void *address;
	int r;

	if (WARN_ON_ONCE(offset + len > PAGE_SIZE))
		return -EFAULT;

	r = kvm_gmem_get_pfn(kvm, slot, gfn, &pfn, &page, NULL);
	if (r)
		return r;

	address = kmap_local_page(page) + offset;
	if (write)
		memcpy(address, data, len);
	else
		memcpy(data, address, len);
	kunmap_local(address);
	put_page(page);
	return 0;
}

int kvm_gmem_read(struct kvm *kvm, struct kvm_memory_slot *slot, gfn_t gfn,
		  void *data, int offset, int len)
{
	return kvm_gmem_copy(kvm, slot, gfn, data, offset, len, ACCESS_READ);
}
EXPORT_SYMBOL_FOR_KVM_INTERNAL(kvm_gmem_read);

int kvm_gmem_write(struct kvm *kvm, struct kvm_memory_slot *slot, gfn_t gfn,
		   const void *data, int offset, int len)
{
	return kvm_gmem_copy(kvm, slot, gfn, (void *)data, offset, len, ACCESS_WRITE);
}

int kvm_gmem_try_cmpxchg(struct kvm_vcpu *vcpu, gpa_t gpa, void *old, const void *new, int bytes)
{
	struct kvm_memory_slot *slot = kvm_vcpu_gfn_to_memslot(vcpu, gpa_to_gfn(gpa));
	struct page *page;
	bool exchanged;
	kvm_pfn_t pfn;
	void *address;
	int r;

	if (!kvm_gmem_owns(vcpu->kvm, slot, gpa_to_gfn(gpa)))
		return -ENOENT;

	r = kvm_gmem_get_pfn(vcpu->kvm, slot, gpa_to_gfn(gpa), &pfn, &page, NULL);
	if (r)
		return r;

	address = kmap_local_page(page) + offset_in_page(gpa);
	switch (bytes) {
	case 1:
		exchanged = try_cmpxchg((u8 *)address, (u8 *)old, *(u8 *)new);
		break;
	case 2:
		exchanged = try_cmpxchg((u16 *)address, (u16 *)old, *(u16 *)new);
		break;
	case 4:
		exchanged = try_cmpxchg((u32 *)address, (u32 *)old, *(u32 *)new);
		break;
	case 8:
		exchanged = try_cmpxchg((u64 *)address, (u64 *)old, *(u64 *)new);
		break;
	default:
		exchanged = false;
		r = -EINVAL;
	}
	kunmap_local(address);
	put_page(page);
	return r ?: !exchanged;
}
EXPORT_SYMBOL_FOR_KVM_INTERNAL(kvm_gmem_try_cmpxchg);
