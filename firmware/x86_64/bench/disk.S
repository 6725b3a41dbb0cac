# Keeps `depth` requests in the queue until `count` have been completed. Completions are polled, so
# that the host's side is what is measured; the driver notifies as rarely as the device lets it.
.include "bench.inc"

# Of the available ring; the used ring has the same layout.
.equ RING_INDEX,        2
.equ RING_ENTRIES,      4
.equ AVAILABLE_EVENT,   USED + 4 + 8 * QUEUE_ENTRIES
.equ USED_EVENT,        AVAILABLE + 4 + 2 * QUEUE_ENTRIES

    .text

# Returns in rax how many ticks the test took.
    .globl disk_test
disk_test:
    push    rbx
    push    rbp
    push    r12
    push    r13
    push    r14
    push    r15
    call    clear_counts
    mov     ecx, [rip + test_size]
    shr     ecx, 9
    mov     [rip + sectors], ecx
    mov     rax, [rip + capacity]
    xor     edx, edx
    div     rcx
    mov     [rip + places_on_disk], rax
    test    rax, rax
    jnz     .Lfits
    FAIL    "the disk is smaller than one request"
.Lfits:
    mov     qword ptr [rip + next_place], 0
    call    lay_out
    movabs  rax, 0x9e3779b97f4a7c15
    mov     [rip + random_state], rax
    call    ticks
    mov     [rip + started], rax

    # r12w = available index, r13w = used index seen, r14d = to submit, r15d = to complete,
    # ebp = index at the last notification's check
    movzx   r12d, word ptr [AVAILABLE + RING_INDEX]
    movzx   r13d, word ptr [USED + RING_INDEX]
    mov     r14d, [rip + test_count]
    mov     r15d, r14d
    xor     ebx, ebx
.Lfill:
    call    submit                          # ebx = slot
    inc     ebx
    cmp     ebx, [rip + test_depth]
    jb      .Lfill
    call    publish

.Lwait:
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    mov     r9, rax
    movabs  r8, TIMEOUT_TICKS
    add     r8, rax
.Lpoll:
    cmp     [USED + RING_INDEX], r13w
    jne     .Larrived
    pause
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    cmp     rax, r8
    jb      .Lpoll
    FAIL    "a request that does not come back"
.Larrived:
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    sub     rax, r9
    add     [rip + idle_ticks], rax
.Lcompleted:
    movzx   eax, r13w
    and     eax, QUEUE_ENTRIES - 1
    mov     eax, [USED + RING_ENTRIES + rax * 8]
    xor     edx, edx
    mov     ecx, 3
    div     ecx
    mov     ebx, eax
    test    edx, edx
    jnz     .Lwrong
    cmp     ebx, [rip + test_depth]
    jae     .Lwrong
    mov     eax, ebx
    shl     eax, 6
    cmp     byte ptr [REQUESTS + REQUEST_STATUS + rax], 0
    jne     .Lwrong
    call    after_request
    inc     r13d
    dec     r15d
    test    r14d, r14d
    jz      .Lnothing_left
    call    submit
.Lnothing_left:
    cmp     [USED + RING_INDEX], r13w
    jne     .Lcompleted
    call    publish
    test    r15d, r15d
    jnz     .Lwait

    call    iommu_kick                      # what is mapped still, if anything
    call    ticks
    sub     rax, [rip + started]
    pop     r15
    pop     r14
    pop     r13
    pop     r12
    pop     rbp
    pop     rbx
    ret
.Lwrong:
    FAIL    "a request that failed"

# Descriptors and headers of all slots: what doesn't change from request to request.
lay_out:
    xor     ebx, ebx
