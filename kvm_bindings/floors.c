/* Floors: what C does at best, to measure against; and memcpy, which nothing but io=mmap may use on guest memory. */

static void pyvmm_copy_memory(uint64_t target, uint64_t source, uint64_t size)
{
    memcpy((void *)(uintptr_t)target, (const void *)(uintptr_t)source, size);
}
