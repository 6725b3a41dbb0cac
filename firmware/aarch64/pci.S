// Finds the virtio-blk function at PCI 0:1.0 and where its registers lie: all in one memory BAR,
// accessed one by one as they are wide (virtio 1.2, 4.1.3.1, 4.1.4).
.include "defs.inc"

// The function's configuration space in that of bus 0 (ECAM: 4 KiB each, 8 functions a device).
.equ FUNCTION_0_1_0,    1 << 15
.equ PCI_ID_VIRTIO_BLK, 0x10421af4
.equ PCI_COMMAND,       0x04
.equ PCI_BAR0,          0x10
.equ PCI_CAPABILITIES,  0x34
.equ COMMAND_MEMORY_NO_INTX, 0x0406         // memory on, bus master on, INTx off: it is polled

    .text

// w0 = register: its 32 bits in w0.
config_read:
    ldr     x1, pci_config
    add     x1, x1, #FUNCTION_0_1_0
    and     x0, x0, #0xfc
    ldr     w0, [x1, x0]
    ret

// The capabilities say where in BAR0 each structure lies.
    .globl find_device
find_device:
    stp     x29, x30, [sp, #-64]!
    stp     x19, x20, [sp, #16]
    stp     x21, x22, [sp, #32]
    STEP    "disk-found"
    WHAT    "PCI id of 0:1.0"
    mov     w0, #0
    bl      config_read
    mov     w1, w0
    CONST   x0, PCI_ID_VIRTIO_BLK
    bl      expect_equal

    mov     w0, #PCI_BAR0
    bl      config_read
    WHAT    "low bits of BAR0: 32 bits of memory"
    mov     w20, w0
    and     w1, w0, #0xf
    mov     w0, #0
    bl      expect_equal
    WHAT    "BAR0, placed"
    mov     w0, #PAGE
    mov     w1, w20
    cmp     w1, w0
    b.lo    fail_values
    adr     x0, bar
    str     x20, [x0]
    ldr     x1, pci_config
    add     x1, x1, #FUNCTION_0_1_0
    mov     w0, #COMMAND_MEMORY_NO_INTX // 16 bits: the status half is write-one-to-clear
    strh    w0, [x1, #PCI_COMMAND]

    mov     w0, #PCI_CAPABILITIES
    bl      config_read
    and     w19, w0, #0xff
    mov     w22, #48                    // as many as fit: a loop in the list ends
.Lnext_capability:
    and     w19, w19, #0xfc
    cbz     w19, .Lcapabilities_done
    subs    w22, w22, #1
    b.mi    .Lcapabilities_done
    mov     w0, w19
    bl      config_read                 // id, next, length, type
    mov     w21, w0
    and     w0, w0, #0xff
    cmp     w0, #9                      // vendor-specific
    b.ne    .Lcapability_done
    add     w0, w19, #4
    bl      config_read                 // number of the BAR
    tst     w0, #0xff
    b.ne    .Lcapability_done
    add     w0, w19, #8
    bl      config_read                 // offset in the BAR
    add     x2, x20, w0, uxtw
    lsr     w0, w21, #24                // 1 common, 2 notify, 4 device
    cmp     w0, #1
    b.eq    .Lcommon
    cmp     w0, #2
    b.eq    .Lnotify
    cmp     w0, #4
    b.ne    .Lcapability_done
    STORE   x2, device_registers
    b       .Lcapability_done
.Lcommon:
    STORE   x2, common_registers
    b       .Lcapability_done
.Lnotify:
    STORE   x2, notify_register
    add     w0, w19, #16
    bl      config_read
    STORE   w0, notify_multiplier
.Lcapability_done:
    ubfx    w19, w21, #8, #8
    b       .Lnext_capability
.Lcapabilities_done:

    // All three of them must have turned up.
    WHAT    "virtio structures in BAR0 (common, notify, device)"
    mov     x1, #0
    ldr     x2, common_registers
    cmp     x2, #0
    cinc    x1, x1, ne
    ldr     x2, notify_register
    cmp     x2, #0
    cinc    x1, x1, ne
    ldr     x2, device_registers
    cmp     x2, #0
    cinc    x1, x1, ne
    mov     x0, #3
    bl      expect_equal
    bl      step_ok
    PRINT   "virtio-blk at PCI 0:1.0, memory BAR at "
    ldr     x0, bar
    bl      put_hex
    bl      end_line
    ldp     x21, x22, [sp, #32]
    ldp     x19, x20, [sp, #16]
    ldp     x29, x30, [sp], #64
    ret

    .bss
    .balign 8
    .globl common_registers, notify_register, notify_multiplier, device_registers
bar:                .skip 8
common_registers:   .skip 8
notify_register:    .skip 8
device_registers:   .skip 8
notify_multiplier:  .skip 4
