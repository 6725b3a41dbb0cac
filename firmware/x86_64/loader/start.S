# The loader of a strict guest: it fills private memory from inside, where no host program can.
#
# Entered in shared memory with rdi = the header there, in 64-bit mode, interrupts off. Stage one
# copies loader, header and page tables into private memory and goes on there, so that nobody can
# change them afterwards. (With HEADER_CR3 = 0 the code stays: for hosts whose KVM has to read the
# instructions. Header, stack and hashes are private all the same.)
#
# Each part: ask for a chunk, copy it from the window, hash *the private copy*, compare with the
# header's digest once all of the part is there. What the window holds later is of no account.
.include "loader.inc"

    .section .text.entry, "ax"
    .globl loader_entry
loader_entry:
    cld
    mov     rbx, rdi
    mov     r12, [rbx + HEADER_SHARED]
    mov     r13, [rbx + HEADER_PRIVATE]
    mov     rsi, [rbx + HEADER_AREA]
    lea     rdi, [rsi + r13]
    add     rsi, r12
    mov     rcx, [rbx + HEADER_COPY_SIZE]
    rep movsb
    sub     rbx, r12
    add     rbx, r13
    mov     rsp, rbx                    # the scratch page ends where the header begins
    lea     rdi, [rbx - SCRATCH_SIZE]
    mov     ecx, VARIABLES_SIZE
    xor     eax, eax
    rep stosb
    mov     rax, [rbx + HEADER_CR3]
    test    rax, rax
    jz      .Lstage_two
    mov     cr3, rax                    # loader, stack and tables are private from here on
    lea     rax, [rip + .Lstage_two]
    sub     rax, r12
    add     rax, r13
    jmp     rax

.Lstage_two:
    mov     edi, FAILED_HEADER
    movabs  rax, HEADER_MAGIC
    cmp     rax, [rbx]
    jne     failed
    call    look_for_sha
    lea     r14, [rbx + HEADER_SIZE]
    xor     r15d, r15d
.Lnext_part:
    cmp     r15, [rbx + HEADER_PARTS]
    jae     .Lloaded
    call    load_part
    lea     edi, [r15 + 1]
    call    compare_digest
    jne     failed
    add     r14, PART_SIZE
    inc     r15
    jmp     .Lnext_part

.Lloaded:
    # Nothing of the window is left behind; then the area is private, like all memory around it.
    mov     rdi, [rbx + HEADER_WINDOW]
    add     rdi, r12
    mov     rcx, [rbx + HEADER_CHUNK]
    xor     eax, eax
    rep stosb
    mov     edx, [rbx + HEADER_DOORBELL_PORT]
    mov     eax, [rbx + HEADER_BACK_FRAME]
    out     dx, eax
    add     edx, BELL_PAGES - BELL_FIRST_FRAME
    mov     eax, [rbx + HEADER_BACK_PAGES]
    out     dx, eax
    add     edx, BELL_COMMAND - BELL_PAGES
    mov     eax, CMD_UNSHARE
    out     dx, eax
    add     edx, BELL_RESULT - BELL_COMMAND
    in      eax, dx
    mov     edi, FAILED_CONVERSION
    test    eax, eax
    jnz     failed
    mov     edx, [rbx + HEADER_LOADER_PORT]
    add     edx, PORT_DONE
    mov     eax, r15d
    out     dx, eax

    # What comes next gets its two arguments, and zeros; the stack is cleared with the variables.
    mov     rdx, [rbx + HEADER_ENTRY]
    mov     rsi, [rbx + HEADER_ENTRY_RSI]
    mov     r8, [rbx + HEADER_ENTRY_RDI]
    lea     rdi, [rbx - SCRATCH_SIZE]
    mov     ecx, SCRATCH_SIZE + HEADER_SIZE
    xor     eax, eax
    rep stosb
    mov     rdi, r8
    xor     ebx, ebx
    xor     ebp, ebp
    xor     r8d, r8d
    xor     r9d, r9d
    xor     r10d, r10d
    xor     r12d, r12d
    xor     r13d, r13d
    xor     r14d, r14d
    xor     r15d, r15d
    jmp     rdx

# edi = why. There is nothing to return to: say it until somebody listens.
failed:
    mov     edx, [rbx + HEADER_LOADER_PORT]
    add     edx, PORT_FAILED
    mov     eax, edi
.Lfailed_again:
    out     dx, eax
    pause
    jmp     .Lfailed_again

    .text

# Whether SHA-256 can be left to the processor (SHA, and SSSE3 and SSE4.1 to go with it).
look_for_sha:
    test    byte ptr [rbx + HEADER_FLAGS], FLAG_PLAIN_HASH
    jnz     .Lno_sha
    mov     rbp, rbx                    # CPUID writes rbx
    xor     eax, eax
    cpuid
    cmp     eax, 7
    jb      .Lno_leaf
    mov     eax, 1
    cpuid
    and     ecx, 1 << 9 | 1 << 19
    cmp     ecx, 1 << 9 | 1 << 19
    jne     .Lno_leaf
    mov     eax, 7
    xor     ecx, ecx
    cpuid
    mov     eax, ebx
    shr     eax, 29
    and     eax, 1
    mov     [rbp + HAS_SHA], eax
.Lno_leaf:
    mov     rbx, rbp
.Lno_sha:
    ret

# r14 = the part. Leaves its digest in STATE.
load_part:
    call    sha256_begin
    mov     r8, [r14 + PART_ADDRESS]
    add     r8, r13                     # where the next byte goes
    mov     r9, [r14 + PART_BYTES]      # what is still to come
.Lnext_chunk:
    mov     r10, [rbx + HEADER_CHUNK]
    cmp     r10, r9
    cmova   r10, r9
    mov     eax, [rbx + CHUNK_NUMBER]
    inc     dword ptr [rbx + CHUNK_NUMBER]
    mov     edx, [rbx + HEADER_LOADER_PORT]
    out     dx, eax                     # returns when the chunk is there
    mov     rsi, [rbx + HEADER_WINDOW]
    add     rsi, r12
    mov     rdi, r8
    mov     rcx, r10
    rep movsb
    mov     rsi, r8                     # the private copy, and nothing else, is hashed
    mov     rcx, r10
    shr     rcx, 6
    call    sha256_blocks
    add     r8, r10
    sub     r9, r10
    jnz     .Lnext_chunk
    # Only the last chunk can have an end that is no whole block.
    mov     rcx, [r14 + PART_BYTES]
    mov     rsi, r8
    jmp     sha256_end

# The digest in STATE against the one of the part in r14; flags: equal or not.
compare_digest:
    xor     ecx, ecx
    xor     edx, edx
.Lnext_word:
    mov     eax, [rbx + STATE + 4 * rcx]
    bswap   eax
    xor     eax, [r14 + PART_DIGEST + 4 * rcx]
    or      edx, eax
    inc     ecx
    cmp     ecx, 8
    jb      .Lnext_word
    test    edx, edx
    ret
