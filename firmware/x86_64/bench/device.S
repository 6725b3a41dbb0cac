# Finds modern virtio functions on PCI bus 0, their structures in I/O or memory BARs, and brings
# them up with one queue (virtio 1.2, 3.1.1, 4.1.4).
.include "bench.inc"

.equ PCI_ADDRESS_PORT,  0xcf8
.equ PCI_DATA_PORT,     0xcfc
.equ PCI_ID_VIRTIO_BLK, 0x10421af4
.equ PCI_ID_VIRTIO_IOMMU, 0x10571af4
.equ PCI_COMMAND,       0x04
.equ PCI_BARS,          0x10
.equ PCI_CAPABILITIES,  0x34
.equ COMMAND_ALL_NO_INTX, 0x0407            # I/O, memory, bus master; completion is polled
.equ SPARE_PORTS,       0xc000              # where BARs go that nobody has placed
.equ DEVICE_MEMORY,     0xe0000000          # where memory BARs go, 1 MiB each

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

.equ DISK_FEATURES,     1 << 29 | 1 << 9    # EVENT_IDX, FLUSH
.equ IOMMU_FEATURES,    7                   # INPUT_RANGE, DOMAIN_RANGE, MAP_UNMAP
.equ FEATURES_HIGH,     3                   # VERSION_1, ACCESS_PLATFORM

    .section .rodata
    .globl disk_needs, iommu_needs
disk_needs:
    .long   PCI_ID_VIRTIO_BLK, DISK_FEATURES, DESCRIPTORS, AVAILABLE, USED
iommu_needs:
    .long   PCI_ID_VIRTIO_IOMMU, IOMMU_FEATURES, IOMMU_DESCRIPTORS, IOMMU_AVAILABLE, IOMMU_USED

    .text

# edi = register: its 32 bits in eax.
config_read:
    mov     eax, [rip + function]
    or      eax, edi
    and     eax, -4
    mov     edx, PCI_ADDRESS_PORT
    out     dx, eax
    mov     edx, PCI_DATA_PORT
    in      eax, dx
    ret

# edi = register, esi = value.
config_write:
    mov     eax, [rip + function]
    or      eax, edi
    mov     edx, PCI_ADDRESS_PORT
    out     dx, eax
    mov     edx, PCI_DATA_PORT
    mov     eax, esi
    out     dx, eax
    ret

# rdi = what is needed: the first such function is the one that start_device brings up.
    .globl find_device
find_device:
    push    rbx
    push    rbp
    mov     rbx, rdi
    lea     rdi, [rip + places]
    mov     ecx, 5
    xor     eax, eax
    cld
    rep stosq
    mov     dword ptr [rip + function], 0x80000000
.Lnext_function:
    xor     edi, edi
    call    config_read
    cmp     eax, [rbx + NEEDS_ID]
    je      .Lfound
    add     dword ptr [rip + function], 0x800
    cmp     dword ptr [rip + function], 0x80010000
    jb      .Lnext_function
    cmp     dword ptr [rbx + NEEDS_ID], PCI_ID_VIRTIO_IOMMU
    je      .Lno_iommu
    FAIL    "no modern virtio-blk function on PCI bus 0"
.Lno_iommu:
    FAIL    "no virtio-iommu function on PCI bus 0"
.Lfound:
    mov     edi, PCI_CAPABILITIES
    call    config_read
    movzx   ebx, al
    mov     ebp, 48
.Lnext_capability:
    and     ebx, 0xfc
    jz      .Lcapabilities_end
    dec     ebp
    js      .Lcapabilities_end
    mov     edi, ebx
    call    config_read                     # id, next, length, type
    mov     r8d, eax
    cmp     al, 9                           # vendor-specific
    jne     .Lcapability_done
    mov     r9d, eax
    shr     r9d, 24
    cmp     r9d, 4                          # 1 common, 2 notify, 3 ISR, 4 device
    ja      .Lcapability_done
    lea     edi, [rbx + 4]
    call    config_read
    movzx   edi, al
    call    bar_address                     # rax, with bit 0 set for ports
    mov     r10, rax
    lea     edi, [rbx + 8]
    call    config_read                     # offset
    add     r10, rax
    cmp     r9d, 2
    jne     .Lplace_known
    test    dword ptr [rip + places + 2 * 8], 1
    jnz     .Lcapability_done               # notifications by port, where there is a choice
    lea     edi, [rbx + 16]
    call    config_read
    mov     [rip + notify_multiplier], eax
.Lplace_known:
    lea     rdx, [rip + places]
    mov     [rdx + r9 * 8], r10
.Lcapability_done:
    mov     ebx, r8d
    shr     ebx, 8
    jmp     .Lnext_capability
.Lcapabilities_end:
    cmp     qword ptr [rip + places + 1 * 8], 0
    je      .Lincomplete
    cmp     qword ptr [rip + places + 2 * 8], 0
    je      .Lincomplete
    cmp     qword ptr [rip + places + 4 * 8], 0
    je      .Lincomplete
    mov     edi, PCI_COMMAND
    mov     esi, COMMAND_ALL_NO_INTX        # the status half is write-one-to-clear
    call    config_write
    pop     rbp
    pop     rbx
    ret
.Lincomplete:
    FAIL    "a virtio structure is missing"

# edi = number of a BAR: where it is, in rax; bit 0 says that it has ports. Memory BARs are placed
# where the page tables reach, whatever the firmware thought of it.
bar_address:
    lea     r11d, [rdi * 4 + PCI_BARS]
    mov     ecx, edi
    mov     edi, r11d
    call    config_read
    test    al, 1
    jz      .Lmemory
    and     eax, 0xfffd                     # bit 1 is reserved
    cmp     eax, 1
    jne     .Lplaced
    mov     esi, SPARE_PORTS
    mov     edi, r11d
    call    config_write
    mov     eax, SPARE_PORTS | 1
