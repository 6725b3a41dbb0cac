/* Floors: what C does at best, to measure against. */

static int64_t pyvmm_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* count times size bytes, at offsets that walk over span; nanoseconds in all, or -errno. */
static int64_t pyvmm_floor_pread(int fd, uint64_t address, uint64_t size, uint64_t span, uint32_t count)
{
    int64_t started = pyvmm_now();
    for (uint64_t i = 0; i < count; i++)
        if (pread(fd, (void *)(uintptr_t)address, size, (off_t)(i * size % span)) != (ssize_t)size)
            return errno ? -errno : -EIO;
    return pyvmm_now() - started;
}

static int64_t pyvmm_floor_pwrite(int fd, uint64_t address, uint64_t size, uint64_t span, uint32_t count)
{
    int64_t started = pyvmm_now();
    for (uint64_t i = 0; i < count; i++)
        if (pwrite(fd, (void *)(uintptr_t)address, size, (off_t)(i * size % span)) != (ssize_t)size)
            return errno ? -errno : -EIO;
    return pyvmm_now() - started;
}

/* From a file into a mapping of another at the same offset: what monitors that map guest memory do. */
static int64_t pyvmm_floor_pread_mapped(int fd, uint64_t address, uint64_t size, uint64_t span, uint32_t count)
{
    int64_t started = pyvmm_now();
    for (uint64_t i = 0; i < count; i++) {
        uint64_t offset = i * size % span;
        if (pread(fd, (void *)(uintptr_t)(address + offset), size, (off_t)offset) != (ssize_t)size)
            return errno ? -errno : -EIO;
    }
    return pyvmm_now() - started;
}

static int64_t pyvmm_floor_memcpy(uint64_t target, uint64_t target_span, uint64_t source, uint64_t source_span,
                                  uint64_t size, uint32_t count)
{
    int64_t started = pyvmm_now();
    for (uint64_t i = 0; i < count; i++) {
        memcpy((void *)(uintptr_t)(target + i * size % target_span),
               (const void *)(uintptr_t)(source + i * size % source_span), size);
        __asm__ volatile("" ::: "memory");
    }
    return pyvmm_now() - started;
}

static int64_t pyvmm_floor_splice(int from, int to, uint64_t size, uint64_t span, uint32_t count, int pipe_out, int pipe_in)
{
    int64_t started = pyvmm_now();
    for (uint64_t i = 0; i < count; i++)
        for (uint64_t done = 0; done < size;) {
            uint64_t offset = i * size % span + done;
            int64_t moved = pyvmm_splice_some(from, offset, to, offset, size - done, pipe_out, pipe_in);
            if (moved <= 0)
                return moved ? moved : -EIO;
            done += moved;
        }
    return pyvmm_now() - started;
}

/* An ioctl without argument, count times: KVM_RUN in a loop that looks at nothing. */
static int64_t pyvmm_floor_ioctl(int fd, unsigned long request, uint32_t count)
{
    int64_t started = pyvmm_now();
    for (uint32_t i = 0; i < count; i++)
        while (ioctl(fd, request, 0) < 0)
            if (errno != EINTR)
                return -errno;
    return pyvmm_now() - started;
}

/* Time stamp counter ticks per second, 0 where there is none. */
static int64_t pyvmm_floor_tick_rate(uint32_t milliseconds)
{
#ifdef __x86_64__
    int64_t started = pyvmm_now(), until = started + milliseconds * 1000000LL, now;
    uint64_t first = __builtin_ia32_rdtsc();
    while ((now = pyvmm_now()) < until)
        ;
    return (int64_t)((double)(__builtin_ia32_rdtsc() - first) * 1e9 / (double)(now - started));
#else
    return 0;
#endif
}
