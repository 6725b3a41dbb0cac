/* kvm_bindings/virtqueue.c on rings that a hostile driver could write, every buffer exactly as long as it is said to be, so
   that AddressSanitizer sees the first byte beyond. What is found is gone through again, by other means.

   Input, little-endian: log2 of the queue's size, entries to look at, their first number, most descriptors, most bytes,
   a disk's sectors, whether there is little room; then what is in ring and table, in the indirect tables, in the headers. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "virtqueue.c"

#define REQUIRE(what)                                                            \
    do {                                                                         \
        if (!(what)) {                                                           \
            fprintf(stderr, "rings.c:%d: not true: %s\n", __LINE__, #what);      \
            abort();                                                             \
        }                                                                        \
    } while (0)

enum { ROOM = 3 * 256 + 2 * (2048 + 1024 + 256) }; /* kvm_bindings/virtqueue.py: _ROOM */

static const uint8_t *at;
static size_t left;

/* The input's next bytes, and zeros behind its end; malloc(0) is one byte that nobody may touch, as here. */
static void *next(size_t size)
{
    char *data = malloc(size);
    size_t some = size < left ? size : left;
    memcpy(data, at, some), memset(data + some, 0, size - some);
    at += some, left -= some;
    return data;
}

static uint64_t number(size_t size)
{
    uint64_t value = 0;
    void *data = next(size);
    memcpy(&value, data, size);
    free(data);
    return value;
}

/* The chains are what the interface says; how many pieces of data they may have at most. */
static uint64_t check_chains(const uint64_t *chains, uint64_t end, uint64_t count, uint32_t size)
{
    uint64_t position = 0, pieces = 0;
    for (uint64_t chain = 0; chain < count; chain++) {
        REQUIRE(end - position >= 3 && chains[position] < size);
        uint64_t own = chains[position + 1] + chains[position + 2], bytes = 0;
        REQUIRE(own <= (end - position - 3) / 2);
        position += 3;
        for (uint64_t piece = 0; piece < own; piece++, position += 2) {
            REQUIRE(chains[position + 1] && chains[position] + chains[position + 1] >= chains[position]);
            bytes += chains[position + 1];
        }
        REQUIRE(bytes < 1ull << 32);
        pieces += own;
    }
    REQUIRE(position == end);
    return pieces;
}

/* A cursor in the moves of one direction. */
struct moves {
    const uint64_t *one;
    uint64_t left, used, sum;
    int disk; /* which of its numbers is the disk's */
};

/* The next `size` bytes of the moves are between these two places. */
static void follow(struct moves *moves, uint64_t gpa, uint64_t position, uint64_t size)
{
    if (moves->left && moves->used == moves->one[2])
        moves->one += 3, moves->left--, moves->used = 0;
    REQUIRE(moves->left && moves->used + size <= moves->one[2]);
    REQUIRE(moves->one[!moves->disk] + moves->used == gpa && moves->one[moves->disk] + moves->used == position);
    moves->used += size, moves->sum += size;
}

static void check_end(const struct moves *moves, uint64_t sum)
{
    REQUIRE(moves->sum == sum && (!moves->left || (moves->left == 1 && moves->used == moves->one[2])));
}

