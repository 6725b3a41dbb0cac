// Sharing and unsharing by pKVM's hypercalls: the hypervisor converts page by page, in place, and
// tells the host nothing. So bytes stay where they are, and what the host can reach is found out
// by having it try (host-check).
.include "defs.inc"

    .text

// w0 = first frame, w1 = pages, w3 = the answer that must come for each: keeps nothing but x19 up.
    .globl pkvm_share, pkvm_unshare
pkvm_share:
    CONST   x4, KVM_MEM_SHARE
    b       convert_each
pkvm_unshare:
    CONST   x4, KVM_MEM_UNSHARE
convert_each:
    stp     x29, x30, [sp, #-64]!
    stp     x19, x20, [sp, #16]
    stp     x21, x22, [sp, #32]
    ubfiz   x19, x0, #12, #32
    mov     w20, w1
    mov     x21, x4
    mov     w22, w3
.Lconvert_next:
    mov     x0, x21
    mov     x1, x19
    mov     x2, #0
    mov     x3, #0
    hvc     #0
    mov     w1, w0                      // an errno of 32 bits, as the doorbell's
    mov     w0, w22
    bl      expect_equal
    add     x19, x19, #PAGE
    subs    w20, w20, #1
    b.ne    .Lconvert_next
    ldp     x21, x22, [sp, #32]
    ldp     x19, x20, [sp, #16]
    ldp     x29, x30, [sp], #64
    ret

    .globl pkvm_steps
pkvm_steps:
    stp     x29, x30, [sp, #-16]!
    bl      check_hypercalls
    bl      check_registers
    bl      check_shared
    bl      check_host
    bl      check_host_refusals
    bl      check_twice
    bl      check_singles
    bl      check_unshared
    bl      check_shared_again
    bl      check_bad_calls
    ldp     x29, x30, [sp], #16
    ret

check_hypercalls:
    ENTER
    STEP    "hypercalls"
    WHAT    "pKVM's features MEMINFO, SHARE and UNSHARE"
    CONST   x0, KVM_FEATURES
    mov     x1, #0
    mov     x2, #0
    mov     x3, #0
    hvc     #0
    and     x1, x0, #KVM_MEM_FEATURES
    mov     x0, #KVM_MEM_FEATURES
    bl      expect_equal
    WHAT    "granule of protection"
    CONST   x0, KVM_HYP_MEMINFO
    mov     x1, #0
    mov     x2, #0
    mov     x3, #0
    hvc     #0
    mov     x1, x0
    mov     x0, #PAGE
    bl      expect_equal
    OK      "share and unshare offered, pages of 4 KiB"
    LEAVE

// The words stay, whoever wrote them.
.macro SHARE_KEPT gpa:req, pages:req
    RING    CMD_SHARE, (\gpa)>>12, \pages, 0, "answer to share"
    VERIFY  plain, \gpa, \pages, KEY_PRIVATE, "freshly shared memory"
    FILL    plain, \gpa, \pages, KEY_SHARED
    VERIFY  plain, \gpa, \pages, KEY_SHARED, "shared memory"
.endm
.macro UNSHARE_KEPT gpa:req, pages:req, key:req
    RING    CMD_UNSHARE, (\gpa)>>12, \pages, 0, "answer to unshare"
    VERIFY  private, \gpa, \pages, \key, "freshly private memory"
    RING    CMD_HOST_CHECK, (\gpa)>>12, \pages, EACCES, "host-check of unshared memory"
    FILL    private, \gpa, \pages, KEY_PRIVATE
    VERIFY  private, \gpa, \pages, KEY_PRIVATE, "private memory"
.endm

check_shared:
    stp     x29, x30, [sp, #-16]!
    STEP    "share-4KiB"
    SHARE_KEPT SMALL_GPA, SMALL_PAGES
    OK      "1 page, its words kept, written and read"
    STEP    "share-2MiB"
    SHARE_KEPT LARGE_GPA, LARGE_PAGES
    OK      "512 pages, aligned"
    STEP    "share-odd"
    SHARE_KEPT ODD_GPA, ODD_PAGES
    OK      "37 pages across a 2 MiB boundary"
    ldp     x29, x30, [sp], #16
    ret
    .ltorg

// The hypervisor refuses what is done already, and changes nothing.
check_twice:
    stp     x29, x30, [sp, #-16]!
    STEP    "same-state"
    RING    CMD_SHARE, (LARGE_GPA)>>12, 2, INVALID_PARAMETER, "share of shared memory"
    VERIFY  plain, LARGE_GPA, LARGE_PAGES, KEY_HOST, "shared memory shared again"
    RING    CMD_UNSHARE, (CHECKER_GPA)>>12, 2, INVALID_PARAMETER, "unshare of private memory"
    VERIFY  private, CHECKER_GPA, CHECKER_PAGES, KEY_PRIVATE, "private memory unshared again"
    OK      "share of shared and unshare of private refused, nothing changed"
    ldp     x29, x30, [sp], #16
    ret
    .ltorg

// Single pages among private ones, from both of which the host must keep its due distance.
check_singles:
    ENTER
    STEP    "checkerboard"
    CONST   x20, CHECKER_GPA + CHECKER_PAGES * PAGE
    CONST   x19, CHECKER_GPA
.Lsingle_share:
    WHAT    "answer to share of a single page"
    lsr     w0, w19, #12
    mov     w1, #1
    mov     w2, #CMD_SHARE
    mov     w3, #0
    bl      ring_expect
    mov     x0, x19
    mov     x1, #PAGE
    CONST   x2, KEY_SHARED
    bl      fill_plain
    add     x19, x19, #2 * PAGE
    cmp     x19, x20
    b.lo    .Lsingle_share

    CONST   x19, CHECKER_GPA
.Lsingle_check:
    WHAT    "host-check of a single shared page"
    lsr     w0, w19, #12
    mov     w1, #1
    mov     w2, #CMD_HOST_CHECK
    mov     w3, #0
    bl      ring_expect
    WHAT    "host-check of the private page behind it"
    add     x0, x19, #PAGE
    lsr     w0, w0, #12
    mov     w1, #1
    mov     w2, #CMD_HOST_CHECK
    mov     w3, #-EACCES
    bl      ring_expect
    WHAT    "private page between shared ones"
    add     x0, x19, #PAGE
    mov     x1, #PAGE
    CONST   x2, KEY_PRIVATE
    bl      verify_private
    WHAT    "answer to unshare of a single page"
    lsr     w0, w19, #12
    mov     w1, #1
    mov     w2, #CMD_UNSHARE
    mov     w3, #0
    bl      ring_expect
    WHAT    "what the host wrote, private again"
    mov     x0, x19
    mov     x1, #PAGE
    CONST   x2, KEY_HOST
    bl      verify_private
    add     x19, x19, #2 * PAGE
    cmp     x19, x20
    b.lo    .Lsingle_check
    FILL    private, CHECKER_GPA, CHECKER_PAGES, KEY_PRIVATE
    OK      "8 single pages shared among private ones, then none"
    LEAVE
    .ltorg

check_unshared:
    stp     x29, x30, [sp, #-16]!
    STEP    "unshare"
    UNSHARE_KEPT SMALL_GPA, SMALL_PAGES, KEY_HOST
    UNSHARE_KEPT LARGE_GPA, LARGE_PAGES, KEY_HOST
    // check_host_refusals wrote to its last page.
    UNSHARE_KEPT ODD_GPA, ODD_PAGES-1, KEY_HOST
    UNSHARE_KEPT ODD_GPA+(ODD_PAGES-1)*PAGE, 1, KEY_SHARED
    OK      "550 pages private again, their words kept, out of the host's reach"
    ldp     x29, x30, [sp], #16
    ret
    .ltorg

check_shared_again:
    stp     x29, x30, [sp, #-16]!
    STEP    "reshare"
    SHARE_KEPT SMALL_GPA, SMALL_PAGES
    SHARE_KEPT ODD_GPA, ODD_PAGES
    RING    CMD_HOST_CHECK, (ODD_GPA)>>12, ODD_PAGES, 0, "answer to host-check"
    VERIFY  plain, ODD_GPA, ODD_PAGES, KEY_HOST, "what the host wrote"
    UNSHARE_KEPT SMALL_GPA, SMALL_PAGES, KEY_SHARED
    UNSHARE_KEPT ODD_GPA, ODD_PAGES, KEY_HOST
    OK      "38 pages shared and unshared a second time"
    ldp     x29, x30, [sp], #16
    ret
    .ltorg

// A call about memory that isn't RAM is left out: the hypervisor answers a share with an abort.
check_bad_calls:
    ENTER
    STEP    "bad-requests"
    WHAT    "share of half a page"
    CONST   x0, KVM_MEM_SHARE
    CONST   x1, SMALL_GPA + 8
    mov     x2, #0
    mov     x3, #0
    hvc     #0
    mov     w1, w0
    mov     w0, #-INVALID_PARAMETER
    bl      expect_equal
    WHAT    "unshare of half a page"
    CONST   x0, KVM_MEM_UNSHARE
    CONST   x1, SMALL_GPA + 8
    mov     x2, #0
    mov     x3, #0
    hvc     #0
    mov     w1, w0
    mov     w0, #-INVALID_PARAMETER
    bl      expect_equal
    ldr     x19, ram_end
    WHAT    "host-check beyond RAM"
    lsr     x0, x19, #12
    mov     w1, #1
    mov     w2, #CMD_HOST_CHECK
    mov     w3, #-EINVAL
    bl      ring_expect
    OK      "3 refused"
    LEAVE
