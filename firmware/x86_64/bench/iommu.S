# What the disk may reach of a guest with private memory: pages shared by the doorbell, or mapped
# for it in a virtual IOMMU (virtio 1.3, 5.13), by IO virtual addresses that are physical ones.
#
# Requests go onto the IOMMU's queue one by one; a kick has the device carry out all that wait.
.include "bench.inc"

.equ T_ATTACH,          1
.equ T_DETACH,          2
.equ T_MAP,             3
.equ T_UNMAP,           4
.equ MAP_READ,          1
.equ MAP_WRITE,         2
.equ DOMAIN,            1

.equ IOMMU_STRIDE,      64                  # head and fields, and from IOMMU_STATUS on the tail
.equ IOMMU_STATUS,      48
.equ IOMMU_SLOTS,       QUEUE_ENTRIES / 2   # a request takes two descriptors

    .text

# edi = first page's GPA, esi = pages: shared from now on.
share:
    mov     r8d, [rip + doorbell_port]
    test    r8d, r8d
    jz      .Lnot_private
    mov     edx, r8d
    mov     eax, edi
    shr     eax, 12
    out     dx, eax
    lea     edx, [r8 + BELL_PAGES]
    mov     eax, esi
    out     dx, eax
    lea     edx, [r8 + BELL_COMMAND]
    mov     eax, CMD_SHARE
    out     dx, eax
    lea     edx, [r8 + BELL_RESULT]
    in      eax, dx
    test    eax, eax
    jnz     .Lnot_shared
    ret
.Lnot_private:
    FAIL    "a test for private memory, of which there is none"
.Lnot_shared:
    FAIL    "a page that cannot be shared"

# eax = how often a page is shared and unshared: rax = how many ticks that took. The doorbell keeps
# what it was told of the page, so that each is one exit; whether all went well is asked at the end.
# The side that is given up has a page in it, so that there is one to discard.
    .globl convert_often
convert_often:
    push    rbx
    push    rbp
    push    r12
    mov     ebx, eax
    mov     edi, CONVERTED
    mov     esi, 1
    call    share
    mov     r12, [rip + c_bit_mask]
    add     r12, CONVERTED
    mov     eax, CMD_UNSHARE                # as it was; that isn't timed
    call    ring
    xor     ebp, ebp
.Lconvert:
    mov     [r12], ebx                      # the private side
    mov     eax, CMD_SHARE
    call    ring
    mov     [CONVERTED], ebx
    mov     eax, CMD_UNSHARE
    call    ring
    dec     ebx
    jnz     .Lconvert
    mov     edx, [rip + doorbell_port]
    add     edx, BELL_RESULT
    in      eax, dx
    test    eax, eax
    jnz     .Lnot_shared
    mov     rax, rbp
    pop     r12
    pop     rbp
    pop     rbx
    ret

# eax = command; its ticks are added to rbp.
ring:
    mov     r9d, eax
    call    ticks
    sub     rbp, rax
    mov     edx, [rip + doorbell_port]
    add     edx, BELL_COMMAND
    mov     eax, r9d
    out     dx, eax
    call    ticks
    add     rbp, rax
    ret

# eax = how often a page is mapped for the disk and unmapped: rax = how many ticks that took.
    .globl map_often
map_often:
    push    rbx
    push    rbp
    mov     ebx, eax
    call    ticks
    mov     rbp, rax
.Lmap:
    mov     esi, BUFFERS
    mov     edx, 0x1000
    call    iommu_map
    call    iommu_kick
    mov     esi, BUFFERS
    mov     edx, 0x1000
    call    iommu_unmap
    call    iommu_kick
    dec     ebx
    jnz     .Lmap
    call    ticks
    sub     rax, rbp
    pop     rbp
    pop     rbx
    ret

# What the test's way needs before the disk is brought up: pages that are shared, or the IOMMU.
    .globl open_way
open_way:
    mov     eax, [rip + test_mode]
    cmp     eax, MODE_BOUNCED
    jb      .Lopen
    ja      start_iommu
    mov     edi, QUEUE
    mov     esi, QUEUE_PAGES
    call    share
    mov     edi, BUFFERS
    mov     esi, MAX_BUFFERS >> 12          # all of the bounce buffer, as Linux does
    jmp     share
.Lopen:
    ret

start_iommu:
    mov     edi, IOMMU_QUEUE
    mov     esi, IOMMU_QUEUE_PAGES
    call    share
    lea     rdi, [rip + iommu_needs]
    call    find_device
    lea     rdi, [rip + iommu_needs]
    call    start_device
    mov     rax, [rip + notify_place]
    mov     [rip + iommu_notify_place], rax
    mov     dword ptr [rip + pushed], 0
    mov     dword ptr [rip + waiting], 0
    # Of the descriptors only the first one's length changes from request to request.
    xor     ecx, ecx
    mov     edi, IOMMU_DESCRIPTORS
    mov     esi, IOMMU_REQUESTS
.Lslot:
    mov     [rdi], rsi
    mov     word ptr [rdi + 12], 1          # NEXT
    lea     eax, [rcx * 2 + 1]
    mov     [rdi + 14], ax
    lea     eax, [rsi + IOMMU_STATUS]
    mov     [rdi + 16], rax
    mov     dword ptr [rdi + 16 + 8], 4
    mov     dword ptr [rdi + 16 + 12], 2    # WRITE
    add     edi, 32
    add     esi, IOMMU_STRIDE
    inc     ecx
    cmp     ecx, IOMMU_SLOTS
    jb      .Lslot
    ret

