// SPDX-License-Identifier: GPL-2.0-only
/*
 * read, write and splice on files whose bytes are guest pages.
 *
 * Page by page, and only the page in hand has a reference: while user memory is touched no lock is
 * held, so that the buffer may be a mapping of the same file. A page that can't be had ends the
 * call with what was moved until then, or with the reason if that is nothing.
 */
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/pipe_fs_i.h>
#include <linux/sched/signal.h>

#include "page_io.h"

static size_t kvm_page_part(loff_t pos, size_t count, loff_t size)
{
	return min3((loff_t)count, size - pos, (loff_t)(PAGE_SIZE - offset_in_page(pos)));
}

static ssize_t kvm_page_move(struct kiocb *iocb, struct iov_iter *iter, loff_t size,
			     kvm_get_page_t get, bool write)
{
	ssize_t done = 0, r = 0;

	while (iov_iter_count(iter) && iocb->ki_pos < size) {
		size_t part = kvm_page_part(iocb->ki_pos, iov_iter_count(iter), size);
		size_t offset = offset_in_page(iocb->ki_pos), moved;
		struct page *page;

		if (signal_pending(current)) {
			r = -EINTR;
			break;
		}

		page = get(iocb->ki_filp, iocb->ki_pos >> PAGE_SHIFT, write);
		if (IS_ERR(page)) {
			r = PTR_ERR(page);
			break;
		}

		if (write)
			moved = copy_page_from_iter(page, offset, part, iter);
		else
			moved = copy_page_to_iter(page, offset, part, iter);
		if (write && moved)
			set_page_dirty_lock(page);
		put_page(page);

		done += moved;
		iocb->ki_pos += moved;
		if (moved < part) {
			r = -EFAULT;
			break;
		}
		cond_resched();
	}
	return done ?: r;
}

ssize_t kvm_page_read(struct kiocb *iocb, struct iov_iter *to, loff_t size, kvm_get_page_t get)
{
	return kvm_page_move(iocb, to, size, get, false);
}

ssize_t kvm_page_write(struct kiocb *iocb, struct iov_iter *from, loff_t size,
		       kvm_get_page_t get)
{
	/* The file doesn't grow. */
	if (iov_iter_count(from) && iocb->ki_pos >= size)
		return -EINVAL;
	return kvm_page_move(iocb, from, size, get, true);
}

static void kvm_page_release(struct splice_pipe_desc *pages, unsigned int i)
{
	put_page(pages->pages[i]);
}

/* The pipe gets the pages themselves: they are in use until its reader has taken them. */
ssize_t kvm_page_splice_read(struct file *file, loff_t *pos, struct pipe_inode_info *pipe,
			     size_t count, loff_t size, kvm_get_page_t get)
{
	struct partial_page parts[PIPE_DEF_BUFFERS];
	struct page *pages[PIPE_DEF_BUFFERS];
	struct splice_pipe_desc desc = {
		.pages = pages,
		.partial = parts,
		.nr_pages_max = PIPE_DEF_BUFFERS,
		.ops = &nosteal_pipe_buf_ops,
		.spd_release = kvm_page_release,
	};
	loff_t at = *pos;
	ssize_t r = 0;

	while (count && at < size && desc.nr_pages < PIPE_DEF_BUFFERS) {
		struct page *page = get(file, at >> PAGE_SHIFT, false);
		size_t part = kvm_page_part(at, count, size);

		if (IS_ERR(page)) {
			r = PTR_ERR(page);
			break;
		}
		pages[desc.nr_pages] = page;
		parts[desc.nr_pages].offset = offset_in_page(at);
		parts[desc.nr_pages].len = part;
		desc.nr_pages++;
		at += part;
		count -= part;
	}
	if (!desc.nr_pages)
		return r;

	r = splice_to_pipe(pipe, &desc);
	if (r > 0)
		*pos += r;
	return r;
}
