/* Where there is no libFuzzer: each file once, and `count` inputs made of it by chance, the same ones each time.

   replay COUNT FILE... */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LONGEST = 1 << 14 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t state = 0x9e3779b97f4a7c15;

static uint64_t chance(uint64_t below) /* xorshift64 (Marsaglia 2003) */
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % below;
}

/* A copy of exactly that many bytes: the first one beyond is seen. */
static void once(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size);
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

int main(int count, char **words)
{
    static uint8_t whole[LONGEST], changed[LONGEST];
    for (int each = 2; each < count; each++) {
        FILE *file = fopen(words[each], "rb");
        if (!file)
            return perror(words[each]), 2;
        size_t size = fread(whole, 1, LONGEST, file);
        fclose(file);
        once(whole, size);
        for (long turn = atol(words[1]); size && turn; turn--) {
            memcpy(changed, whole, size);
            for (uint64_t changes = 1 + chance(8); changes; changes--)
                changed[chance(size)] = chance(2) ? chance(256) : chance(4);
            once(changed, chance(4) ? size : chance(size));
        }
    }
    return 0;
}