# The disk that was found last gets a domain, in which its queue is mapped.
    .globl attach_disk
attach_disk:
    cmp     dword ptr [rip + test_mode], MODE_BOUNCED
    jbe     .Lopen
    mov     edi, T_ATTACH
    call    for_endpoint
    mov     edi, T_MAP
    mov     esi, QUEUE
    mov     edx, QUEUE_PAGES << 12
    mov     r9d, MAP_READ | MAP_WRITE
    call    push_range
    jmp     iommu_kick

# Its domain ends, and with it all that is mapped in it.
    .globl detach_disk
detach_disk:
    mov     edi, T_DETACH
    call    for_endpoint
    call    iommu_kick
    dec     qword ptr [rip + kicks]         # no part of the test
    ret

# A pool that stays mapped, in tests that have one.
    .globl map_pool
map_pool:
    cmp     dword ptr [rip + test_mode], MODE_PREMAPPED
    jne     .Lopen
    mov     eax, [rip + test_size]
    mul     dword ptr [rip + test_depth]
    mov     esi, BUFFERS
    mov     edx, eax
    call    iommu_map
    jmp     iommu_kick

# esi = address, edx = bytes: a MAP in the direction of the test onto the queue.
    .globl iommu_map
iommu_map:
    inc     qword ptr [rip + maps]
    mov     edi, T_MAP
    mov     r9d, MAP_WRITE
    cmp     dword ptr [rip + test_type], 0
    je      push_range
    mov     r9d, MAP_READ
    jmp     push_range

# The same of an UNMAP.
    .globl iommu_unmap
iommu_unmap:
    inc     qword ptr [rip + unmaps]
    mov     edi, T_UNMAP
    # falls through

# edi = MAP or UNMAP, esi = address, edx = bytes, r9d = a MAP's flags.
push_range:
    call    next_slot                       # r8
    mov     [r8], edi
    mov     dword ptr [r8 + 4], DOMAIN
    mov     [r8 + 8], rsi
    lea     eax, [rsi + rdx - 1]
    mov     [r8 + 16], rax
    mov     ecx, 28
    mov     dword ptr [r8 + 24], 0          # reserved in an UNMAP
    cmp     edi, T_MAP
    jne     push_request
    mov     ecx, 36
    mov     [r8 + 24], rsi                  # the physical address
    mov     [r8 + 32], r9d
    jmp     push_request

# edi = ATTACH or DETACH.
for_endpoint:
    call    next_slot
    mov     [r8], edi
    mov     dword ptr [r8 + 4], DOMAIN
    mov     eax, [rip + function]           # 0x80000000 and bus, device and function from bit 8
    shr     eax, 8
    and     eax, 0xffff
    mov     [r8 + 8], eax
    mov     qword ptr [r8 + 12], 0          # no flags
    mov     ecx, 20
    # falls through

# r8 = next slot, ecx = bytes that the device reads.
push_request:
    mov     eax, [rip + pushed]
    mov     edx, eax
    and     edx, IOMMU_SLOTS - 1
    shl     edx, 1                          # its first descriptor
    and     eax, QUEUE_ENTRIES - 1
    mov     [IOMMU_AVAILABLE + 4 + rax * 2], dx
    shl     edx, 4
    mov     [IOMMU_DESCRIPTORS + rdx + 8], ecx
    mov     byte ptr [r8 + IOMMU_STATUS], 0xff
    inc     dword ptr [rip + pushed]
    inc     dword ptr [rip + waiting]
    ret

# r8 = where the next request goes; a kick when the queue is full. Keeps rsi, rdx, edi and r9.
next_slot:
    cmp     dword ptr [rip + waiting], IOMMU_SLOTS
    jb      .Lroom
    push    rsi
    push    rdx
    push    rdi
    push    r9
    call    iommu_kick
    pop     r9
    pop     rdi
    pop     rdx
    pop     rsi
.Lroom:
    mov     r8d, [rip + pushed]
    and     r8d, IOMMU_SLOTS - 1
    shl     r8d, 6                          # IOMMU_STRIDE
    add     r8d, IOMMU_REQUESTS
    ret

# Returns when all requests that wait have been carried out.
    .globl iommu_kick
iommu_kick:
    cmp     dword ptr [rip + waiting], 0
    je      .Lall_done
    inc     qword ptr [rip + kicks]
    mov     ecx, [rip + pushed]
    mov     [IOMMU_AVAILABLE + 2], cx
    mfence
    mov     rdx, [rip + iommu_notify_place]
    call    notify
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    movabs  r8, TIMEOUT_TICKS
    add     r8, rax
.Lpoll:
    cmp     [IOMMU_USED + 2], cx
    je      .Lanswered
    pause
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    cmp     rax, r8
    jb      .Lpoll
    FAIL    "an IOMMU that does not answer"
.Lanswered:
    dec     ecx
    mov     edx, ecx
    and     edx, IOMMU_SLOTS - 1
    shl     edx, 6                          # IOMMU_STRIDE
    cmp     byte ptr [IOMMU_REQUESTS + IOMMU_STATUS + rdx], 0
    jne     .Lrefused
    dec     dword ptr [rip + waiting]
    jnz     .Lanswered
.Lall_done:
    ret
.Lrefused:
    FAIL    "a request that the IOMMU refuses"

    .bss
    .balign 8
iommu_notify_place: .skip 8
pushed:         .skip 4                     # requests since the IOMMU was started
waiting:        .skip 4                     # those that it has not been told of
