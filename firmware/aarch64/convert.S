// Sharing and unsharing through the doorbell, and the content rules seen from the guest: a page
// that changes sides starts as zeros on its new side, nothing of the old side remains, and a
// request changes the pages that it names and no others.
.include "defs.inc"

    .text

// w0 = first frame, w1 = pages, w2 = command, w3 = the answer that must come. Under pKVM pages are
// shared by hypercalls, one each, and the doorbell serves the host's checks alone.
    .globl ring_expect
ring_expect:
    ldr     x4, info_flags
    tbz     x4, #FLAG_PKVM, .Lring
    cmp     w2, #CMD_SHARE
    b.eq    pkvm_share
    cmp     w2, #CMD_UNSHARE
    b.eq    pkvm_unshare
.Lring:
    ldr     x4, doorbell
    str     w0, [x4, #BELL_FIRST_FRAME]
    str     w1, [x4, #BELL_PAGES]
    dsb     sy                          // what the host is to see was written before the command
    str     w2, [x4, #BELL_COMMAND]
    dsb     sy
    ldr     w1, [x4, #BELL_RESULT]
    mov     w0, w3
    b       expect_equal

    .globl conversion_steps
conversion_steps:
    stp     x29, x30, [sp, #-16]!
    bl      check_registers
    bl      check_share
    bl      check_host
    bl      check_host_refusals
    bl      check_same_state
    bl      check_checkerboard
    bl      check_unshare
    bl      check_reshare
    bl      check_partial_unshare
    bl      check_bad_requests
    ldp     x29, x30, [sp], #16
    ret

    .globl check_registers
check_registers:
    ENTER
    STEP    "doorbell"
    ldr     x19, doorbell
    WHAT    "doorbell id"
    CONST   x0, BELL_ID
    ldr     w1, [x19, #BELL_COMMAND]
    bl      expect_equal
    // The first two registers are latches: what was written reads back.
    CONST   x0, 0x13572468
    str     w0, [x19, #BELL_FIRST_FRAME]
    CONST   x0, 0x24681357
    str     w0, [x19, #BELL_PAGES]
    WHAT    "latched frame number"
    CONST   x0, 0x13572468
    ldr     w1, [x19, #BELL_FIRST_FRAME]
    bl      expect_equal
    WHAT    "latched page count"
    CONST   x0, 0x24681357
    ldr     w1, [x19, #BELL_PAGES]
    bl      expect_equal
    OK      "found, its latches hold"
    LEAVE

// A fresh shared page holds zeros, then what the guest writes by the plain address.
.macro SHARE_FRESH gpa:req, pages:req
    RING    CMD_SHARE, (\gpa)>>12, \pages, 0, "answer to share"
    VERIFY_ZERO plain, \gpa, \pages, "freshly shared memory"
    FILL    plain, \gpa, \pages, KEY_SHARED
    VERIFY  plain, \gpa, \pages, KEY_SHARED, "shared memory"
.endm

// A fresh private page holds zeros: neither its bytes of before the share, nor the shared ones.
.macro UNSHARE_FRESH gpa:req, pages:req
    RING    CMD_UNSHARE, (\gpa)>>12, \pages, 0, "answer to unshare"
    VERIFY_ZERO private, \gpa, \pages, "freshly private memory"
    FILL    private, \gpa, \pages, KEY_PRIVATE
    VERIFY  private, \gpa, \pages, KEY_PRIVATE, "private memory"
.endm

check_share:
    stp     x29, x30, [sp, #-16]!
    STEP    "share-4KiB"
    SHARE_FRESH SMALL_GPA, SMALL_PAGES
    OK      "1 page, zeros seen, written and read by the plain alias"
    STEP    "share-2MiB"
    SHARE_FRESH LARGE_GPA, LARGE_PAGES
    OK      "512 pages, aligned"
    STEP    "share-odd"
    SHARE_FRESH ODD_GPA, ODD_PAGES
    OK      "37 pages across a 2 MiB boundary"
    ldp     x29, x30, [sp], #16
    ret
    .ltorg

// The host checks the guest's words through its fd and writes its own in their place.
.macro HOST_CHECK gpa:req, pages:req
    RING    CMD_HOST_CHECK, (\gpa)>>12, \pages, 0, "answer to host-check"
    VERIFY  plain, \gpa, \pages, KEY_HOST, "what the host wrote"
.endm

    .globl check_host
check_host:
    stp     x29, x30, [sp, #-16]!
    STEP    "host-check"
    HOST_CHECK SMALL_GPA, SMALL_PAGES
    HOST_CHECK LARGE_GPA, LARGE_PAGES
    HOST_CHECK ODD_GPA, ODD_PAGES
    OK      "550 pages read and rewritten by the host"
    STEP    "host-mismatch"
    RING    CMD_HOST_CHECK, (SMALL_GPA)>>12, SMALL_PAGES, EIO, "host-check of other words"
    VERIFY  plain, SMALL_GPA, SMALL_PAGES, KEY_HOST, "shared memory after a mismatch"
    OK      "other words refused, left alone"
    ldp     x29, x30, [sp], #16
    ret
    .ltorg

    .globl check_host_refusals
check_host_refusals:
    stp     x29, x30, [sp, #-16]!
    STEP    "host-private"
    RING    CMD_HOST_CHECK, (CHECKER_GPA)>>12, 1, EACCES, "host-check of a private page"
    // The last shared page and the private one behind it: refused before a byte moves.
    FILL    plain, (ODD_GPA+(ODD_PAGES-1)*PAGE), 1, KEY_SHARED
    RING    CMD_HOST_CHECK, ((ODD_GPA)>>12)+ODD_PAGES-1, 2, EACCES, "host-check of both kinds"
    VERIFY  plain, (ODD_GPA+(ODD_PAGES-1)*PAGE), 1, KEY_SHARED, "shared half of a refused range"
    VERIFY  private, (ODD_GPA+ODD_PAGES*PAGE), 1, KEY_PRIVATE, "private half of a refused range"
    VERIFY  private, CHECKER_GPA, 1, KEY_PRIVATE, "private page after a refused host-check"
    OK      "private and half private ranges refused with EACCES"
    ldp     x29, x30, [sp], #16
    ret
    .ltorg

// Asking for the state a page is in already succeeds and moves nothing.
check_same_state:
    stp     x29, x30, [sp, #-16]!
    STEP    "same-state"
    RING    CMD_SHARE, (LARGE_GPA)>>12, LARGE_PAGES, 0, "share of shared memory"
    VERIFY  plain, LARGE_GPA, LARGE_PAGES, KEY_HOST, "shared memory shared again"
    RING    CMD_UNSHARE, (CHECKER_GPA)>>12, CHECKER_PAGES, 0, "unshare of private memory"
    VERIFY  private, CHECKER_GPA, CHECKER_PAGES, KEY_PRIVATE, "private memory unshared again"
    OK      "share of shared and unshare of private change nothing"
    ldp     x29, x30, [sp], #16
    ret
    .ltorg

// Single pages among pages of the other kind, then one request over both kinds.
check_checkerboard:
    ENTER
    STEP    "checkerboard"
    CONST   x20, CHECKER_GPA + CHECKER_PAGES * PAGE
    CONST   x19, CHECKER_GPA
.Lchecker_share:
    WHAT    "answer to share of a single page"
    lsr     w0, w19, #12
    mov     w1, #1
    mov     w2, #CMD_SHARE
    mov     w3, #0
    bl      ring_expect
    WHAT    "single shared page"
    mov     x0, x19
    mov     x1, #PAGE
    bl      verify_zero_plain
    mov     x0, x19
    mov     x1, #PAGE
    CONST   x2, KEY_SHARED
    bl      fill_plain
    add     x19, x19, #2 * PAGE
    cmp     x19, x20
    b.lo    .Lchecker_share

    CONST   x19, CHECKER_GPA
.Lchecker_neighbours:
    WHAT    "private page between shared ones"
    add     x0, x19, #PAGE
    mov     x1, #PAGE
    CONST   x2, KEY_PRIVATE
    bl      verify_private
    add     x19, x19, #2 * PAGE
    cmp     x19, x20
    b.lo    .Lchecker_neighbours

    RING    CMD_SHARE, (CHECKER_GPA)>>12, CHECKER_PAGES, 0, "share of a mixed range"
    CONST   x19, CHECKER_GPA
.Lchecker_mixed:
    WHAT    "shared page of a mixed range"
    mov     x0, x19
    mov     x1, #PAGE
    CONST   x2, KEY_SHARED
    bl      verify_plain
    WHAT    "private page of a mixed range, now shared"
    add     x0, x19, #PAGE
    mov     x1, #PAGE
    bl      verify_zero_plain
    add     x19, x19, #2 * PAGE
    cmp     x19, x20
    b.lo    .Lchecker_mixed
    UNSHARE_FRESH CHECKER_GPA, CHECKER_PAGES
    OK      "8 single pages shared, then all 16 at once, then none"
    LEAVE
    .ltorg

check_unshare:
    stp     x29, x30, [sp, #-16]!
    STEP    "unshare"
    UNSHARE_FRESH SMALL_GPA, SMALL_PAGES
    UNSHARE_FRESH LARGE_GPA, LARGE_PAGES
    UNSHARE_FRESH ODD_GPA, ODD_PAGES
    OK      "550 pages private again, zeros seen"
    ldp     x29, x30, [sp], #16
    ret
    .ltorg

// The host's words of the first time must not come back with a second share.
check_reshare:
    stp     x29, x30, [sp, #-16]!
    STEP    "reshare"
    SHARE_FRESH SMALL_GPA, SMALL_PAGES
    SHARE_FRESH LARGE_GPA, LARGE_PAGES
    SHARE_FRESH ODD_GPA, ODD_PAGES
    UNSHARE_FRESH SMALL_GPA, SMALL_PAGES
    UNSHARE_FRESH ODD_GPA, ODD_PAGES
    OK      "nothing old came back, on either side"
    ldp     x29, x30, [sp], #16
    ret
    .ltorg

// Three pages out of the middle of the 2 MiB that check_reshare left shared.
.equ HOLE_GPA, LARGE_GPA+0x65000
.equ HOLE_PAGES, 3
.equ BEHIND_GPA, HOLE_GPA+HOLE_PAGES*PAGE
.equ BEFORE_PAGES, (HOLE_GPA-(LARGE_GPA))/PAGE
.equ BEHIND_PAGES, LARGE_PAGES-BEFORE_PAGES-HOLE_PAGES
check_partial_unshare:
    stp     x29, x30, [sp, #-16]!
    STEP    "partial-unshare"
    UNSHARE_FRESH HOLE_GPA, HOLE_PAGES
    VERIFY  plain, LARGE_GPA, BEFORE_PAGES, KEY_SHARED, "shared before the hole"
    VERIFY  plain, BEHIND_GPA, BEHIND_PAGES, KEY_SHARED, "shared behind the hole"
    RING    CMD_UNSHARE, (LARGE_GPA)>>12, LARGE_PAGES, 0, "unshare of a mixed range"
    VERIFY  private, HOLE_GPA, HOLE_PAGES, KEY_PRIVATE, "private part of a mixed unshare"
    VERIFY_ZERO private, LARGE_GPA, BEFORE_PAGES, "freshly private memory"
    VERIFY_ZERO private, BEHIND_GPA, BEHIND_PAGES, "freshly private memory"
    FILL    private, LARGE_GPA, LARGE_PAGES, KEY_PRIVATE
    OK      "3 pages out of 512, then the rest"
    ldp     x29, x30, [sp], #16
    ret
    .ltorg

// Rings for the frames that x19 names: RAM's end is known at run time only.
.macro RING_AT_END command:req, pages:req, errno:req, text:req
    WHAT    "\text"
    mov     w0, w19
    CONST   x1, \pages
    CONST   x2, \command
    CONST   x3, -(\errno)
    bl      ring_expect
.endm

// Each must be refused with its errno; the sweep that follows shows that nothing changed.
check_bad_requests:
    ENTER
    STEP    "bad-requests"
    RING    CMD_SHARE, (SMALL_GPA)>>12, 0, EINVAL, "share of no pages"
    RING    CMD_UNSHARE, (SMALL_GPA)>>12, 0, EINVAL, "unshare of no pages"
    RING    CMD_SHARE, (SMALL_GPA)>>12, 0xffffffff, EINVAL, "share of 2^32-1 pages"
    RING    CMD_UNSHARE, (SMALL_GPA)>>12, 0xffffffff, EINVAL, "unshare of 2^32-1 pages"
    RING    CMD_SHARE, 0xffffffff, 2, EINVAL, "share wrapping 32-bit frames"
    RING    CMD_SHARE, 0xffffffff, 0xffffffff, EINVAL, "share with all bits set"
    RING    CMD_SHARE, (SMALL_GPA)>>12, 0x4000000, EINVAL, "share of 256 GiB"
    RING    0, (SMALL_GPA)>>12, 1, ENOSYS, "command 0"
    RING    4, (SMALL_GPA)>>12, 1, ENOSYS, "command 4"
    RING    0xffffffff, (SMALL_GPA)>>12, 1, ENOSYS, "command 2^32-1"

    ldr     x19, ram_end
    lsr     x19, x19, #12
    RING_AT_END CMD_SHARE, 1, EINVAL, "share beyond RAM"
    RING_AT_END CMD_UNSHARE, 1, EINVAL, "unshare beyond RAM"
    RING_AT_END CMD_HOST_CHECK, 1, EINVAL, "host-check beyond RAM"
    sub     x19, x19, #1
    RING_AT_END CMD_SHARE, 2, EINVAL, "share straddling the end of RAM"
    RING_AT_END CMD_UNSHARE, 2, EINVAL, "unshare straddling the end of RAM"
    OK      "15 refused, each with its errno"
    LEAVE
