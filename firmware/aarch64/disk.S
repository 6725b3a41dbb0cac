// The disk steps: reads, checksums, a write that is read back and undone. The device itself is
// driven by virtio.S, found by pci.S.
.include "defs.inc"
.include "disk.inc"

.equ FNV_BASIS,         0xcbf29ce484222325
.equ FNV_PRIME,         0x00000100000001b3

    .text

    .globl disk_steps
disk_steps:
    stp     x29, x30, [sp, #-16]!
    bl      claim_buffers
    bl      find_device
    bl      negotiate
    bl      read_first_sectors
    bl      read_first_bytes
    bl      last_sector
    bl      release_buffers
    ldp     x29, x30, [sp], #16
    ret

// Rings and buffers have to be where the host can reach them.
claim_buffers:
    stp     x29, x30, [sp, #-16]!
    ldr     x0, info_flags
    tst     x0, #1 << FLAG_DOORBELL | 1 << FLAG_PKVM
    b.eq    .Lclear_buffers
    STEP    "disk-buffers"
    RING    CMD_SHARE, (DISK_GPA)>>12, DISK_PAGES, 0, "answer to share of the disk buffers"
    ldr     x0, info_flags
    tbnz    x0, #FLAG_PKVM, .Lbuffers_shared
    VERIFY_ZERO plain, DISK_GPA, DISK_PAGES, "freshly shared memory"
.Lbuffers_shared:
    OK      "20 pages shared for rings and data"
.Lclear_buffers:
    DISK_ADDRESS x0, DISK_GPA
    CONST   x1, DISK_PAGES * PAGE
.Lclear_next:
    str     xzr, [x0], #8
    subs    x1, x1, #8
    b.ne    .Lclear_next
    DISK_ADDRESS x0, AVAILABLE
    mov     w1, #1                      // no interrupt, please
    strh    w1, [x0]
    ldp     x29, x30, [sp], #16
    ret

// The device lets go of the memory first, then it turns private.
release_buffers:
    stp     x29, x30, [sp, #-16]!
    bl      reset_device
    ldr     x0, info_flags
    tst     x0, #1 << FLAG_DOORBELL | 1 << FLAG_PKVM
    b.eq    .Lrefill_buffers
    STEP    "disk-released"
    RING    CMD_UNSHARE, (DISK_GPA)>>12, DISK_PAGES, 0, "answer to unshare of the disk buffers"
    ldr     x0, info_flags
    tbnz    x0, #FLAG_PKVM, .Lbuffers_kept
    VERIFY_ZERO private, DISK_GPA, DISK_PAGES, "freshly private memory"
    OK      "device reset, its buffers private again, zeros seen"
    b       .Lrefill_buffers
.Lbuffers_kept:
    OK      "device reset, its buffers private again"
.Lrefill_buffers:
    FILL    private, DISK_GPA, DISK_PAGES, KEY_PRIVATE
    ldp     x29, x30, [sp], #16
    ret

read_first_sectors:
    ENTER
    STEP    "disk-read"
    mov     w0, #8 * 512
    bl      limit_to_capacity
    mov     w19, w0
    bl      read_from_start
    bl      step_ok
    PRINT   "sectors 0.."
    lsr     x0, x19, #9
    sub     x0, x0, #1
    bl      put_decimal
    mov     w0, w19
    bl      print_checksum
    LEAVE

// Several data segments in one chain.
read_first_bytes:
    ENTER
    STEP    "disk-read-chain"
    CONST   x0, BUFFER_BYTES
    bl      limit_to_capacity
    mov     w19, w0
    bl      read_from_start
    bl      step_ok
    PRINT   "first "
    mov     x0, x19
    bl      put_decimal
    PRINT   " bytes"
    mov     w0, w19
    bl      print_checksum
    LEAVE

// w0 = bytes of the buffer: ends the line with their FNV-1a checksum.
print_checksum:
    ENTER
    DISK_ADDRESS x1, BUFFER
    CONST   x19, FNV_BASIS
    CONST   x2, FNV_PRIME
.Lchecksum_next:
    ldrb    w3, [x1], #1
    eor     x19, x19, x3
    mul     x19, x19, x2
    subs    w0, w0, #1
    b.ne    .Lchecksum_next
    PRINT   ", FNV-1a "
    mov     x0, x19
    bl      put_hex
    bl      end_line
    LEAVE

// w0 = bytes wanted: w0 = those that the disk has.
limit_to_capacity:
    ldr     x1, capacity
    lsl     x2, x1, #9
    cmp     x1, w0, uxtw #0
    b.hi    .Llimited                   // as many sectors as bytes: more than enough, no overflow
    cmp     x2, w0, uxtw #0
    csel    w0, w2, w0, lo
.Llimited:
    ret

// w0 = bytes, from sector 0 into the buffer, which held something else before.
read_from_start:
    ENTER
    mov     w19, w0
    FILL    plain, BUFFER, BUFFER_BYTES/PAGE, KEY_SHARED
    mov     w0, #REQUEST_IN
    mov     x1, #0
    DISK_ADDRESS x2, BUFFER
    mov     w3, w19
    mov     w4, #STATUS_OK
    bl      request
    LEAVE

// A writable disk takes a block and then its old bytes again, a read-only one refuses the block;
// the disk is left as it was found. x19 = the sector throughout.
last_sector:
    ENTER
    ldr     x19, capacity
    sub     x19, x19, #1
    ldr     w0, features_low
    tbnz    w0, #FEATURE_RO, .Lread_only
    STEP    "disk-write"
    CONST   x0, SECTOR_OLD
    bl      read_sector
    bl      make_block
    CONST   x0, SECTOR_OUT
    bl      write_sector
    CONST   x0, SECTOR_OUT
    bl      compare_sector
    bl      step_ok
    PRINT   "sector "
    mov     x0, x19
    bl      put_decimal
    PRINT   " overwritten, flushed, read back"
    bl      end_line
    STEP    "disk-restore"
    CONST   x0, SECTOR_OLD
    bl      write_sector
    CONST   x0, SECTOR_OLD
    bl      compare_sector
    OK      "its old content written back, flushed, read back"
    LEAVE

.Lread_only:
    STEP    "disk-read-only"
    CONST   x0, SECTOR_OLD
    bl      read_sector
    mov     w0, #REQUEST_OUT
    mov     x1, x19
    DISK_ADDRESS x2, BUFFER
    mov     w3, #512
    mov     w4, #STATUS_IOERR
    bl      request
    CONST   x0, SECTOR_OLD
    bl      compare_sector
    OK      "a write is refused, the last sector is as it was"
    LEAVE
    .ltorg

// x0 = buffer (a GPA), x19 = sector.
read_sector:
    ldr     x17, shared_mask
    orr     x2, x0, x17
    mov     w0, #REQUEST_IN
    mov     x1, x19
    mov     w3, #512
    mov     w4, #STATUS_OK
    b       request

// x0 = buffer (a GPA), x19 = sector; flushed where the device has a cache to flush.
write_sector:
    stp     x29, x30, [sp, #-16]!
    ldr     x17, shared_mask
    orr     x2, x0, x17
    mov     w0, #REQUEST_OUT
    mov     x1, x19
    mov     w3, #512
    mov     w4, #STATUS_OK
    bl      request
    ldr     w0, features_low
    tbz     w0, #FEATURE_FLUSH, .Lwritten_through
    mov     w0, #REQUEST_FLUSH
    mov     x1, #0
    mov     x2, #0
    mov     w3, #0
    mov     w4, #STATUS_OK
    bl      request
.Lwritten_through:
    ldp     x29, x30, [sp], #16
    ret

// x19 = sector: a text that a person finds in a dump, the sector's number, then a byte count up.
make_block:
    DISK_ADDRESS x0, SECTOR_OUT
    mov     w1, #0
.Lblock_next:
    strb    w1, [x0, x1]
    add     w1, w1, #1
    cmp     w1, #512
    b.lo    .Lblock_next
    adr     x2, block_text
    mov     w1, #0
.Ltext_next:
    ldrb    w3, [x2, x1]
    strb    w3, [x0, x1]
    add     w1, w1, #1
    cmp     w1, #24
    b.lo    .Ltext_next
    str     x19, [x0, #24]
    ret

// x0 = buffer (a GPA), x19 = sector: the disk must hold what the buffer holds.
compare_sector:
    ENTER   x20, x21
    ldr     x17, shared_mask
    orr     x20, x0, x17
    CONST   x0, SECTOR_IN
    bl      read_sector
    DISK_ADDRESS x21, SECTOR_IN
    WHAT    "last sector read back"
    mov     x2, #0
.Lcompare_next:
    ldr     x0, [x20, x2]
    ldr     x1, [x21, x2]
    cmp     x0, x1
    b.ne    .Lcompare_mismatch
    add     x2, x2, #8
    cmp     x2, #512
    b.lo    .Lcompare_next
    LEAVE   x20, x21
.Lcompare_mismatch:
    CONST   x3, SECTOR_IN
    add     x2, x2, x3
    b       fail_at

    .section .rodata
block_text:
    .ascii  "pyvmm payload was here. "      // 24 bytes
