// Entry, order of the steps, and the two ways out. EL1, MMU on with virtual = physical.
//
// It is entered as an arm64 kernel is: MMU off, x0 = its page of information. Its first act is to
// turn the MMU on, with tables that are part of the image. Without it all memory is Device memory:
// guest and host would not see each other's bytes on processors without FEAT_S2FWB.
//
// It runs wherever it is entered: a realm's payload, whose own memory is shared, at an address with
// the bit of shared addresses.
//
// What comes out of the UART, one line each:
//   pyvmm payload: <what the info page says>
//   ok <number> <tag>: <sentence>
//   skip <steps>: <why>
//   not ok <number> <tag>: <what>: expected <value>, saw <value>[ at GPA <address>]
//   payload: all <number> checks passed
// After "not ok" the step's number goes to the failure register and nothing more is tried.
//
// A page is touched only by the address of the state that it is in, so every mechanism that tells
// private from shared memory, also one that faults on the wrong side, can carry this guest.
.include "defs.inc"

.equ MAIR,  0xff00                  // attribute 0: Device-nGnRnE, 1: Normal, write-back
.equ TCR,   0x200803518             // T0SZ = 24; walks write-back, inner shareable; EPD1; IPS 40
.equ SCTLR, 0x30d01805              // what Armv8.0 wants set; MMU, data and instruction cache
.equ TABLE, 3
.equ NORMAL_BLOCK, 0x705            // block, attribute 1, inner shareable, accessed
.equ DEVICE_BLOCK, 0x60000000000401 // block, attribute 0, accessed, never executed

    .section .text.entry, "ax"
    .globl payload_entry
payload_entry:
    ldr     x1, =MAIR
    msr     mair_el1, x1
    ldr     x1, =TCR
    msr     tcr_el1, x1
    adr     x1, tables
    add     x2, x1, #1, lsl #12     // the level 1 tables, whose addresses depend on where we are
    orr     x2, x2, #TABLE
    add     x3, x1, #2, lsl #12
    orr     x3, x3, #TABLE
    stp     x2, x3, [x1]
    dmb     sy                      // past the caches, in which an older line may be
    dc      ivac, x1
    dsb     sy
    msr     ttbr0_el1, x1
    adr     x1, vectors
    msr     vbar_el1, x1
    isb
    tlbi    vmalle1
    ic      iallu
    dsb     nsh
    isb
    ldr     x1, =SCTLR
    msr     sctlr_el1, x1
    isb

    mov     x19, x0                 // the info page outlives the clearing of .bss
    adr     x0, bss_start
    adr     x1, bss_end
.Lclear:
    str     xzr, [x0], #8
    cmp     x0, x1
    b.lo    .Lclear
    adr     x0, stack_top
    mov     sp, x0

    bl      read_info
    bl      banner
    bl      memory_write
    bl      memory_check

    ldr     x0, info_flags
    tbnz    x0, #FLAG_PKVM, .Lpkvm
    tbz     x0, #FLAG_DOORBELL, .Lno_doorbell
    bl      conversion_steps
    bl      memory_check
    b       .Ldisk
.Lpkvm:
    bl      pkvm_steps
    bl      memory_check
    b       .Ldisk
.Lno_doorbell:
    PRINT   "skip conversions: no doorbell, an ordinary VM whose memory the host sees"
    bl      end_line

.Ldisk:
    ldr     x0, info_flags
    tbz     x0, #FLAG_DISK, .Lno_disk
    bl      disk_steps
    bl      memory_check
    b       .Lsummary
.Lno_disk:
    PRINT   "skip disk: none at PCI 0:1.0"
    bl      end_line

.Lsummary:
    PRINT   "payload: all "
    ldr     w0, step_number
    bl      put_decimal
    PRINT   " checks passed"
    bl      end_line
    // falls through

// Asks for power-off until somebody listens: there is nothing to return to.
    .globl power_off
power_off:
    CONST   x0, PSCI_SYSTEM_OFF
    hvc     #0
    b       power_off

    .text

