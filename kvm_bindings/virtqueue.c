/* What a batch of a virtqueue's requests says, worked out on copies of guest memory: bytes in, numbers out. Nothing here
   reads guest memory, and nothing decides: what isn't the usual is left to the caller, who says what is wrong with it.

   A list of chains is uint64_t: for each its head, how many pieces are readable, how many are writable, then the pieces
   (gpa, size), readable ones first. */

struct pyvmm_descriptor { /* virtio 1.2, 2.7.5; little-endian, as are all machines that pyvmm runs on */
    uint64_t gpa;
    uint32_t size;
    uint16_t flags, next;
};

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4, MAX_INDIRECT = 1024 };

static struct pyvmm_descriptor descriptor_at(const char *table, uint32_t index)
{
    struct pyvmm_descriptor found;
    memcpy(&found, table + 16 * (size_t)index, sizeof found); /* Python's buffers are aligned to nothing */
    return found;
}

static uint16_t head_at(const char *ring, uint32_t size, uint32_t first, uint32_t number)
{
    uint16_t head;
    memcpy(&head, ring + 2 * ((first + number) & (size - 1)), sizeof head);
    return head;
}

/* Which indirect tables the chains of `count` entries of the available ring name, from `first` on: gpa and size of each to
   `pieces`, until there are `most` descriptors in them. The number of chains looked at, or -1 where one is not the usual:
   an indirect descriptor that is not a chain's only one, or a table of a size that is not allowed. */
static int64_t pyvmm_indirect_tables(const void *ring, const void *table, uint32_t size, uint32_t first, uint32_t count,
                                     uint32_t most, uint64_t *pieces, uint32_t *tables)
{
    uint32_t found = 0, descriptors = 0, number;
    for (number = 0; number < count && descriptors < most; number++) {
        uint16_t head = head_at(ring, size, first, number);
        if (head >= size)
            return -1;
        struct pyvmm_descriptor one = descriptor_at(table, head);
        if (!(one.flags & DESC_INDIRECT)) {
            descriptors++;
            continue;
        }
        if (one.flags & DESC_NEXT || !one.size || one.size % 16 || one.size > 16 * MAX_INDIRECT ||
            one.gpa + one.size < one.gpa)
            return -1;
        pieces[2 * found] = one.gpa, pieces[2 * found + 1] = one.size, found++;
        descriptors += one.size / 16;
    }
    *tables = found;
    return number;
}

/* The chains of `count` entries of the available ring, from `first` on, until they have `most_descriptors` or `most_bytes`:
   how many to totals[0], the descriptors read for them to totals[1], all of an indirect table's. `tables` are those that
   pyvmm_indirect_tables found, one after the other. The number of uint64_t in `chains` (room for `room`), or -1 where a
   chain breaks a rule or there is no room for it. */
static int64_t pyvmm_chains(const void *ring, const void *table, uint32_t size, uint32_t first, uint32_t count,
                            const void *tables, uint64_t indirect_size, uint32_t most_descriptors,
                            uint64_t most_bytes, uint64_t *chains, uint64_t room, uint64_t *totals)
{
    const char *indirect = tables;
    uint64_t used = 0, bytes = 0;
    uint32_t descriptors = 0, number;
    for (number = 0; number < count && descriptors < most_descriptors && bytes < most_bytes; number++) {
        uint16_t head = head_at(ring, size, first, number);
        const char *from = table;
        uint32_t entries = size, index = head, left;
        if (head >= size)
            return -1;
        struct pyvmm_descriptor one = descriptor_at(table, head);
        if (one.flags & DESC_INDIRECT) {
            if (one.size > indirect_size)
                return -1;
            from = indirect, entries = one.size / 16, index = 0;
            indirect += one.size, indirect_size -= one.size;
            descriptors += 1 + entries; /* all of it was read */
        }
        uint64_t start = used, readable = 0, writable = 0, total = 0;
        if (room - used < 3)
            return -1;
        used += 3;
        for (left = entries; left; left--) {
            if (index >= entries)
                return -1;
            one = descriptor_at(from, index);
            total += one.size;
            if (one.flags & DESC_INDIRECT || one.gpa + one.size < one.gpa || total >= 1ull << 32)
                return -1;
            if (!(one.flags & DESC_WRITE) && writable)
                return -1;
            if (one.size) {
                if (room - used < 2)
                    return -1;
                chains[used++] = one.gpa, chains[used++] = one.size;
                if (one.flags & DESC_WRITE)
                    writable++;
                else
                    readable++;
            } else if (one.flags & DESC_WRITE) {
                return -1; /* an empty piece; rare enough to be looked at with care */
            }
            if (from == table)
                descriptors++;
            if (!(one.flags & DESC_NEXT))
                break;
            index = one.next;
        }
        if (!left)
            return -1; /* a loop */
        chains[start] = head, chains[start + 1] = readable, chains[start + 2] = writable;
        bytes += total;
    }
    totals[0] = number, totals[1] = descriptors;
    return (int64_t)used;
}

