/* SPDX-License-Identifier: GPL-2.0-only */
/* read, write and splice on files whose bytes are guest pages; see page_io.c. */
#ifndef __KVM_PAGE_IO_H__
#define __KVM_PAGE_IO_H__

#include <linux/fs.h>
#include <linux/splice.h>
#include <linux/uio.h>

/*
 * The page at @index of @file with a reference, or an ERR_PTR: -EACCES where it is private,
 * -EFAULT where there is none. kvm_put_page() gives it back.
 */
typedef struct page *(*kvm_get_page_t)(struct file *file, pgoff_t index, bool write);

/* @size: where the file ends. */
ssize_t kvm_page_read(struct kiocb *iocb, struct iov_iter *to, loff_t size, kvm_get_page_t get);
ssize_t kvm_page_write(struct kiocb *iocb, struct iov_iter *from, loff_t size,
		       kvm_get_page_t get);
ssize_t kvm_page_splice_read(struct file *file, loff_t *pos, struct pipe_inode_info *pipe,
			     size_t count, loff_t size, kvm_get_page_t get);

#endif
