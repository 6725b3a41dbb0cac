// SPDX-License-Identifier: GPL-2.0-only
/*
 * read, write and splice on a VM's fd: the offset is the guest-physical address.
 *
 * Shared pages only, whatever they are behind: a guest_memfd, or the memory at userspace_addr of
 * the process that made the VM, also when another one has the fd. Across memslots; -EFAULT where
 * there is none.
 */
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/sched/mm.h>

#include "guest_memfd.h"
#include "page_io.h"
#include "vm_io.h"

static struct page *kvm_vm_get_user_page(struct kvm *kvm, struct kvm_memory_slot *slot,
					 gfn_t gfn, bool write)
{
	unsigned long address = __gfn_to_hva_memslot(slot, gfn);
	struct page *page;
	long got = -EFAULT;

	if (!mmget_not_zero(kvm->mm))
		return ERR_PTR(-EFAULT);

	mmap_read_lock(kvm->mm);
	got = get_user_pages_remote(kvm->mm, address, 1, write ? FOLL_WRITE : 0, &page, NULL);
	mmap_read_unlock(kvm->mm);
	mmput(kvm->mm);
	return got == 1 ? page : ERR_PTR(-EFAULT);
}

static struct page *kvm_vm_get_page(struct file *file, pgoff_t gfn, bool write)
{
	struct kvm *kvm = file->private_data;
	struct kvm_memory_slot *slot;

	guard(srcu)(&kvm->srcu);

	slot = gfn_to_memslot(kvm, gfn);
	if (!slot || (slot->flags & KVM_MEMSLOT_INVALID))
		return ERR_PTR(-EFAULT);
	if (write && (slot->flags & KVM_MEM_READONLY))
		return ERR_PTR(-EACCES);
	if (kvm_mem_is_private(kvm, gfn))
		return ERR_PTR(-EACCES);
	if (kvm_memslot_is_gmem_only(slot))
		return kvm_gmem_get_slot_page(slot, gfn, write);
	return kvm_vm_get_user_page(kvm, slot, gfn, write);
}

static loff_t kvm_vm_end(void)
{
	return min_t(u64, MAX_LFS_FILESIZE, ~0ull >> 1);
}

ssize_t kvm_vm_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	return kvm_page_read(iocb, to, kvm_vm_end(), kvm_vm_get_page);
}

ssize_t kvm_vm_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	return kvm_page_write(iocb, from, kvm_vm_end(), kvm_vm_get_page);
}

ssize_t kvm_vm_splice_read(struct file *file, loff_t *pos, struct pipe_inode_info *pipe,
			   size_t count, unsigned int flags)
{
	return kvm_page_splice_read(file, pos, pipe, count, kvm_vm_end(), kvm_vm_get_page);
}
