# Patterns in memory by either alias, and the sweep over all private memory.
.include "defs.inc"

    .text

# rdi = GPA, rsi = bytes, rdx = key: writes GPA ^ key into each 8-byte word.
    .globl fill_private, fill_plain
fill_private:
    mov     rax, rdi
    or      rdi, [rip + c_bit_mask]
    jmp     fill
fill_plain:
    mov     rax, rdi
fill:                                   # rdi = virtual address, rax = GPA
    add     rsi, rax                    # end
.Lfill_next:
    mov     rcx, rax
    xor     rcx, rdx
    mov     [rdi], rcx
    add     rdi, 8
    add     rax, 8
    cmp     rax, rsi
    jb      .Lfill_next
    ret

# rdi = GPA, rsi = bytes, rdx = key: each word must be GPA ^ key.
    .globl verify_private, verify_plain
verify_private:
    mov     rax, rdi
    or      rdi, [rip + c_bit_mask]
    jmp     verify
verify_plain:
    mov     rax, rdi
verify:
    add     rsi, rax
.Lverify_next:
    mov     rcx, rax
    xor     rcx, rdx
    cmp     [rdi], rcx
    jne     .Lverify_mismatch
    add     rdi, 8
    add     rax, 8
    cmp     rax, rsi
    jb      .Lverify_next
    ret

# rdi = GPA, rsi = bytes: each word must be zero.
    .globl verify_zero_private, verify_zero_plain
verify_zero_private:
    mov     rax, rdi
    or      rdi, [rip + c_bit_mask]
    jmp     verify_zero
verify_zero_plain:
    mov     rax, rdi
verify_zero:
    add     rsi, rax
    xor     ecx, ecx
.Lzero_next:
    cmp     [rdi], rcx
    jne     .Lverify_mismatch
    add     rdi, 8
    add     rax, 8
    cmp     rax, rsi
    jb      .Lzero_next
    ret

.Lverify_mismatch:                      # rdi = virtual address, rax = GPA, rcx = expected
    mov     rsi, [rdi]
    mov     rdi, rcx
    mov     rdx, rax
    jmp     fail_at

# Fills [private_start, full_end) wholly; beyond it the first and last word of every
# stride-th page. A page costs the host a fault and 4 KiB, so the number of pages is bounded.
    .globl memory_write
memory_write:
    STEP    "private-write"
    push    rbx
    push    rbp
    mov     rax, [rip + ram_bytes]
    mov     ecx, FULL_END
    cmp     rax, rcx
    cmovb   rcx, rax
    mov     [rip + full_end], rcx
    sub     rax, rcx
    shr     rax, 12                     # pages beyond the fully written part
    mov     edx, 1
.Lwiden:
    cmp     rax, MAX_SPARSE_PAGES
    jbe     .Lstride_known
    shr     rax, 1
    shl     rdx, 1
    jmp     .Lwiden
.Lstride_known:
    shl     rdx, 12
    mov     [rip + stride_bytes], rdx

    mov     rdi, [rip + private_start]
    mov     rsi, rcx
    sub     rsi, rdi
    movabs  rdx, KEY_PRIVATE
    call    fill_private

    xor     ebp, ebp                    # pages touched
    mov     rbx, [rip + full_end]
.Lwrite_next:
    cmp     rbx, [rip + ram_bytes]
    jae     .Lwritten
    mov     rdi, rbx
    mov     esi, 8
    movabs  rdx, KEY_PRIVATE
    call    fill_private
    lea     rdi, [rbx + PAGE - 8]
    mov     esi, 8
    call    fill_private
    inc     rbp
    add     rbx, [rip + stride_bytes]
    jmp     .Lwrite_next
.Lwritten:
    call    step_ok
    PRINT   "every word of "
    mov     rax, [rip + full_end]
    sub     rax, [rip + private_start]
    shr     rax, 10
    call    put_decimal
    PRINT   " KiB, then first and last word of "
    mov     rax, rbp
    call    put_decimal
    PRINT   " pages, one every "
    mov     rax, [rip + stride_bytes]
    shr     rax, 10
    call    put_decimal
    PRINT   " KiB"
    call    end_line
    pop     rbp
    pop     rbx
    ret

# Everything that memory_write wrote must still be there.
    .globl memory_check
memory_check:
    STEP    "private-intact"
    WHAT    "private memory"
    push    rbx
    mov     rdi, [rip + private_start]
    mov     rsi, [rip + full_end]
    sub     rsi, rdi
    movabs  rdx, KEY_PRIVATE
    call    verify_private
    mov     rbx, [rip + full_end]
.Lcheck_next:
    cmp     rbx, [rip + ram_bytes]
    jae     .Lchecked
    mov     rdi, rbx
    mov     esi, 8
    movabs  rdx, KEY_PRIVATE
    call    verify_private
    lea     rdi, [rbx + PAGE - 8]
    mov     esi, 8
    call    verify_private
    add     rbx, [rip + stride_bytes]
    jmp     .Lcheck_next
.Lchecked:
    pop     rbx
    OK      "every word written is still there"
    ret

    .bss
    .balign 8
full_end:       .skip 8
stride_bytes:   .skip 8