static void plan(const uint64_t *chains, uint64_t end, uint64_t count, uint64_t pieces, uint64_t limit)
{
    uint64_t *where = malloc(2 * count * sizeof *where);
    uint32_t usual = pyvmm_disk_headers(chains, (uint32_t)count, where);
    REQUIRE(usual <= count);
    const uint64_t *chain = chains;
    for (uint32_t each = 0; each < usual; each++) {
        uint64_t own = chain[1] + chain[2];
        REQUIRE(chain[1] && chain[2] && chain[4] == 16 && chain[3 + 2 * own - 1] == 1);
        REQUIRE(where[2 * each] == chain[3] && where[2 * each + 1] == 16);
        chain += 3 + 2 * own;
    }
    int may_write = number(1) & 1;
    uint64_t cost = number(2), most = number(4);
    char *headers = next(16 * usual);
    uint64_t *reads = malloc(3 * pieces * sizeof *reads), *writes = malloc(3 * pieces * sizeof *writes);
    uint64_t *statuses = malloc(2 * usual * sizeof *statuses), numbers[PLAN_NUMBERS];
    uint32_t *elements = malloc(2 * usual * sizeof *elements);
    pyvmm_disk_plan(chains, usual, headers, limit, may_write, cost, most, reads, writes, statuses, elements, numbers);
    uint64_t requests = numbers[REQUESTS];
    REQUIRE(requests <= usual);
    struct moves in = {reads, numbers[READS], 0, 0, 0}, out = {writes, numbers[WRITES], 0, 0, 1};
    chain = chains;
    for (uint64_t request = 0; request < requests; request++) {
        uint64_t own = chain[1] + chain[2], sector, size = 0;
        uint32_t kind;
        memcpy(&kind, headers + 16 * request, 4), memcpy(&sector, headers + 16 * request + 8, 8);
        REQUIRE(kind ? kind == 1 && may_write && chain[2] == 1 : chain[1] == 1);
        REQUIRE(sector <= limit / 512);
        for (uint64_t piece = 1; piece + 1 < own; piece++) {
            follow(kind ? &out : &in, chain[3 + 2 * piece], sector * 512 + size, chain[4 + 2 * piece]);
            size += chain[4 + 2 * piece];
        }
        REQUIRE(size % 512 == 0 && size <= limit - sector * 512);
        REQUIRE(elements[2 * request] == chain[0] && elements[2 * request + 1] == (kind ? 1 : size + 1));
        chain += 3 + 2 * own;
        REQUIRE(statuses[2 * request] == chain[-2] && statuses[2 * request + 1] == 1);
    }
    check_end(&in, numbers[BYTES_READ]), check_end(&out, numbers[BYTES_WRITTEN]);
    REQUIRE(chain == chains + numbers[USED] && numbers[USED] <= end);
    REQUIRE(numbers[COST] == requests * cost + in.sum + out.sum && (!requests || numbers[COST] <= most));
    free(where), free(headers), free(reads), free(writes), free(statuses), free(elements);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    at = data, left = size;
    uint32_t entries = 1u << number(1) % 9, count = number(2) % (entries + 1), first = number(2);
    uint32_t most_descriptors = number(2) + 1;
    uint64_t most_bytes = number(4), limit = number(4) * 512;
    uint64_t room = number(1) & 1 ? number(2) % ROOM : ROOM, named = 0, totals[2];
    char *ring = next(2 * entries), *table = next(16 * entries);
    uint64_t *pieces = malloc(2 * count * sizeof *pieces);
    uint32_t tables;
    int64_t looked = pyvmm_indirect_tables(ring, table, entries, first, count, most_descriptors, pieces, &tables);
    REQUIRE(looked >= -1 && looked <= count);
    if (looked >= 0) {
        REQUIRE(tables <= looked);
        for (uint32_t each = 0; each < tables; each++) {
            uint64_t bytes = pieces[2 * each + 1];
            REQUIRE(bytes && bytes % 16 == 0 && bytes <= 16 * MAX_INDIRECT);
            named += bytes;
        }
        REQUIRE(named < 16 * (most_descriptors + MAX_INDIRECT));
    }
    /* Where indirect tables were not agreed on, nobody has looked for them. */
    if (looked < 0)
        looked = count;
    char *indirect = next(named);
    uint64_t *chains = malloc(room * sizeof *chains);
    int64_t end = pyvmm_chains(ring, table, entries, first, (uint32_t)looked, indirect, named, most_descriptors, most_bytes,
                               chains, room, totals);
    REQUIRE(end >= -1 && end <= (int64_t)room);
    if (end >= 0) {
        REQUIRE(totals[0] <= (uint64_t)looked && totals[1] <= most_descriptors + MAX_INDIRECT);
        plan(chains, end, totals[0], check_chains(chains, end, totals[0], entries), limit);
    }
    free(ring), free(table), free(pieces), free(indirect), free(chains);
    return 0;
}
