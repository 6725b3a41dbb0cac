/* SPDX-License-Identifier: GPL-2.0-only */
/* Private or shared, as the guest_memfd says it; see virt/kvm/gmem_in_place.c. */
#ifndef __KVM_GMEM_IN_PLACE_H__
#define __KVM_GMEM_IN_PLACE_H__

#include <linux/kvm.h>

struct kvm;

#ifndef KVM_SET_MEMORY_ATTRIBUTES2
struct kvm_memory_attributes2 {
	__u64 offset;		/* in the guest_memfd, bytes */
	__u64 size;
	__u64 attributes;	/* KVM_MEMORY_ATTRIBUTE_PRIVATE, or 0 */
	__u64 flags;		/* none yet */
	__u64 error_offset;	/* out: with EAGAIN and ENOMEM, the first page at fault */
	__u64 reserved[11];
};

#define KVM_SET_MEMORY_ATTRIBUTES2 _IOWR(KVMIO, 0xd2, struct kvm_memory_attributes2)
#endif

/* Whether guest_memfds keep the attributes; else VMs do (KVM_SET_MEMORY_ATTRIBUTES). */
extern bool gmem_in_place_conversion;

bool kvm_gmem_says_private(struct kvm *kvm, gfn_t gfn);

#endif