.Lslot:
    mov     eax, ebx
    shl     eax, 6                          # REQUEST_STRIDE
    lea     esi, [rax + REQUESTS]
    mov     eax, [rip + test_type]
    mov     [rsi + REQUEST_TYPE], eax
    mov     dword ptr [rsi + REQUEST_TYPE + 4], 0
    imul    edi, ebx, 3 * 16
    add     edi, DESCRIPTORS
    imul    ecx, ebx, 3
    inc     ecx
    mov     [rdi], rsi                      # the header
    mov     dword ptr [rdi + 8], 16
    mov     word ptr [rdi + 12], 1          # NEXT
    mov     [rdi + 14], cx
    inc     ecx
    mov     eax, [rip + test_size]
    mov     [rdi + 16 + 8], eax             # the data
    mul     ebx
    add     eax, BUFFERS
    mov     [rdi + 16], rax
    mov     eax, 3                          # NEXT, WRITE
    cmp     dword ptr [rip + test_type], 0
    je      .Lflags_known
    mov     eax, 1
.Lflags_known:
    mov     [rdi + 16 + 12], ax
    mov     [rdi + 16 + 14], cx
    lea     eax, [rsi + REQUEST_STATUS]
    mov     [rdi + 32], rax                 # the status byte
    mov     dword ptr [rdi + 32 + 8], 1
    mov     dword ptr [rdi + 32 + 12], 2    # WRITE
    inc     ebx
    cmp     ebx, [rip + test_depth]
    jb      .Lslot
    mov     ebp, [AVAILABLE + RING_INDEX]
    ret

# ebx = slot: its next request goes into the ring, unseen by the device until `publish`.
submit:
    cmp     dword ptr [rip + test_random], 0
    je      .Lsequential
    mov     rax, [rip + random_state]       # xorshift64
    mov     rdx, rax
    shl     rdx, 13
    xor     rax, rdx
    mov     rdx, rax
    shr     rdx, 7
    xor     rax, rdx
    mov     rdx, rax
    shl     rdx, 17
    xor     rax, rdx
    mov     [rip + random_state], rax
    mul     qword ptr [rip + places_on_disk]
    mov     rax, rdx
    jmp     .Lplace_known
.Lsequential:
    mov     rax, [rip + next_place]
    lea     rdx, [rax + 1]
    cmp     rdx, [rip + places_on_disk]
    jb      .Lno_wrap
    xor     edx, edx
.Lno_wrap:
    mov     [rip + next_place], rdx
.Lplace_known:
    mov     ecx, [rip + sectors]
    mul     rcx
    mov     ecx, ebx
    shl     ecx, 6
    mov     [REQUESTS + REQUEST_SECTOR + rcx], rax
    mov     byte ptr [REQUESTS + REQUEST_STATUS + rcx], 0xff
    call    before_request
    movzx   eax, r12w
    and     eax, QUEUE_ENTRIES - 1
    imul    ecx, ebx, 3
    mov     [AVAILABLE + RING_ENTRIES + rax * 2], cx
    inc     r12d
    dec     r14d
    ret

# Shows the device what has been submitted, and tells it where it wants to be told (2.7.10, 2.7.13).
publish:
    cmp     dword ptr [rip + test_mode], MODE_GROUPED
    jne     .Lno_group
    call    iommu_kick
.Lno_group:
    cmp     r12w, bp
    je      .Lnothing_new
    mov     [AVAILABLE + RING_INDEX], r12w
    mfence
    test    dword ptr [rip + features], 1 << 29
    jz      .Lby_flag
    movzx   eax, r12w
    mov     ecx, eax
    sub     ax, [AVAILABLE_EVENT]
    dec     eax
    sub     cx, bp
    cmp     ax, cx
    jae     .Lquiet
    jmp     .Lnotify
.Lby_flag:
    test    word ptr [USED], 1              # NO_NOTIFY
    jnz     .Lquiet
.Lnotify:
    inc     qword ptr [rip + notifications]
    mov     rdx, [rip + notify_place]
    call    notify
.Lquiet:
    mov     ebp, r12d
    # No interrupts with event indexes either: the one asked for is always half of all indexes away.
    lea     eax, [r13 + 0x8000]
    mov     [USED_EVENT], ax
.Lnothing_new:
    ret

    .bss
    .balign 8
random_state:   .skip 8
places_on_disk: .skip 8
next_place:     .skip 8
started:        .skip 8
sectors:        .skip 4
