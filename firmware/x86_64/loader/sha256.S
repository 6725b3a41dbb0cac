# SHA-256 (FIPS 180-4) over memory, state and buffers in the scratch page: see loader.inc.
#
# Two ways to do the same: the processor's SHA instructions, and plain integer ones. Both keep
# r8-r10, r12-r15 and rbx.
.include "loader.inc"

    .text
    .globl sha256_begin
sha256_begin:
    lea     rsi, [rip + initial]
    lea     rdi, [rbx + STATE]
    mov     ecx, 32
    rep movsb
    ret

# rsi = where the data ended, rcx = all bytes of it: pads and finishes.
    .globl sha256_end
sha256_end:
    push    rcx
    lea     rdi, [rbx + BLOCK]
    mov     edx, ecx
    and     edx, 63
    sub     rsi, rdx
    mov     ecx, edx
    rep movsb
    mov     al, 0x80
    stosb
    mov     ecx, 127
    sub     ecx, edx
    xor     eax, eax
    rep stosb
    pop     rax
    shl     rax, 3
    bswap   rax
    mov     ecx, 1
    cmp     edx, 56
    jb      .Lone_block
    inc     ecx
.Lone_block:
    mov     edx, ecx
    shl     edx, 6
    mov     [rbx + rdx + BLOCK - 8], rax
    lea     rsi, [rbx + BLOCK]
    # falls through

# rsi = data, rcx = number of blocks of 64 bytes; may be 0.
    .globl sha256_blocks
sha256_blocks:
    cmp     dword ptr [rbx + HAS_SHA], 0
    je      plain_blocks

    .macro  ROUNDS number:req, words:req
    movdqa  xmm0, [rax + 16 * \number]
    paddd   xmm0, \words
    sha256rnds2 xmm2, xmm1
    pshufd  xmm0, xmm0, 0x0e
    sha256rnds2 xmm1, xmm2
    .endm

    # Four new words in the place of those sixteen before them.
    .macro  SCHEDULE first:req, second:req, third:req, fourth:req
    sha256msg1 \first, \second
    movdqa  xmm7, \fourth
    palignr xmm7, \third, 4
    paddd   \first, xmm7
    sha256msg2 \first, \fourth
    .endm

    test    rcx, rcx
    jz      .Ldone
    lea     rax, [rip + constants]
    movdqa  xmm8, [rip + swap_bytes]
    movdqu  xmm1, [rbx + STATE]         # a b c d
    movdqu  xmm2, [rbx + STATE + 16]    # e f g h
    pshufd  xmm1, xmm1, 0xb1
    pshufd  xmm2, xmm2, 0x1b
    movdqa  xmm7, xmm1
    palignr xmm1, xmm2, 8               # as the instructions want them: abef,
    pblendw xmm2, xmm7, 0xf0            # cdgh
.Lnext_block:
    movdqa  xmm9, xmm1
    movdqa  xmm10, xmm2
    movdqu  xmm3, [rsi]
    movdqu  xmm4, [rsi + 16]
    movdqu  xmm5, [rsi + 32]
    movdqu  xmm6, [rsi + 48]
    pshufb  xmm3, xmm8
    pshufb  xmm4, xmm8
    pshufb  xmm5, xmm8
    pshufb  xmm6, xmm8
    ROUNDS  0, xmm3
    ROUNDS  1, xmm4
    ROUNDS  2, xmm5
    ROUNDS  3, xmm6
    .irp    number, 4, 8, 12
    SCHEDULE xmm3, xmm4, xmm5, xmm6
    ROUNDS  \number, xmm3
    SCHEDULE xmm4, xmm5, xmm6, xmm3
    ROUNDS  (\number + 1), xmm4
    SCHEDULE xmm5, xmm6, xmm3, xmm4
    ROUNDS  (\number + 2), xmm5
    SCHEDULE xmm6, xmm3, xmm4, xmm5
    ROUNDS  (\number + 3), xmm6
    .endr
    paddd   xmm1, xmm9
    paddd   xmm2, xmm10
    add     rsi, 64
    dec     rcx
    jnz     .Lnext_block
    pshufd  xmm1, xmm1, 0x1b
    pshufd  xmm2, xmm2, 0xb1
    movdqa  xmm7, xmm1
    pblendw xmm1, xmm2, 0xf0
    palignr xmm2, xmm7, 8
    movdqu  [rbx + STATE], xmm1
    movdqu  [rbx + STATE + 16], xmm2
.Ldone:
    ret

