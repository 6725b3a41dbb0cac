/* SPDX-License-Identifier: GPL-2.0-only */
/* A VM's fd as a file of guest memory; see vm_io.c. */
#ifndef __KVM_VM_IO_H__
#define __KVM_VM_IO_H__

#include <linux/fs.h>
#include <linux/uio.h>

ssize_t kvm_vm_read_iter(struct kiocb *iocb, struct iov_iter *to);
ssize_t kvm_vm_write_iter(struct kiocb *iocb, struct iov_iter *from);
ssize_t kvm_vm_splice_read(struct file *file, loff_t *pos, struct pipe_inode_info *pipe,
			   size_t count, unsigned int flags);

#endif
