// Patterns in memory by either address, and the sweep over all private memory.
.include "defs.inc"

    .text

// x0 = GPA, x1 = bytes, x2 = key: writes GPA ^ key into each 8-byte word.
    .globl fill_private, fill_plain
fill_private:
    mov     x3, x0
    b       fill
fill_plain:
    ldr     x3, shared_mask
    orr     x3, x3, x0
fill:                                   // x3 = virtual address, x0 = GPA
    add     x1, x1, x0                  // end
.Lfill_next:
    eor     x4, x0, x2
    str     x4, [x3], #8
    add     x0, x0, #8
    cmp     x0, x1
    b.lo    .Lfill_next
    ret

// x0 = GPA, x1 = bytes, x2 = key: each word must be GPA ^ key.
    .globl verify_private, verify_plain
verify_private:
    mov     x3, x0
    b       verify
verify_plain:
    ldr     x3, shared_mask
    orr     x3, x3, x0
verify:
    add     x1, x1, x0
.Lverify_next:
    eor     x4, x0, x2
    ldr     x5, [x3], #8
    cmp     x5, x4
    b.ne    .Lverify_mismatch
    add     x0, x0, #8
    cmp     x0, x1
    b.lo    .Lverify_next
    ret

// x0 = GPA, x1 = bytes: each word must be zero.
    .globl verify_zero_private, verify_zero_plain
verify_zero_private:
    mov     x3, x0
    b       verify_zero
verify_zero_plain:
    ldr     x3, shared_mask
    orr     x3, x3, x0
verify_zero:
    add     x1, x1, x0
    mov     x4, #0
.Lzero_next:
    ldr     x5, [x3], #8
    cbnz    x5, .Lverify_mismatch
    add     x0, x0, #8
    cmp     x0, x1
    b.lo    .Lzero_next
    ret

.Lverify_mismatch:                      // x0 = GPA, x4 = expected, x5 = seen
    mov     x2, x0
    mov     x0, x4
    mov     x1, x5
    b       fail_at

// Fills [private_start, full_end) wholly; beyond it the first and last word of every
// stride-th page. A page costs the host a fault and 4 KiB, so the number of pages is bounded.
    .globl memory_write
memory_write:
    ENTER
    STEP    "private-write"
    ldr     x0, ram_end
    CONST   x1, FULL_END
    cmp     x0, x1
    csel    x1, x0, x1, lo
    STORE   x1, full_end
    sub     x0, x0, x1
    lsr     x0, x0, #12                 // pages beyond the fully written part
    mov     x2, #PAGE
.Lwiden:
    cmp     x0, #MAX_SPARSE_PAGES
    b.ls    .Lstride_known
    lsr     x0, x0, #1
    lsl     x2, x2, #1
    b       .Lwiden
.Lstride_known:
    STORE   x2, stride_bytes

    ldr     x0, private_start
    sub     x1, x1, x0
    CONST   x2, KEY_PRIVATE
    bl      fill_private

    mov     x20, #0                     // pages touched
    ldr     x19, full_end
.Lwrite_next:
    ldr     x0, ram_end
    cmp     x19, x0
    b.hs    .Lwritten
    CONST   x2, KEY_PRIVATE
    mov     x0, x19
    mov     x1, #8
    bl      fill_private
    add     x0, x19, #PAGE - 8
    mov     x1, #8
    bl      fill_private
    add     x20, x20, #1
    ldr     x0, stride_bytes
    add     x19, x19, x0
    b       .Lwrite_next
.Lwritten:
    bl      step_ok
    PRINT   "every word of "
    ldr     x0, full_end
    ldr     x1, private_start
    sub     x0, x0, x1
    lsr     x0, x0, #10
    bl      put_decimal
    PRINT   " KiB, then first and last word of "
    mov     x0, x20
    bl      put_decimal
    PRINT   " pages, one every "
    ldr     x0, stride_bytes
    lsr     x0, x0, #10
    bl      put_decimal
    PRINT   " KiB"
    bl      end_line
    LEAVE

// Everything that memory_write wrote must still be there.
    .globl memory_check
memory_check:
    ENTER
    STEP    "private-intact"
    WHAT    "private memory"
    ldr     x0, private_start
    ldr     x1, full_end
    sub     x1, x1, x0
    CONST   x2, KEY_PRIVATE
    bl      verify_private
    ldr     x19, full_end
.Lcheck_next:
    ldr     x0, ram_end
    cmp     x19, x0
    b.hs    .Lchecked
    CONST   x2, KEY_PRIVATE
    mov     x0, x19
    mov     x1, #8
    bl      verify_private
    add     x0, x19, #PAGE - 8
    mov     x1, #8
    bl      verify_private
    ldr     x0, stride_bytes
    add     x19, x19, x0
    b       .Lcheck_next
.Lchecked:
    OK      "every word written is still there"
    LEAVE

    .bss
    .balign 8
full_end:       .skip 8
stride_bytes:   .skip 8
