// SPDX-License-Identifier: GPL-2.0-only
/*
 * read, write and splice on a guest_memfd: shared pages move, private ones are refused.
 *
 * Part of guest_memfd.c, which includes it. Until the VM has a vCPU, a write of a whole page also
 * fills a private page that has no content yet: the guest's first memory, as in the posted series
 * "guest_memfd: add generic population via write".
 */
#include <linux/moduleparam.h>

#include "page_io.h"

static bool gmem_file_io = true;
module_param(gmem_file_io, bool, 0444);

/* The page with a reference, locked against conversions only until that is taken. */
static struct page *kvm_gmem_get_shared_page(struct inode *inode, pgoff_t index, bool write)
{
	struct address_space *mapping = inode->i_mapping;
	struct folio *folio;
	struct page *page;

	filemap_invalidate_lock_shared(mapping);
	if (!kvm_gmem_is_shared_mem(inode, index)) {
		page = ERR_PTR(-EACCES);
		goto out;
	}

	/* Reading what nobody has written brings no page into being. */
	folio = write ? kvm_gmem_get_folio(inode, index) : filemap_lock_folio(mapping, index);
	if (folio == ERR_PTR(-ENOENT)) {
		page = ZERO_PAGE(0);
		get_page(page);
		goto out;
	}
	if (IS_ERR(folio)) {
		page = ERR_CAST(folio);
		goto out;
	}

	page = folio_file_page(folio, index);
	if (folio_test_hwpoison(folio)) {
		folio_unlock(folio);
		folio_put(folio);
		page = ERR_PTR(-EHWPOISON);
		goto out;
	}
	if (!folio_test_uptodate(folio)) {
		clear_highpage(page);
		folio_mark_uptodate(folio);
	}
	folio_unlock(folio);
out:
	filemap_invalidate_unlock_shared(mapping);
	return page;
}

/* For I/O by guest-physical address. Memslots must be stable. */
struct page *kvm_gmem_get_slot_page(struct kvm_memory_slot *slot, gfn_t gfn, bool write)
{
	CLASS(gmem_get_file, file)(slot);
	if (!file)
		return ERR_PTR(-EFAULT);

	return kvm_gmem_get_shared_page(file_inode(file), kvm_gmem_get_index(slot, gfn), write);
}

static struct page *kvm_gmem_get_file_page(struct file *file, pgoff_t index, bool write)
{
	return kvm_gmem_get_shared_page(file_inode(file), index, write);
}

static ssize_t kvm_gmem_fill_private(struct kiocb *iocb, struct iov_iter *from)
{
	struct gmem_file *f = iocb->ki_filp->private_data;
	struct inode *inode = file_inode(iocb->ki_filp);
	struct folio *folio;
	ssize_t r = -EACCES;

	if (READ_ONCE(f->kvm->created_vcpus) || !PAGE_ALIGNED(iocb->ki_pos) ||
	    iov_iter_count(from) < PAGE_SIZE)
		return -EACCES;

	folio = kvm_gmem_get_folio(inode, iocb->ki_pos >> PAGE_SHIFT);
	if (IS_ERR(folio))
		return PTR_ERR(folio);

	if (!folio_test_uptodate(folio)) {
		r = -EFAULT;
		if (copy_page_from_iter(folio_page(folio, 0), 0, PAGE_SIZE, from) == PAGE_SIZE) {
			folio_mark_uptodate(folio);
			iocb->ki_pos += PAGE_SIZE;
			r = PAGE_SIZE;
		}
	}
	folio_unlock(folio);
	folio_put(folio);
	return r;
}

static ssize_t kvm_gmem_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	loff_t size = i_size_read(file_inode(iocb->ki_filp));

	return kvm_page_read(iocb, to, size, kvm_gmem_get_file_page);
}

static ssize_t kvm_gmem_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	loff_t size = i_size_read(file_inode(iocb->ki_filp));
	ssize_t done = 0, r;

	if (iocb->ki_flags & IOCB_APPEND)
		return -EINVAL;

	do {
		r = kvm_page_write(iocb, from, size, kvm_gmem_get_file_page);
		if (r == -EACCES)
			r = kvm_gmem_fill_private(iocb, from);
		if (r > 0)
			done += r;
	} while (r > 0 && iov_iter_count(from) && iocb->ki_pos < size);
	return done ?: r;
}

static ssize_t kvm_gmem_splice_read(struct file *file, loff_t *pos, struct pipe_inode_info *pipe,
				    size_t count, unsigned int flags)
{
	loff_t size = i_size_read(file_inode(file));

	return kvm_page_splice_read(file, pos, pipe, count, size, kvm_gmem_get_file_page);
}

/* Before the first file is made. */
static void kvm_gmem_init_file_io(struct file_operations *operations)
{
	if (!gmem_file_io)
		return;

	operations->llseek = generic_file_llseek;
	operations->read_iter = kvm_gmem_read_iter;
	operations->write_iter = kvm_gmem_write_iter;
	operations->splice_read = kvm_gmem_splice_read;
	operations->splice_write = iter_file_splice_write;
}

static fmode_t kvm_gmem_file_io_mode(void)
{
	return gmem_file_io ? FMODE_LSEEK | FMODE_PREAD | FMODE_PWRITE : 0;
}