// x19 = info page. Until it is believed, defaults give the failure a way to be heard.
read_info:
    stp     x29, x30, [sp, #-16]!
    CONST   x0, DEFAULT_SERIAL
    STORE   x0, serial
    CONST   x0, DEFAULT_DOORBELL
    STORE   x0, doorbell
    STEP    "info"
    WHAT    "magic of the info page"
    CONST   x0, INFO_MAGIC
    ldr     x1, [x19]
    bl      expect_equal

    ldr     x0, [x19, #INFO_SERIAL]
    STORE   x0, serial
    ldr     x0, [x19, #INFO_DOORBELL]
    STORE   x0, doorbell
    ldr     x0, [x19, #INFO_RAM_END]
    STORE   x0, ram_end
    ldr     x0, [x19, #INFO_SHARED_MASK]
    STORE   x0, shared_mask
    ldr     x0, [x19, #INFO_PRIVATE_START]
    STORE   x0, private_start
    ldr     x0, [x19, #INFO_FLAGS]
    STORE   x0, info_flags
    ldr     x0, [x19, #INFO_PCI_CONFIG]
    STORE   x0, pci_config

    WHAT    "start of RAM"
    CONST   x0, RAM
    ldr     x1, [x19, #INFO_RAM_START]
    bl      expect_equal
    WHAT    "start of private memory"
    CONST   x0, MIN_PRIVATE_START
    ldr     x1, private_start
    bl      expect_equal
    WHAT    "end of RAM, a multiple of the page size"
    ldr     x1, ram_end
    and     x0, x1, #-PAGE
    bl      expect_equal
    WHAT    "end of RAM, at least"
    ldr     x1, ram_end
    CONST   x0, RAM + MIN_RAM_BYTES
    cmp     x1, x0
    b.lo    fail_values
    ldp     x29, x30, [sp], #16
    ret

// "pyvmm payload: RAM 512 MiB, private from 0x40200000, shared mask 0x0, doorbell 0x9020000"
banner:
    stp     x29, x30, [sp, #-16]!
    PRINT   "pyvmm payload: RAM "
    ldr     x0, ram_end
    CONST   x1, RAM
    sub     x0, x0, x1
    lsr     x0, x0, #20
    bl      put_decimal
    PRINT   " MiB, private from "
    ldr     x0, private_start
    bl      put_hex
    PRINT   ", shared mask "
    ldr     x0, shared_mask
    bl      put_hex
    ldr     x0, info_flags
    tbnz    x0, #FLAG_PKVM, .Lbanner_pkvm
    tbz     x0, #FLAG_DOORBELL, .Lbanner_none
    PRINT   ", doorbell at "
    ldr     x0, doorbell
    bl      put_hex
    b       .Lbanner_done
.Lbanner_pkvm:
    PRINT   ", pKVM's hypercalls"
    b       .Lbanner_done
.Lbanner_none:
    PRINT   ", no doorbell"
.Lbanner_done:
    bl      end_line
    OK      "info page read"
    ldp     x29, x30, [sp], #16
    ret

// Every exception is a failure of the step under way.
exception:
    WHAT    "exception, its syndrome (ESR_EL1) and address (FAR_EL1)"
    mov     x0, #0
    mrs     x1, esr_el1
    mrs     x2, far_el1
    b       fail_at

    .balign 2048
vectors:
    .rept 16
    b       exception
    .balign 128
    .endr

// Level 0, then two tables of 1 GiB blocks: the first GiB is devices', all others are Normal.
    .data
    .balign 4096
tables:
    .skip   4096                    // level 0 is written at the start
    .quad   DEVICE_BLOCK
    .set    gib, 1
    .rept   1023
    .quad   gib << 30 | NORMAL_BLOCK
    .set    gib, gib + 1
    .endr

    .bss
    .balign 16
    .skip 8192
stack_top:
    .globl ram_end, shared_mask, private_start, info_flags, doorbell, serial, pci_config
ram_end:        .skip 8
shared_mask:    .skip 8
private_start:  .skip 8
info_flags:     .skip 8
doorbell:       .skip 8
serial:         .skip 8
pci_config:     .skip 8
