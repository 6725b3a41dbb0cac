/* SPDX-License-Identifier: GPL-2.0-only */
/* KVM's own accesses to guest pages that only a guest_memfd has; see virt/kvm/gmem_own.c. */
#ifndef __KVM_GMEM_OWN_H__
#define __KVM_GMEM_OWN_H__

struct kvm;
struct kvm_vcpu;
struct kvm_memory_slot;

/* For slots where kvm_gmem_owns() says true. 0, or a negative errno. */
int kvm_gmem_read(struct kvm *kvm, struct kvm_memory_slot *slot, gfn_t gfn,
		  void *data, int offset, int len);
int kvm_gmem_write(struct kvm *kvm, struct kvm_memory_slot *slot, gfn_t gfn,
		   const void *data, int offset, int len);

/* Whether the page at @gfn is the guest_memfd's, and not what lies at userspace_addr. */
bool kvm_gmem_owns(struct kvm *kvm, const struct kvm_memory_slot *slot, gfn_t gfn);

/*
 * Compares and exchanges @bytes (1, 2, 4 or 8) at @gpa. 0 when exchanged, 1 when *@old was not
 * there (it is now what was), -ENOENT where kvm_gmem_owns() says false, else a negative errno.
 */
int kvm_gmem_try_cmpxchg(struct kvm_vcpu *vcpu, gpa_t gpa, void *old, const void *new, int bytes);

#endif
