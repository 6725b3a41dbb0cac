/* Guest memory by copies of the kernel, with KVM's mapping as the buffer of the call: the one way that pages of a
   protected guest survive, and the quickest for a disk's. A page out of reach is EFAULT, with exactly what lies before
   it copied. Nothing here touches an address of guest memory itself. */

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/uio.h>

enum { MAPPED_PIECES = 256, MAPPED_AT_ONCE = 1 << 20 };

/* table: count pairs of uint64_t, address of guest memory and size; data: ours, all of them one after the other.
   The mapping is the *local* side of the call: what process_vm_readv(2) and process_vm_writev(2) call remote is pinned,
   and a pinned page of a protected guest is one that the host's kernel touches.
   Bytes moved: short where the next byte is out of reach; or -errno. */
static int64_t pyvmm_copy_mapped(const void *table, uint32_t count, char *data, int writing)
{
    const uint64_t *pieces = table;
    struct iovec local[MAPPED_PIECES];
    int64_t total = 0;
    uint64_t done = 0; /* of the first piece that is left */
    for (uint32_t first = 0; first < count;) {
        uint32_t pieces_now = 0;
        struct iovec remote = { data + total, 0 };
        for (uint32_t i = first; i < count && pieces_now < MAPPED_PIECES; i++, pieces_now++) {
            uint64_t skipped = i == first ? done : 0;
            local[pieces_now].iov_base = (void *)(uintptr_t)(pieces[2 * i] + skipped);
            local[pieces_now].iov_len = pieces[2 * i + 1] - skipped;
            remote.iov_len += local[pieces_now].iov_len;
        }
        ssize_t moved = 0;
        if (remote.iov_len)
            moved = writing ? process_vm_readv(getpid(), local, pieces_now, &remote, 1, 0)
                            : process_vm_writev(getpid(), local, pieces_now, &remote, 1, 0);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved < 0)
            return errno == EFAULT ? total : -errno;
        if (moved == 0 && remote.iov_len)
            return total;
        total += moved;
        for (done += moved; first < count && done >= pieces[2 * first + 1]; first++)
            done -= pieces[2 * first + 1];
    }
    return total;
}

/* Between a file and guest memory, of which `room` bytes are mapped at `memory`. table: count triples of uint64_t,
   source offset, target offset and size; writing: the target is the file, else the source. Bytes moved, short at the file's end and when it has taken
   longer than `most` nanoseconds; or -errno: -EFAULT for a page out of reach, with what lies before it moved, -EINTR for
   the caller to let signals be handled and begin again. */
static int64_t pyvmm_move_mapped(int fd, uint64_t memory, uint64_t room, const void *table, uint32_t count, int writing,
                                 uint64_t most)
{
    const uint64_t *moves = table;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t offset = moves[3 * i + !writing], size = moves[3 * i + 2];
        if (offset > room || size > room - offset)
            return -EINVAL; /* the next byte would be another mapping's */
    }
    const uint64_t started = nanoseconds();
    int64_t total = 0, looked = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t offset = moves[3 * i + !!writing], address = memory + moves[3 * i + !writing], left = moves[3 * i + 2];
        while (left) {
            uint64_t now = left < MAPPED_AT_ONCE ? left : MAPPED_AT_ONCE;
            ssize_t moved = writing ? pwrite(fd, (const void *)(uintptr_t)address, now, (off_t)offset)
                                    : pread(fd, (void *)(uintptr_t)address, now, (off_t)offset);
            if (moved < 0)
                return -errno;
            if (moved == 0)
                return writing ? -EIO : total;
            offset += moved, address += moved, left -= moved, total += moved;
            if (total - looked >= LOOK_AT_CLOCK) {
                if (nanoseconds() - started > most)
                    return total;
                looked = total;
            }
        }
    }
    return total;
}

/* addresses: count uint64_t; reached: a byte for each, 1 where the kernel could read one there. 0 or -errno. */
static int64_t pyvmm_probe_mapped(const void *addresses, uint32_t count, char *reached)
{
    char byte;
    struct iovec own = { &byte, 1 };
    for (uint32_t i = 0; i < count; i++) {
        struct iovec local = { (void *)(uintptr_t)((const uint64_t *)addresses)[i], 1 };
        ssize_t moved = process_vm_writev(getpid(), &local, 1, &own, 1, 0);
        if (moved < 0 && errno != EFAULT)
            return -errno;
        reached[i] = moved == 1;
    }
    return 0;
}

/* Whether reads and writes of the file are copies by the processor. Others pin the buffer for a device (O_DIRECT, a
   network's file system, a FUSE server), which gets at a protected guest's private pages: nothing stops it. Only file systems
   that are known to copy count; a block device does, too. 1, 0 or -errno. */
static int pyvmm_is_copied(int fd)
{
    struct stat status;
    struct statfs system;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fstat(fd, &status) < 0)
        return -errno;
    if (flags & O_DIRECT)
        return 0;
    if (S_ISBLK(status.st_mode))
        return 1;
    if (!S_ISREG(status.st_mode))
        return 0;
    if (fstatfs(fd, &system) < 0)
        return -errno;
    switch ((uint32_t)system.f_type) { /* include/uapi/linux/magic.h */
    case 0xEF53:     /* ext2, ext3, ext4 */
    case 0x58465342: /* xfs */
    case 0x9123683E: /* btrfs */
    case 0x01021994: /* tmpfs, memfd */
        return 1;
    }
    return 0;
}
