# Finds the virtio-blk function at PCI 0:1.0 and where its registers lie: all in one I/O BAR,
# so that no access needs the host to decode an instruction (virtio 1.2, 4.1.4).
.include "defs.inc"

# Config address of 0:1.0 (configuration mechanism #1).
.equ PCI_ADDRESS_PORT,  0xcf8
.equ PCI_DATA_PORT,     0xcfc
.equ PCI_0_1_0,         0x80000800
.equ PCI_ID_VIRTIO_BLK, 0x10421af4
.equ PCI_COMMAND,       0x04
.equ PCI_BAR0,          0x10
.equ PCI_CAPABILITIES,  0x34
.equ COMMAND_IO_NO_INTX, 0x0405             # I/O on, bus master on, INTx off: completion is polled
.equ SPARE_BAR,         0xc000              # where BAR0 goes when nobody has placed it

    .text

# edi = register: its 32 bits in eax.
config_read:
    lea     eax, [rdi + PCI_0_1_0]
    and     eax, -4
    mov     edx, PCI_ADDRESS_PORT
    out     dx, eax
    mov     edx, PCI_DATA_PORT
    in      eax, dx
    ret

# The capabilities say where in BAR0 each structure lies.
    .globl find_device
find_device:
    STEP    "disk-found"
    WHAT    "PCI id of 0:1.0"
    xor     edi, edi
    call    config_read
    mov     esi, eax
    mov     edi, PCI_ID_VIRTIO_BLK
    call    expect_equal

    mov     edi, PCI_BAR0
    call    config_read
    mov     r8d, eax
    WHAT    "I/O bit of BAR0"
    mov     esi, eax
    and     esi, 1
    mov     edi, 1
    call    expect_equal
    and     r8d, 0xfffc
    jnz     .Lbar_placed
    mov     r8d, SPARE_BAR
    mov     edx, PCI_DATA_PORT              # the address register still names BAR0
    mov     eax, r8d
    out     dx, eax
.Lbar_placed:
    mov     [rip + bar], r8d
    mov     edi, PCI_COMMAND
    call    config_read
    mov     eax, COMMAND_IO_NO_INTX         # 16 bits: the status half is write-one-to-clear
    mov     edx, PCI_DATA_PORT
    out     dx, ax

    push    rbx
    push    rbp
    mov     edi, PCI_CAPABILITIES
    call    config_read
    movzx   ebx, al
    mov     ebp, 48                         # as many as fit: a loop in the list ends
.Lnext_capability:
    and     ebx, 0xfc
    jz      .Lcapabilities_done
    dec     ebp
    js      .Lcapabilities_done
    mov     edi, ebx
    call    config_read                     # id, next, length, type
    mov     r8d, eax
    mov     r9d, eax
    shr     r9d, 8                          # next, in the low byte
    cmp     al, 9                           # vendor-specific
    jne     .Lcapability_done
    shr     r8d, 24                         # 1 common, 2 notify, 4 device
    lea     edi, [rbx + 4]
    call    config_read                     # number of the BAR
    test    al, al
    jnz     .Lcapability_done
    lea     edi, [rbx + 8]
    call    config_read                     # offset in the BAR
    add     eax, [rip + bar]
    cmp     r8d, 1
    je      .Lcommon
    cmp     r8d, 2
    je      .Lnotify
    cmp     r8d, 4
    jne     .Lcapability_done
    mov     [rip + device_port], eax
    jmp     .Lcapability_done
.Lcommon:
    mov     [rip + common_port], eax
    jmp     .Lcapability_done
.Lnotify:
    mov     [rip + notify_port], eax
    lea     edi, [rbx + 16]
    call    config_read
    mov     [rip + notify_multiplier], eax
.Lcapability_done:
    mov     ebx, r9d
    jmp     .Lnext_capability
.Lcapabilities_done:
    pop     rbp
    pop     rbx

    # All three of them must have turned up.
    WHAT    "virtio structures in BAR0 (common, notify, device)"
    xor     esi, esi
    cmp     dword ptr [rip + common_port], 1
    sbb     esi, -1
    cmp     dword ptr [rip + notify_port], 1
    sbb     esi, -1
    cmp     dword ptr [rip + device_port], 1
    sbb     esi, -1
    mov     edi, 3
    call    expect_equal
    call    step_ok
    PRINT   "virtio-blk at PCI 0:1.0, I/O BAR at "
    mov     eax, [rip + bar]
    call    put_hex
    jmp     end_line

    .bss
    .balign 4
    .globl common_port, notify_port, notify_multiplier, device_port
bar:            .skip 4
common_port:    .skip 4
notify_port:    .skip 4
notify_multiplier: .skip 4
device_port:    .skip 4
