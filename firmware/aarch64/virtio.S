// The virtio device: reset, features, queue 0, and one request at a time whose completion is
// polled in the used ring (virtio 1.2, 3.1, 2.7 and 5.2).
.include "defs.inc"
.include "disk.inc"

// Common configuration, offsets of its registers.
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
.equ FEATURES_HIGH,     3                   // VERSION_1 (bit 32) and ACCESS_PLATFORM (bit 33)

.equ SEGMENT_BYTES,     49 * 512            // a longer request becomes several data segments
.equ POLL_SECONDS,      60                  // emulated machines are slow

    .text

// The device's deadline into x0, by the virtual counter.
deadline:
    mrs     x0, cntfrq_el0
    mov     x1, #POLL_SECONDS
    mul     x0, x0, x1
    mrs     x1, cntvct_el0
    add     x0, x0, x1
    ret

// Status 0 is the reset; it is complete when it reads back as 0.
    .globl reset_device
reset_device:
    ENTER
    bl      deadline
    mov     x20, x0
    ldr     x19, common_registers
    strb    wzr, [x19, #DEVICE_STATUS]
.Lreset_wait:
    ldrb    w1, [x19, #DEVICE_STATUS]
    cbz     w1, .Lreset_done
    mrs     x2, cntvct_el0
    cmp     x2, x20
    b.lo    .Lreset_wait
    WHAT    "device status after reset"
    mov     x0, #0
    b       fail_values
.Lreset_done:
    LEAVE

// x1 = address, x0 = register: written as two halves.
write_address:
    str     w1, [x0]
    lsr     x1, x1, #32
    str     w1, [x0, #4]
    ret

    .globl negotiate
negotiate:
    ENTER
    STEP    "disk-negotiated"
    bl      reset_device
    ldr     x19, common_registers
    mov     w0, #STATUS_ACKNOWLEDGE_DRIVER
    strb    w0, [x19, #DEVICE_STATUS]

    str     wzr, [x19, #DEVICE_FEATURE_SELECT]
    ldr     w20, [x19, #DEVICE_FEATURE]
    mov     w0, #1 << FEATURE_RO | 1 << FEATURE_FLUSH
    and     w20, w20, w0
    STORE   w20, features_low
    mov     w0, #1
    str     w0, [x19, #DEVICE_FEATURE_SELECT]
    ldr     w1, [x19, #DEVICE_FEATURE]
    WHAT    "features VERSION_1 and ACCESS_PLATFORM"
    and     w1, w1, #FEATURES_HIGH
    mov     w0, #FEATURES_HIGH
    bl      expect_equal

    str     wzr, [x19, #DRIVER_FEATURE_SELECT]
    str     w20, [x19, #DRIVER_FEATURE]
    mov     w0, #1
    str     w0, [x19, #DRIVER_FEATURE_SELECT]
    mov     w0, #FEATURES_HIGH
    str     w0, [x19, #DRIVER_FEATURE]
    mov     w0, #STATUS_FEATURES_OK
    strb    w0, [x19, #DEVICE_STATUS]
    WHAT    "device status with FEATURES_OK"
    mov     w0, #STATUS_FEATURES_OK
    ldrb    w1, [x19, #DEVICE_STATUS]
    bl      expect_equal

    strh    wzr, [x19, #QUEUE_SELECT]
    WHAT    "size of queue 0, at least"
    ldrh    w1, [x19, #QUEUE_SIZE]
    mov     w0, #QUEUE_ENTRIES
    cmp     w1, w0
    b.lo    fail_values
    strh    w0, [x19, #QUEUE_SIZE]
    add     x0, x19, #QUEUE_DESC
    DISK_ADDRESS x1, DESCRIPTORS
    bl      write_address
    add     x0, x19, #QUEUE_DRIVER
    DISK_ADDRESS x1, AVAILABLE
    bl      write_address
    add     x0, x19, #QUEUE_DEVICE
    DISK_ADDRESS x1, USED
    bl      write_address
    ldrh    w0, [x19, #QUEUE_NOTIFY_OFF]
    ldr     w1, notify_multiplier
    mul     w0, w0, w1
    ldr     x1, notify_register
    add     x0, x1, w0, uxtw
    STORE   x0, notify_register
    mov     w0, #1
    strh    w0, [x19, #QUEUE_ENABLE]
    mov     w0, #STATUS_DRIVER_OK
    strb    w0, [x19, #DEVICE_STATUS]
    WHAT    "device status with DRIVER_OK"
    mov     w0, #STATUS_DRIVER_OK
    ldrb    w1, [x19, #DEVICE_STATUS]
    bl      expect_equal

    ldr     x0, device_registers            // the capacity in sectors comes first
    ldr     w1, [x0]
    ldr     w0, [x0, #4]
    orr     x1, x1, x0, lsl #32
    STORE   x1, capacity
    WHAT    "capacity in sectors, at least"
    mov     x0, #1
    cmp     x1, x0
    b.lo    fail_values
    bl      step_ok
    ldr     x0, capacity
    bl      put_decimal
    PRINT   " sectors"
    ldr     w0, features_low
    tbz     w0, #FEATURE_RO, .Lwritable
    PRINT   ", read-only"
.Lwritable:
    bl      end_line
    LEAVE
    .ltorg

// w0 = type, x1 = sector, x2 = buffer (the device's address), w3 = bytes, w4 = the status that
// must come. The queue is empty before and after: a chain always starts at descriptor 0.
    .globl request
request:
    stp     x29, x30, [sp, #-80]!
    stp     x19, x20, [sp, #16]
    stp     x21, x22, [sp, #32]
    stp     x23, x24, [sp, #48]
    mov     w19, w0
    mov     w20, w3
    mov     w21, w4
    DISK_ADDRESS x5, HEADER
    str     w0, [x5]
    str     wzr, [x5, #4]
    str     x1, [x5, #8]
    DISK_ADDRESS x6, STATUS_BYTE
    mov     w7, #0xff
    strb    w7, [x6]
    cmp     w0, #REQUEST_IN
    mov     w8, #1                          // flags of data segments: NEXT
    mov     w9, #3                          // and WRITE, where the device writes
    csel    w9, w9, w8, eq

    DISK_ADDRESS x10, DESCRIPTORS
    mov     w11, #1                         // number of the next descriptor
    str     x5, [x10]
    mov     w7, #16
    str     w7, [x10, #8]
    strh    w8, [x10, #12]
    strh    w11, [x10, #14]
.Lnext_segment:
    add     x10, x10, #16
    add     w11, w11, #1
    cbz     w3, .Lsegments_done
    mov     w7, #SEGMENT_BYTES
    cmp     w7, w3
    csel    w7, w3, w7, hi
    str     x2, [x10]
    str     w7, [x10, #8]
    strh    w9, [x10, #12]
    strh    w11, [x10, #14]
    add     x2, x2, w7, uxtw
    sub     w3, w3, w7
    b       .Lnext_segment
.Lsegments_done:
    str     x6, [x10]
    str     w8, [x10, #8]
    mov     w7, #2                          // WRITE, and no next
    strh    w7, [x10, #12]
    strh    wzr, [x10, #14]

    // Entry, then index, then the notification, each seen before the next.
    DISK_ADDRESS x5, AVAILABLE
    ldrh    w7, [x5, #2]
    and     w22, w7, #QUEUE_ENTRIES - 1
    add     x6, x5, x22, lsl #1
    strh    wzr, [x6, #4]
    dmb     ish
    add     w23, w7, #1                     // the used index that ends the request
    and     w23, w23, #0xffff
    strh    w23, [x5, #2]
    dsb     sy
    ldr     x6, notify_register
    strh    wzr, [x6]                       // queue 0

    bl      deadline
    DISK_ADDRESS x5, USED
.Lpoll:
    ldrh    w7, [x5, #2]
    cmp     w7, w23
    b.eq    .Lcompleted
    yield
    mrs     x1, cntvct_el0
    cmp     x1, x0
    b.lo    .Lpoll
    WHAT    "index of the used ring, waited for in vain"
    mov     w0, w23
    mov     w1, w7
    CONST   x2, USED + 2
    b       fail_at

.Lcompleted:
    dmb     ishld                           // the index before what it stands for
    add     x6, x5, x22, lsl #3
    WHAT    "descriptor in the used ring"
    mov     x0, #0
    ldr     w1, [x6, #4]
    ldr     w24, [x6, #8]                   // bytes that the device says it wrote
    bl      expect_equal
    WHAT    "status byte of the request"
    mov     w0, w21
    DISK_ADDRESS x5, STATUS_BYTE
    ldrb    w1, [x5]
    bl      expect_equal
    cbnz    w21, .Lrequest_done             // how much a failed request wrote is open
    cmp     w19, #REQUEST_IN
    csel    w0, w20, wzr, eq
    WHAT    "bytes written by the device, with the status byte"
    add     w0, w0, #1
    mov     w1, w24
    bl      expect_equal
.Lrequest_done:
    ldp     x23, x24, [sp, #48]
    ldp     x21, x22, [sp, #32]
    ldp     x19, x20, [sp, #16]
    ldp     x29, x30, [sp], #80
    ret

    .bss
    .balign 8
    .globl capacity, features_low
capacity:       .skip 8
features_low:   .skip 4