# The same with integers. The eight working variables are registers that change places.
    .macro  ROUND a:req, b:req, c:req, d:req, e:req, f:req, g:req, h:req, number:req
    mov     eax, \e
    mov     edx, \e
    mov     ecx, \e
    ror     eax, 6
    ror     edx, 11
    ror     ecx, 25
    xor     eax, edx
    xor     eax, ecx
    mov     edx, \f
    xor     edx, \g
    and     edx, \e
    xor     edx, \g
    add     eax, edx
    add     eax, \h
    add     eax, [rdi + 4 * rbp + 4 * \number]
    lea     rcx, [rip + constants]
    add     eax, [rcx + 4 * rbp + 4 * \number]
    add     \d, eax
    mov     \h, eax
    mov     eax, \a
    mov     edx, \a
    mov     ecx, \a
    ror     eax, 2
    ror     edx, 13
    ror     ecx, 22
    xor     eax, edx
    xor     eax, ecx
    add     \h, eax
    mov     eax, \a
    mov     edx, \a
    or      eax, \b
    and     edx, \b
    and     eax, \c
    or      eax, edx
    add     \h, eax
    .endm

plain_blocks:
    push    rbp
    push    r8
    push    r9
    push    r10
    push    r12
    push    r13
    push    r14
    push    r15
    push    rcx
.Lnext_plain_block:
    cmp     qword ptr [rsp], 0
    je      .Lplain_done
    dec     qword ptr [rsp]
    lea     rdi, [rbx + WORDS]
    xor     ebp, ebp
.Lload_word:
    mov     eax, [rsi + 4 * rbp]
    bswap   eax
    mov     [rdi + 4 * rbp], eax
    inc     ebp
    cmp     ebp, 16
    jb      .Lload_word
    add     rsi, 64
    push    rsi
.Lmake_word:
    mov     eax, [rdi + 4 * rbp - 60]
    mov     ecx, eax
    mov     edx, eax
    ror     eax, 7
    ror     ecx, 18
    shr     edx, 3
    xor     eax, ecx
    xor     eax, edx
    mov     ecx, [rdi + 4 * rbp - 8]
    mov     edx, ecx
    mov     esi, ecx
    ror     ecx, 17
    ror     edx, 19
    shr     esi, 10
    xor     ecx, edx
    xor     ecx, esi
    add     eax, ecx
    add     eax, [rdi + 4 * rbp - 64]
    add     eax, [rdi + 4 * rbp - 28]
    mov     [rdi + 4 * rbp], eax
    inc     ebp
    cmp     ebp, 64
    jb      .Lmake_word
    mov     esi, [rbx + STATE]
    mov     r8d, [rbx + STATE + 4]
    mov     r9d, [rbx + STATE + 8]
    mov     r10d, [rbx + STATE + 12]
    mov     r12d, [rbx + STATE + 16]
    mov     r13d, [rbx + STATE + 20]
    mov     r14d, [rbx + STATE + 24]
    mov     r15d, [rbx + STATE + 28]
    xor     ebp, ebp
.Leight_rounds:
    ROUND   esi, r8d, r9d, r10d, r12d, r13d, r14d, r15d, 0
    ROUND   r15d, esi, r8d, r9d, r10d, r12d, r13d, r14d, 1
    ROUND   r14d, r15d, esi, r8d, r9d, r10d, r12d, r13d, 2
    ROUND   r13d, r14d, r15d, esi, r8d, r9d, r10d, r12d, 3
    ROUND   r12d, r13d, r14d, r15d, esi, r8d, r9d, r10d, 4
    ROUND   r10d, r12d, r13d, r14d, r15d, esi, r8d, r9d, 5
    ROUND   r9d, r10d, r12d, r13d, r14d, r15d, esi, r8d, 6
    ROUND   r8d, r9d, r10d, r12d, r13d, r14d, r15d, esi, 7
    add     ebp, 8
    cmp     ebp, 64
    jb      .Leight_rounds
    add     [rbx + STATE], esi
    add     [rbx + STATE + 4], r8d
    add     [rbx + STATE + 8], r9d
    add     [rbx + STATE + 12], r10d
    add     [rbx + STATE + 16], r12d
    add     [rbx + STATE + 20], r13d
    add     [rbx + STATE + 24], r14d
    add     [rbx + STATE + 28], r15d
    pop     rsi
    jmp     .Lnext_plain_block
.Lplain_done:
    pop     rcx
    pop     r15
    pop     r14
    pop     r13
    pop     r12
    pop     r10
    pop     r9
    pop     r8
    pop     rbp
    ret

# The same bytes for whoever runs it: constants of FIPS 180-4, 4.2.2 and 5.3.3.
    .section .rodata
    .balign 16
constants:
    .long 0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5
    .long 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174
    .long 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da
    .long 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967
    .long 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85
    .long 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070
    .long 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3
    .long 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2
initial:
    .long 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19
    .balign 16
swap_bytes:
    .byte 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12
