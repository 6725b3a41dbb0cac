/* Many system calls for one call from Python, in order. Addresses here are those of the caller's own
   buffers; guest memory is an fd and an offset, as everywhere, but for pyvmm_copy_memory. */

/* table: count pairs of uint64_t, offset and size; data: all of them, one after the other. 0 or -errno; EIO: short.
   A virtqueue lives by the order of its accesses (virtio 1.2, 2.7.13): what a guest on another processor wrote before it
   moved an index must be seen by whoever has seen the index, and the other way round. A system call promises none. */
static int64_t move_many(int fd, const uint64_t *pieces, uint32_t count, char *data, int writing)
{
    for (uint32_t i = 0; i < count; i++) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        uint64_t offset = pieces[2 * i], left = pieces[2 * i + 1];
        while (left) {
            ssize_t moved = writing ? pwrite(fd, data, left, (off_t)offset) : pread(fd, data, left, (off_t)offset);
            if (moved < 0 && errno == EINTR)
                continue;
            if (moved <= 0)
                return moved < 0 ? -errno : -EIO;
            data += moved, offset += moved, left -= moved;
        }
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return 0;
}

static int64_t pyvmm_pread_many(int fd, const void *table, uint32_t count, char *data)
{
    return move_many(fd, table, count, data, 0);
}

static int64_t pyvmm_pwrite_many(int fd, const void *table, uint32_t count, const char *data)
{
    return move_many(fd, table, count, (char *)data, 1);
}

/* As much as one read of the source gives: bytes moved, 0 at its end, or -errno. */
static int64_t pyvmm_copy_some(int from, uint64_t from_offset, int to, uint64_t to_offset, uint64_t size, char *buffer,
                               uint64_t buffer_size)
{
    ssize_t got = pread(from, buffer, size < buffer_size ? size : buffer_size, (off_t)from_offset);
    if (got < 0)
        return -errno;
    for (ssize_t done = 0; done < got;) {
        ssize_t moved = pwrite(to, buffer + done, got - done, (off_t)(to_offset + done));
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0)
            return moved < 0 ? -errno : -EIO;
        done += moved;
    }
    return got;
}

/* The same through a pipe; after an error it may hold bytes, and has to be thrown away. */
static int64_t pyvmm_splice_some(int from, uint64_t from_offset, int to, uint64_t to_offset, uint64_t size, int pipe_out,
                                 int pipe_in)
{
    off_t source = (off_t)from_offset, target = (off_t)to_offset;
    ssize_t got = splice(from, &source, pipe_in, NULL, size, 0);
    if (got < 0)
        return -errno;
    for (ssize_t held = got; held > 0;) {
        ssize_t moved = splice(pipe_out, NULL, to, &target, held, 0);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0)
            return moved < 0 ? -errno : -EIO;
        held -= moved;
    }
    return got;
}

static uint64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

enum { LOOK_AT_CLOCK = 256 << 10 }; /* bytes moved between two looks: some 20 us where all goes well */

/* table: count triples of uint64_t, source offset, target offset and size. Those of splice_from bytes or more go
   through the pipe, the others through the buffer. Bytes moved, short at the source's end and when it has taken
   longer than `most` nanoseconds, or -errno; -EINTR comes with the pipe empty, for the caller to let signals be
   handled and begin again. */
static int64_t pyvmm_move_many(int from, int to, const void *table, uint32_t count, char *buffer, uint64_t buffer_size,
                               int pipe_out, int pipe_in, uint64_t splice_from, uint64_t most)
{
    const uint64_t *moves = table;
    const uint64_t started = nanoseconds();
    int64_t total = 0, looked = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t source = moves[3 * i], target = moves[3 * i + 1], left = moves[3 * i + 2];
        int inside = left >= splice_from;
        while (left) {
            int64_t moved = inside ? pyvmm_splice_some(from, source, to, target, left, pipe_out, pipe_in)
                                   : pyvmm_copy_some(from, source, to, target, left, buffer, buffer_size);
            if (moved < 0)
                return moved;
            if (moved == 0)
                return total;
            source += moved, target += moved, left -= moved, total += moved;
            if (total - looked >= LOOK_AT_CLOCK) {
                if (nanoseconds() - started > most)
                    return total;
                looked = total;
            }
        }
    }
    return total;
}

/* Between two mappings: nothing but io=mmap may use it on guest memory. */
static void pyvmm_copy_memory(uint64_t target, uint64_t source, uint64_t size)
{
    memcpy((void *)(uintptr_t)target, (const void *)(uintptr_t)source, size);
}
