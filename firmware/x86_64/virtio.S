# The virtio device: reset, features, queue 0, and one request at a time whose completion is
# polled in the used ring (virtio 1.2, 3.1, 2.7 and 5.2).
.include "defs.inc"
.include "disk.inc"

# Common configuration, offsets of its registers.
.equ DEVICE_FEATURE_SELECT, 0x00
.equ DEVICE_FEATURE,    0x04
.equ DRIVER_FEATURE_SELECT, 0x08
.equ DRIVER_FEATURE,    0x0c
.equ DEVICE_STATUS,     0x14
.equ QUEUE_SELECT,      0x16
.equ QUEUE_SIZE,        0x18
.equ QUEUE_ENABLE,      0x1c
.equ QUEUE_NOTIFY_OFF,  0x1e
.equ QUEUE_DESC,        0x20
.equ QUEUE_DRIVER,      0x28
.equ QUEUE_DEVICE,      0x30

.equ STATUS_ACKNOWLEDGE_DRIVER, 3
.equ STATUS_FEATURES_OK, 0x0b
.equ STATUS_DRIVER_OK,  0x0f
.equ FEATURES_HIGH,     3                   # VERSION_1 (bit 32) and ACCESS_PLATFORM (bit 33)

.equ SEGMENT_BYTES,     49 * 512            # a longer request becomes several data segments
.equ POLL_TICKS,        1 << 34             # 6 s of a 3 GHz clock

    .text

# edi = offset in the common configuration, eax = value; 8, 16 or 32 bits.
common_write8:
    mov     edx, [rip + common_port]
    add     edx, edi
    out     dx, al
    ret
common_write16:
    mov     edx, [rip + common_port]
    add     edx, edi
    out     dx, ax
    ret
common_write32:
    mov     edx, [rip + common_port]
    add     edx, edi
    out     dx, eax
    ret

# edi = offset in the common configuration; value in eax.
common_read8:
    mov     edx, [rip + common_port]
    add     edx, edi
    xor     eax, eax
    in      al, dx
    ret
common_read16:
    mov     edx, [rip + common_port]
    add     edx, edi
    xor     eax, eax
    in      ax, dx
    ret
common_read32:
    mov     edx, [rip + common_port]
    add     edx, edi
    in      eax, dx
    ret

# rax = GPA, edi = offset of a 64-bit register, written as two halves.
common_write_address:
    call    common_write32
    add     edi, 4
    shr     rax, 32
    jmp     common_write32

# Status 0 is the reset; it is complete when it reads back as 0.
    .globl reset_device
reset_device:
    mov     edi, DEVICE_STATUS
    xor     eax, eax
    call    common_write8
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    mov     r8, rax
.Lreset_wait:
    mov     edi, DEVICE_STATUS
    call    common_read8
    test    eax, eax
    jz      .Lreset_done
    mov     esi, eax
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    sub     rax, r8
    movabs  rdx, POLL_TICKS
    cmp     rax, rdx
    jb      .Lreset_wait
    WHAT    "device status after reset"
    xor     edi, edi
    jmp     fail_values
.Lreset_done:
    ret

    .globl negotiate
negotiate:
    STEP    "disk-negotiated"
    call    reset_device
    mov     edi, DEVICE_STATUS
    mov     eax, STATUS_ACKNOWLEDGE_DRIVER
    call    common_write8

    mov     edi, DEVICE_FEATURE_SELECT
    xor     eax, eax
    call    common_write32
    mov     edi, DEVICE_FEATURE
    call    common_read32
    and     eax, FEATURE_RO | FEATURE_FLUSH
    mov     [rip + features_low], eax
    mov     edi, DEVICE_FEATURE_SELECT
    mov     eax, 1
    call    common_write32
    mov     edi, DEVICE_FEATURE
    call    common_read32
    WHAT    "features VERSION_1 and ACCESS_PLATFORM"
    mov     esi, eax
    and     esi, FEATURES_HIGH
    mov     edi, FEATURES_HIGH
    call    expect_equal

    mov     edi, DRIVER_FEATURE_SELECT
    xor     eax, eax
    call    common_write32
    mov     edi, DRIVER_FEATURE
    mov     eax, [rip + features_low]
    call    common_write32
    mov     edi, DRIVER_FEATURE_SELECT
    mov     eax, 1
    call    common_write32
    mov     edi, DRIVER_FEATURE
    mov     eax, FEATURES_HIGH
    call    common_write32
    mov     edi, DEVICE_STATUS
    mov     eax, STATUS_FEATURES_OK
    call    common_write8
    WHAT    "device status with FEATURES_OK"
    mov     edi, DEVICE_STATUS
    call    common_read8
    mov     esi, eax
    mov     edi, STATUS_FEATURES_OK
    call    expect_equal

    mov     edi, QUEUE_SELECT
    xor     eax, eax
    call    common_write16
    WHAT    "size of queue 0, at least"
    mov     edi, QUEUE_SIZE
    call    common_read16
    mov     esi, eax
    mov     edi, QUEUE_ENTRIES
    cmp     esi, edi
    jb      fail_values
    mov     edi, QUEUE_SIZE
    mov     eax, QUEUE_ENTRIES
    call    common_write16
    mov     edi, QUEUE_DESC
    mov     eax, DESCRIPTORS
    call    common_write_address
    mov     edi, QUEUE_DRIVER
    mov     eax, AVAILABLE
    call    common_write_address
    mov     edi, QUEUE_DEVICE
    mov     eax, USED
    call    common_write_address
    mov     edi, QUEUE_NOTIFY_OFF
    call    common_read16
    mul     dword ptr [rip + notify_multiplier]
    add     [rip + notify_port], eax
    mov     edi, QUEUE_ENABLE
    mov     eax, 1
    call    common_write16
    mov     edi, DEVICE_STATUS
    mov     eax, STATUS_DRIVER_OK
    call    common_write8
    WHAT    "device status with DRIVER_OK"
    mov     edi, DEVICE_STATUS
    call    common_read8
    mov     esi, eax
    mov     edi, STATUS_DRIVER_OK
    call    expect_equal

    mov     edx, [rip + device_port]        # the capacity in sectors comes first
    in      eax, dx
    mov     r8d, eax
    add     edx, 4
    in      eax, dx
    shl     rax, 32
    or      rax, r8
    mov     [rip + capacity], rax
    WHAT    "capacity in sectors, at least"
    mov     edi, 1
    mov     rsi, rax
    cmp     rsi, rdi
    jb      fail_values
    call    step_ok
    mov     rax, [rip + capacity]
    call    put_decimal
    PRINT   " sectors"
    test    dword ptr [rip + features_low], FEATURE_RO
    jz      .Lwritable
    PRINT   ", read-only"
