// SPDX-License-Identifier: GPL-2.0-only
/*
 * In-place conversion: each page of a guest_memfd is private or shared, as the file says it.
 *
 * Part of guest_memfd.c, which includes it. The ABI is that of the series which was in linux-next
 * in September 2026; the code is not.
 *
 * The inode has a tree of the pages that are not what they were made as (INIT_SHARED, or private).
 * It changes with the mapping's invalidate lock held for writing; who holds it for reading, or has
 * a reference to the page from then, can rely on what it found. Contents are left alone.
 */
#include <linux/kprobes.h>
#include <linux/maple_tree.h>
#include <linux/moduleparam.h>

bool __ro_after_init gmem_in_place_conversion = true;
module_param(gmem_in_place_conversion, bool, 0444);
EXPORT_SYMBOL_FOR_KVM_INTERNAL(gmem_in_place_conversion);

#define GMEM_CONVERTED	xa_mk_value(1)	/* in the tree; not converted: nothing */

static bool kvm_gmem_made_private(struct inode *inode)
{
	return !(GMEM_I(inode)->flags & GUEST_MEMFD_FLAG_INIT_SHARED);
}

static bool kvm_gmem_is_private_mem(struct inode *inode, pgoff_t index)
{
	bool converted = mtree_load(&GMEM_I(inode)->converted, index);

	return kvm_gmem_made_private(inode) != converted;
}

/*
 * For kvm_mem_is_private(). Memslots must be stable. Without a guest_memfd, or with one that is
 * closed, there is nobody to ask: shared.
 */
bool kvm_gmem_says_private(struct kvm *kvm, gfn_t gfn)
{
	struct kvm_memory_slot *slot;

	if (!kvm_arch_has_private_mem(kvm))
		return false;

	slot = gfn_to_memslot(kvm, gfn);
	if (!kvm_slot_has_gmem(slot))
		return false;

	CLASS(gmem_get_file, file)(slot);
	if (!file)
		return false;

	return kvm_gmem_is_private_mem(file_inode(file), kvm_gmem_get_index(slot, gfn));
}
EXPORT_SYMBOL_FOR_KVM_INTERNAL(kvm_gmem_says_private);

/* The end of the run of pages from @index on that are all private, or all shared. */
static pgoff_t kvm_gmem_run_end(struct inode *inode, pgoff_t index, bool *private)
{
	MA_STATE(mas, &GMEM_I(inode)->converted, index, index);
	void *entry;

	rcu_read_lock();
	entry = mas_walk(&mas);
	*private = kvm_gmem_made_private(inode) != !!entry;
	rcu_read_unlock();
	return mas.last;
}

static bool kvm_gmem_is_all(struct inode *inode, pgoff_t start, pgoff_t end, bool private)
{
	bool found;

	while (start < end) {
		pgoff_t last = kvm_gmem_run_end(inode, start, &found);

		if (found != private)
			return false;
		if (last == ULONG_MAX)
			break;
		start = last + 1;
	}
	return true;
}

/* One entry for neighbours that are alike, so that the tree doesn't grow with the conversions. */
static int kvm_gmem_set_private(struct inode *inode, pgoff_t start, pgoff_t end, bool private)
{
	struct maple_tree *tree = &GMEM_I(inode)->converted;
	void *entry = kvm_gmem_made_private(inode) == private ? NULL : GMEM_CONVERTED;
	pgoff_t last = end - 1;

	if (entry) {
		MA_STATE(mas, tree, 0, 0);

		rcu_read_lock();
		if (start > 0) {
			mas_set(&mas, start - 1);
			if (mas_walk(&mas))
				start = mas.index;
		}
		mas_set(&mas, end);
		if (mas_walk(&mas))
			last = mas.last;
		rcu_read_unlock();
	}
	return mtree_store_range(tree, start, last, entry, GFP_KERNEL_ACCOUNT);
}

/*
 * Pages that came into being lately sit in per-processor batches on their way to the LRU lists,
 * each with a reference. lru_add_drain_all() is not exported to modules; its address is known to
 * who asks for a probe on it, which is given back at once.
 */