/* Where the headers of a disk's requests are, 16 bytes each, to `pieces` (gpa, size): of chains cut the usual way, into
   header, data and a status byte. The number of chains up to the first that isn't. */
static uint32_t pyvmm_disk_headers(const uint64_t *chains, uint32_t count, uint64_t *pieces)
{
    for (uint32_t number = 0; number < count; number++) {
        uint64_t readable = chains[1], writable = chains[2];
        if (!readable || chains[4] != 16 || !writable || chains[3 + 2 * (readable + writable) - 1] != 1)
            return number;
        pieces[2 * number] = chains[3], pieces[2 * number + 1] = 16;
        chains += 3 + 2 * (readable + writable);
    }
    return count;
}

/* Of `plan`: how many requests, and moves in each direction, bytes read and written, the cost, and how many uint64_t of
   `chains` are the requests'. */
enum { REQUESTS, READS, WRITES, BYTES_READ, BYTES_WRITTEN, COST, USED, PLAN_NUMBERS };

/* struct virtio_blk_req (5.2.6) of chains cut the usual way, plain reads and writes on a disk of `limit` bytes: what is to
   be moved (reads: disk, gpa, size; writes: gpa, disk, size; neighbours joined), where the status bytes go (gpa, 1) and
   the elements of the used ring. Ends before the first request that is anything else, or that would cost more than
   `most`, a cost being `each` and its bytes. */
static void pyvmm_disk_plan(const uint64_t *chains, uint32_t count, const void *header, uint64_t limit, int may_write,
                            uint64_t each, uint64_t most, uint64_t *reads, uint64_t *writes, uint64_t *statuses,
                            uint32_t *elements, uint64_t *plan)
{
    const uint64_t *start = chains;
    const char *headers = header;
    memset(plan, 0, PLAN_NUMBERS * sizeof *plan);
    for (uint32_t number = 0; number < count; number++, headers += 16) {
        uint32_t kind;
        uint64_t sector, size = 0, readable = chains[1], writable = chains[2];
        memcpy(&kind, headers, sizeof kind), memcpy(&sector, headers + 8, sizeof sector);
        int is_read = kind == 0 && readable == 1, is_write = kind == 1 && writable == 1 && may_write;
        if (!is_read && !is_write)
            break;
        const uint64_t *piece = chains + 5, *end = piece + 2 * (readable + writable - 2);
        for (const uint64_t *one = piece; one < end; one += 2)
            size += one[1];
        uint64_t position = sector * 512;
        if (size % 512 || sector > limit / 512 || size > limit - position || plan[COST] + each + size > most)
            break;
        uint64_t *moves = plan + (is_read ? READS : WRITES);
        uint64_t *move = (is_read ? reads : writes) + 3 * *moves;
        int gpa = is_read, disk = !is_read; /* which number of a move is which */
        for (; piece < end; piece += 2) {
            if (*moves && move[gpa - 3] + move[-1] == piece[0] && move[disk - 3] + move[-1] == position) {
                move[-1] += piece[1];
            } else {
                move[gpa] = piece[0], move[disk] = position, move[2] = piece[1];
                move += 3, ++*moves;
            }
            position += piece[1];
        }
        statuses[2 * number] = end[0], statuses[2 * number + 1] = 1;
        elements[2 * number] = (uint32_t)chains[0], elements[2 * number + 1] = is_read ? (uint32_t)size + 1 : 1;
        plan[REQUESTS]++, plan[COST] += each + size;
        plan[is_read ? BYTES_READ : BYTES_WRITTEN] += size;
        chains = end + 2;
    }
    plan[USED] = (uint64_t)(chains - start);
}