.Lwritable:
    jmp     end_line

# edi = type, rsi = sector, edx = buffer, ecx = bytes, r8d = the status that must come.
# The queue is empty before and after: a chain always starts at descriptor 0.
    .globl request
request:
    push    rbx
    push    rbp
    push    r8
    push    rdi
    push    rcx
    mov     [HEADER], edi
    mov     dword ptr [HEADER + 4], 0
    mov     [HEADER + 8], rsi
    mov     byte ptr [STATUS_BYTE], 0xff
    mov     r9d, 1                          # flags of data segments: NEXT
    cmp     edi, REQUEST_IN
    jne     .Lflags_known
    or      r9d, 2                          # and WRITE, where the device writes
.Lflags_known:

    mov     rbx, DESCRIPTORS
    mov     ebp, 1                          # number of the next descriptor
    mov     qword ptr [rbx], HEADER
    mov     dword ptr [rbx + 8], 16
    mov     word ptr [rbx + 12], 1
    mov     word ptr [rbx + 14], bp
.Lnext_segment:
    add     rbx, 16
    inc     ebp
    test    ecx, ecx
    jz      .Lsegments_done
    mov     eax, SEGMENT_BYTES
    cmp     eax, ecx
    cmova   eax, ecx
    mov     [rbx], rdx
    mov     [rbx + 8], eax
    mov     [rbx + 12], r9w
    mov     [rbx + 14], bp
    add     edx, eax
    sub     ecx, eax
    jmp     .Lnext_segment
.Lsegments_done:
    mov     qword ptr [rbx], STATUS_BYTE
    mov     dword ptr [rbx + 8], 1
    mov     dword ptr [rbx + 12], 2         # WRITE, and no next

    # x86 keeps stores in order: entry, then index, then the notification.
    movzx   eax, word ptr [AVAILABLE + 2]
    mov     ecx, eax
    and     ecx, QUEUE_ENTRIES - 1
    mov     word ptr [AVAILABLE + 4 + rcx * 2], 0
    inc     eax
    mov     [AVAILABLE + 2], ax
    mov     ebx, eax                        # the used index that ends the request
    mov     ebp, ecx
    mov     edx, [rip + notify_port]
    xor     eax, eax                        # queue 0
    out     dx, ax

    rdtsc
    shl     rdx, 32
    or      rax, rdx
    mov     r8, rax
    movabs  r9, POLL_TICKS
.Lpoll:
    cmp     [USED + 2], bx
    je      .Lcompleted
    pause
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    sub     rax, r8
    cmp     rax, r9
    jb      .Lpoll
    WHAT    "index of the used ring, waited for in vain"
    movzx   edi, bx
    movzx   esi, word ptr [USED + 2]
    mov     edx, USED + 2
    jmp     fail_at

.Lcompleted:
    WHAT    "descriptor in the used ring"
    xor     edi, edi
    mov     esi, [USED + 4 + rbp * 8]
    call    expect_equal
    mov     ebx, [USED + 8 + rbp * 8]       # bytes that the device says it wrote
    pop     rcx
    pop     rax
    pop     rdi
    WHAT     "status byte of the request"
    movzx   esi, byte ptr [STATUS_BYTE]
    call    expect_equal
    test    edi, edi
    jnz     .Lrequest_done                  # how much a failed request wrote is open
    cmp     eax, REQUEST_IN
    je      .Lcount_known
    xor     ecx, ecx
.Lcount_known:
    WHAT    "bytes written by the device, with the status byte"
    lea     edi, [rcx + 1]
    mov     esi, ebx
    call    expect_equal
.Lrequest_done:
    pop     rbp
    pop     rbx
    ret

    .bss
    .balign 8
    .globl capacity, features_low
capacity:       .skip 8
features_low:   .skip 4