static void kvm_gmem_drain_batches(void)
{
	static void (*drain)(void);

	if (!READ_ONCE(drain)) {
		struct kprobe probe = {
			.symbol_name = "lru_add_drain_all",
			.flags = KPROBE_FLAG_DISABLED,
		};
		unsigned long address;

		if (register_kprobe(&probe))
			return;
		address = (unsigned long)probe.addr;
		unregister_kprobe(&probe);
#ifdef CONFIG_X86_KERNEL_IBT
		/* Probes go behind the ENDBR64 that an indirect call has to land on. */
		if (*(u32 *)(address - 4) == 0xfa1e0ff3)
			address -= 4;
#endif
		WRITE_ONCE(drain, (void (*)(void))address);
	}
	drain();
}

/* Whether anyone but the file itself refers to a page of the range; if so, *held is the first. */
static bool kvm_gmem_is_held(struct inode *inode, pgoff_t start, pgoff_t end, pgoff_t *held)
{
	struct folio_batch batch;
	pgoff_t next = start;
	bool found = false;
	int i;

	folio_batch_init(&batch);
	while (!found && filemap_get_folios(inode->i_mapping, &next, end - 1, &batch)) {
		for (i = 0; i < folio_batch_count(&batch); i++) {
			struct folio *folio = batch.folios[i];

			/* The page cache's references, and the one just taken. */
			if (folio_ref_count(folio) != folio_nr_pages(folio) + 1) {
				*held = max(folio->index, start);
				found = true;
				break;
			}
		}
		folio_batch_release(&batch);
		cond_resched();
	}
	return found;
}

static int kvm_gmem_convert(struct inode *inode, pgoff_t start, pgoff_t end, bool private,
			    pgoff_t *fault)
{
	struct address_space *mapping = inode->i_mapping;
	int r = 0;

	filemap_invalidate_lock(mapping);

	if (kvm_gmem_is_all(inode, start, end, private))
		goto out;

	if (private) {
		/* A new fault waits for the lock; one under way has a reference. */
		unmap_mapping_pages(mapping, start, end - start, false);
		if (kvm_gmem_is_held(inode, start, end, fault)) {
			kvm_gmem_drain_batches();
			if (kvm_gmem_is_held(inode, start, end, fault)) {
				r = -EAGAIN;
				goto out;
			}
		}
	}

	kvm_gmem_invalidate_start(inode, start, end);
	r = kvm_gmem_set_private(inode, start, end, private);
	kvm_gmem_invalidate_end(inode, start, end);
	if (r)
		*fault = start;
out:
	filemap_invalidate_unlock(mapping);
	return r;
}

static long kvm_gmem_set_attributes(struct file *file, void __user *arg)
{
	struct gmem_file *f = file->private_data;
	struct inode *inode = file_inode(file);
	struct kvm_memory_attributes2 wanted;
	u64 size = i_size_read(inode);
	pgoff_t fault;
	int r;

	if (copy_from_user(&wanted, arg, sizeof(wanted)))
		return -EFAULT;

	if (wanted.flags || memchr_inv(wanted.reserved, 0, sizeof(wanted.reserved)))
		return -EINVAL;
	if (!kvm_arch_has_private_mem(f->kvm))
		return -EINVAL;
	if (wanted.attributes & ~KVM_MEMORY_ATTRIBUTE_PRIVATE)
		return -EINVAL;
	if (!wanted.size || !PAGE_ALIGNED(wanted.offset) || !PAGE_ALIGNED(wanted.size))
		return -EINVAL;
	if (wanted.offset >= size || wanted.size > size - wanted.offset)
		return -EINVAL;

	r = kvm_gmem_convert(inode, wanted.offset >> PAGE_SHIFT,
			     (wanted.offset + wanted.size) >> PAGE_SHIFT,
			     wanted.attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE, &fault);
	if (!r)
		return 0;

	/* Also when it is 0. What was refused for its arguments has no offset. */
	wanted.error_offset = (u64)fault << PAGE_SHIFT;
	if (copy_to_user(arg, &wanted, sizeof(wanted)))
		return -EFAULT;
	return r;
}

static long kvm_gmem_ioctl(struct file *file, unsigned int ioctl, unsigned long arg)
{
	if (ioctl != KVM_SET_MEMORY_ATTRIBUTES2 || !gmem_in_place_conversion)
		return -ENOTTY;

	return kvm_gmem_set_attributes(file, (void __user *)arg);
}
