/* Compiled into kvm_bindings._kvm after kvm_abi.h: what cffi can't check or Python's os module can't call. */

#define ABI_SIZE(type, size) _Static_assert(sizeof(struct type) == (size), #type " has another size in the kernel's ABI")
#define ABI_OFFSET(type, field, offset) \
    _Static_assert(offsetof(struct type, field) == (offset), #type "." #field " lies elsewhere in the kernel's ABI")

ABI_SIZE(kvm_userspace_memory_region, 32);
ABI_SIZE(kvm_userspace_memory_region2, 160);
ABI_SIZE(kvm_create_guest_memfd, 64);
ABI_SIZE(kvm_memory_attributes, 32);
ABI_SIZE(kvm_memory_attributes2, 128);
ABI_SIZE(kvm_pre_fault_memory, 64);
ABI_SIZE(kvm_enable_cap, 104);
ABI_SIZE(kvm_irqfd, 32);
ABI_SIZE(kvm_irq_routing_entry, 48);
ABI_SIZE(kvm_irq_routing, 8);
ABI_SIZE(kvm_ioeventfd, 64);
ABI_SIZE(kvm_coalesced_mmio_zone, 16);
ABI_SIZE(kvm_coalesced_mmio, 24);
ABI_SIZE(kvm_coalesced_mmio_ring, 8);
ABI_SIZE(kvm_one_reg, 16);
ABI_SIZE(kvm_create_device, 12);
ABI_SIZE(kvm_device_attr, 24);
ABI_SIZE(kvm_run, 2352);
ABI_OFFSET(kvm_run, exit_reason, 8);
ABI_OFFSET(kvm_run, io, 32);
ABI_OFFSET(kvm_run, kvm_valid_regs, 288);
ABI_OFFSET(kvm_run_io, data_offset, 8);
ABI_OFFSET(kvm_run_mmio, len, 16);
ABI_OFFSET(kvm_run_hypercall, ret, 56);
ABI_OFFSET(kvm_run_emulation_failure, insn_bytes, 17);
ABI_OFFSET(kvm_run_arm_nisv, fault_ipa, 8);
ABI_OFFSET(kvm_run_msr, data, 16);

/* ioctl(2) with the two kinds of argument KVM takes; 0 or more on success, -errno on failure, and never a retry. */
static int pyvmm_ioctl_value(int fd, unsigned long request, unsigned long value)
{
    int result = ioctl(fd, request, value);
    return result < 0 ? -errno : result;
}

static int pyvmm_ioctl_pointer(int fd, unsigned long request, void *argument)
{
    int result = ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
}

/* A mapping that exists because KVM wants an address for a memslot; it never becomes a Python buffer. No core dump
   has it: guest memory, or what KVM says of the guest's registers, does not belong in a file. */
static int64_t pyvmm_map(int fd, uint64_t offset, uint64_t size, int protection, int flags)
{
    void *address = mmap(NULL, size, protection, flags, fd, (off_t)offset);
    if (address == MAP_FAILED)
        return -errno;
    if (madvise(address, size, MADV_DONTDUMP) < 0) {
        int error = errno;
        munmap(address, size);
        return -error;
    }
    return (int64_t)(uintptr_t)address;
}

/* This process leaves no core file, and no program of the same user may look into it; children that start another
   program are as they were. The hard limit stays, so that they can have core files. */
static int pyvmm_forbid_core_dumps(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_CORE, &limit) < 0)
        return -errno;
    limit.rlim_cur = 0;
    if (setrlimit(RLIMIT_CORE, &limit) < 0)
        return -errno;
    return prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 ? -errno : 0;
}

static int pyvmm_forget(uint64_t address, uint64_t size)
{
    return madvise((void *)(uintptr_t)address, size, MADV_DONTNEED) < 0 ? -errno : 0;
}

static int pyvmm_unmap(uint64_t address, uint64_t size)
{
    return munmap((void *)(uintptr_t)address, size) < 0 ? -errno : 0;
}

static int pyvmm_protect(uint64_t address, uint64_t size, int protection)
{
    return mprotect((void *)(uintptr_t)address, size, protection) < 0 ? -errno : 0;
}

static int pyvmm_fallocate(int fd, int mode, uint64_t offset, uint64_t size)
{
    return fallocate(fd, mode, (off_t)offset, (off_t)size) < 0 ? -errno : 0;
}

/* The kernel copies between a file and memory named by address: a bad address is EFAULT here, not a signal. */
static int64_t pyvmm_pread_to_address(int fd, uint64_t address, uint64_t size, uint64_t offset)
{
    ssize_t moved = pread(fd, (void *)(uintptr_t)address, size, (off_t)offset);
    return moved < 0 ? -errno : moved;
}

static int64_t pyvmm_pwrite_from_address(int fd, uint64_t address, uint64_t size, uint64_t offset)
{
    ssize_t moved = pwrite(fd, (const void *)(uintptr_t)address, size, (off_t)offset);
    return moved < 0 ? -errno : moved;
}

/* cachestat(2), Linux 6.5: the number has been 451 on every architecture since; C libraries don't wrap it yet. */
static int64_t pyvmm_cached_pages(int fd, uint64_t offset, uint64_t size)
{
    struct { uint64_t off, len; } range = {offset, size};
    struct { uint64_t cache, dirty, writeback, evicted, recently_evicted; } result;
    long status = syscall(451, fd, &range, &result, 0);
    return status < 0 ? -errno : (int64_t)result.cache;
}

/* memfd_secret(2), Linux 5.14: 447 on every architecture that has it. */
static int pyvmm_memfd_secret(unsigned int flags)
{
    long fd = syscall(447, flags);
    return fd < 0 ? -errno : (int)fd;
}

static void pyvmm_do_nothing(int number)
{
    (void)number;
}

/* From now on the signal interrupts system calls and does nothing else, on whichever thread this is called. */
static int pyvmm_interrupt_by(int number)
{
    struct sigaction action = {.sa_handler = pyvmm_do_nothing};
    return sigaction(number, &action, NULL) < 0 ? -errno : 0;
}