.Lplaced:
    ret
.Lmemory:
    shl     ecx, 20
    lea     esi, [rcx + DEVICE_MEMORY]
    test    al, 4                           # 64 bits wide
    mov     edi, r11d
    jz      .Llow_half
    push    rsi
    add     edi, 4
    xor     esi, esi
    call    config_write
    pop     rsi
    mov     edi, r11d
.Llow_half:
    push    rsi
    call    config_write
    pop     rax
    ret

# Accesses to the common configuration: edi = offset, eax = value.
.macro ACCESSORS name, part
write\name:
    mov     rdx, [rip + places + 1 * 8]
    test    edx, 1
    jz      1f
    lea     edx, [rdx + rdi - 1]
    out     dx, \part
    ret
1:  mov     [rdx + rdi], \part
    ret
read\name:
    mov     rdx, [rip + places + 1 * 8]
    xor     eax, eax
    test    edx, 1
    jz      1f
    lea     edx, [rdx + rdi - 1]
    in      \part, dx
    ret
1:  mov     \part, [rdx + rdi]
    ret
.endm
    ACCESSORS 8, al
    ACCESSORS 16, ax
    ACCESSORS 32, eax

# edi = offset of a 64-bit register, eax = address below 4 GiB.
write_address:
    call    write32
    add     edi, 4
    xor     eax, eax
    jmp     write32

# edi = offset into the device configuration: 32 bits in eax.
config32:
    mov     rdx, [rip + places + 4 * 8]
    test    edx, 1
    jz      1f
    lea     edx, [rdx + rdi - 1]
    in      eax, dx
    ret
1:  mov     eax, [rdx + rdi]
    ret

.macro SET width, register, value
    mov     edi, \register
    mov     eax, \value
    call    write\width
.endm

# r8d = features wanted of word ecx: those offered are accepted, and returned in eax.
accept_features:
    push    rcx
    mov     edi, DEVICE_FEATURE_SELECT
    mov     eax, ecx
    call    write32
    mov     edi, DEVICE_FEATURE
    call    read32
    and     r8d, eax
    mov     edi, DRIVER_FEATURE_SELECT
    pop     rax
    call    write32
    mov     edi, DRIVER_FEATURE
    mov     eax, r8d
    jmp     write32

# The function that was found last: it forgets its queues.
    .globl reset_device
reset_device:
    SET     8, DEVICE_STATUS, 0
.Lwait_for_reset:
    mov     edi, DEVICE_STATUS
    call    read8
    test    al, al
    jnz     .Lwait_for_reset
    ret

# rdi = what is needed of the function that was found last.
    .globl start_device
start_device:
    push    rbx
    mov     rbx, rdi
    call    reset_device
    SET     8, DEVICE_STATUS, 3             # ACKNOWLEDGE, DRIVER
    xor     ecx, ecx
    mov     r8d, [rbx + NEEDS_FEATURES]
    call    accept_features
    mov     [rip + features], r8d
    mov     ecx, 1
    mov     r8d, FEATURES_HIGH
    call    accept_features
    SET     8, DEVICE_STATUS, 0x0b          # and FEATURES_OK
    mov     edi, DEVICE_STATUS
    call    read8
    test    al, 8
    jz      .Lrefused
    SET     16, QUEUE_SELECT, 0
    mov     edi, QUEUE_SIZE
    call    read16
    cmp     eax, QUEUE_ENTRIES
    jb      .Lrefused
    SET     16, QUEUE_SIZE, QUEUE_ENTRIES
    mov     edi, QUEUE_DESC
    mov     eax, [rbx + NEEDS_DESCRIPTORS]
    call    write_address
    mov     edi, QUEUE_DRIVER
    mov     eax, [rbx + NEEDS_AVAILABLE]
    call    write_address
    mov     edi, QUEUE_DEVICE
    mov     eax, [rbx + NEEDS_USED]
    call    write_address
    mov     edi, QUEUE_NOTIFY_OFF
    call    read16
    mul     dword ptr [rip + notify_multiplier]
    add     rax, [rip + places + 2 * 8]
    mov     [rip + notify_place], rax
    mov     edi, [rbx + NEEDS_AVAILABLE]
    mov     dword ptr [rdi], 1              # no interrupt, please; index 0
    mov     word ptr [rdi + 4 + 2 * QUEUE_ENTRIES], 0x8000 # with event indexes: far away
    mov     edi, [rbx + NEEDS_USED]
    mov     dword ptr [rdi], 0
    mov     word ptr [rdi + 4 + 8 * QUEUE_ENTRIES], 0 # with event indexes: tell it of the first
    SET     16, QUEUE_ENABLE, 1
    SET     8, DEVICE_STATUS, 0x0f          # and DRIVER_OK
    pop     rbx
    ret
.Lrefused:
    FAIL    "the device does not want this driver"

# Of the disk that was found last.
    .globl read_capacity
read_capacity:
    xor     edi, edi
    call    config32
    mov     r8d, eax
    mov     edi, 4
    call    config32
    shl     rax, 32
    or      rax, r8
    mov     [rip + capacity], rax
    ret

# rdx = where a device is notified (an odd number: behind a port): of its queue 0.
    .globl notify
notify:
    xor     eax, eax
    test    edx, 1
    jz      1f
    dec     edx
    out     dx, ax
    ret
1:  mov     [rdx], ax
    ret

    .bss
    .balign 8
    .globl capacity, notify_place, features, function
places:         .skip 5 * 8
notify_place:   .skip 8
capacity:       .skip 8                     # in sectors
function:       .skip 4
notify_multiplier: .skip 4
features:       .skip 4
