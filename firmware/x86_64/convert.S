# Sharing and unsharing through the port doorbell, and the content rules seen from the guest:
# a page that changes sides starts as zeros on its new side, nothing of the old side remains, and
# a request changes the pages that it names and no others.
.include "defs.inc"

    .text

# edi = first frame, esi = pages, edx = command, ecx = the answer that must come.
    .globl ring_expect
ring_expect:
    push    rcx
    mov     r8d, edx
    mov     r9d, [rip + doorbell_port]
    lea     edx, [r9 + BELL_FIRST_FRAME]
    mov     eax, edi
    out     dx, eax
    lea     edx, [r9 + BELL_PAGES]
    mov     eax, esi
    out     dx, eax
    lea     edx, [r9 + BELL_COMMAND]
    mov     eax, r8d
    out     dx, eax
    lea     edx, [r9 + BELL_RESULT]
    in      eax, dx
    mov     esi, eax
    pop     rdi
    mov     edi, edi
    jmp     expect_equal

# esi = offset of a doorbell register; result in eax.
bell_read:
    mov     edx, [rip + doorbell_port]
    add     edx, esi
    in      eax, dx
    ret

    .globl conversion_steps
conversion_steps:
    call    check_registers
    call    check_share
    call    check_host
    call    check_host_refusals
    call    check_same_state
    call    check_checkerboard
    call    check_unshare
    call    check_reshare
    call    check_partial_unshare
    jmp     check_bad_requests

check_registers:
    STEP    "doorbell"
    WHAT    "doorbell id"
    mov     esi, BELL_COMMAND
    call    bell_read
    mov     esi, eax
    mov     edi, BELL_ID
    call    expect_equal
    # The first two registers are latches: what was written reads back.
    mov     edx, [rip + doorbell_port]
    mov     eax, 0x13572468
    out     dx, eax
    add     edx, BELL_PAGES
    mov     eax, 0x24681357
    out     dx, eax
    WHAT    "latched frame number"
    mov     esi, BELL_FIRST_FRAME
    call    bell_read
    mov     esi, eax
    mov     edi, 0x13572468
    call    expect_equal
    WHAT    "latched page count"
    mov     esi, BELL_PAGES
    call    bell_read
    mov     esi, eax
    mov     edi, 0x24681357
    call    expect_equal
    OK      "found, its latches hold"
    ret

# A fresh shared page holds zeros, then what the guest writes by the plain alias.
.macro SHARE_FRESH gpa:req, pages:req
    RING    CMD_SHARE, (\gpa>>12), \pages, 0, "answer to share"
    VERIFY_ZERO plain, \gpa, \pages, "freshly shared memory"
    FILL    plain, \gpa, \pages, KEY_SHARED
    VERIFY  plain, \gpa, \pages, KEY_SHARED, "shared memory"
.endm

# A fresh private page holds zeros: neither its bytes of before the share, nor the shared ones.
.macro UNSHARE_FRESH gpa:req, pages:req
    RING    CMD_UNSHARE, (\gpa>>12), \pages, 0, "answer to unshare"
    VERIFY_ZERO private, \gpa, \pages, "freshly private memory"
    FILL    private, \gpa, \pages, KEY_PRIVATE
    VERIFY  private, \gpa, \pages, KEY_PRIVATE, "private memory"
.endm

check_share:
    STEP    "share-4KiB"
    SHARE_FRESH SMALL_GPA, SMALL_PAGES
    OK      "1 page, zeros seen, written and read by the plain alias"
    STEP    "share-2MiB"
    SHARE_FRESH LARGE_GPA, LARGE_PAGES
    OK      "512 pages, aligned"
    STEP    "share-odd"
    SHARE_FRESH ODD_GPA, ODD_PAGES
    OK      "37 pages across a 2 MiB boundary"
    ret

# The host checks the guest's words through its fd and writes its own in their place.
.macro HOST_CHECK gpa:req, pages:req
    RING    CMD_HOST_CHECK, (\gpa>>12), \pages, 0, "answer to host-check"
    VERIFY  plain, \gpa, \pages, KEY_HOST, "what the host wrote"
.endm

check_host:
    STEP    "host-check"
    HOST_CHECK SMALL_GPA, SMALL_PAGES
    HOST_CHECK LARGE_GPA, LARGE_PAGES
    HOST_CHECK ODD_GPA, ODD_PAGES
    OK      "550 pages read and rewritten by the host"
    STEP    "host-mismatch"
    RING    CMD_HOST_CHECK, (SMALL_GPA>>12), SMALL_PAGES, EIO, "host-check of other words"
    VERIFY  plain, SMALL_GPA, SMALL_PAGES, KEY_HOST, "shared memory after a mismatch"
    OK      "other words refused, left alone"
    ret

check_host_refusals:
    STEP    "host-private"
    RING    CMD_HOST_CHECK, (CHECKER_GPA>>12), 1, EACCES, "host-check of a private page"
    # The last shared page and the private one behind it: refused before a byte moves.
    FILL    plain, (ODD_GPA+(ODD_PAGES-1)*PAGE), 1, KEY_SHARED
    RING    CMD_HOST_CHECK, (ODD_GPA>>12)+ODD_PAGES-1, 2, EACCES, "host-check of both kinds"
    VERIFY  plain, (ODD_GPA+(ODD_PAGES-1)*PAGE), 1, KEY_SHARED, "shared half of a refused range"
    VERIFY  private, (ODD_GPA+ODD_PAGES*PAGE), 1, KEY_PRIVATE, "private half of a refused range"
    VERIFY  private, CHECKER_GPA, 1, KEY_PRIVATE, "private page after a refused host-check"
    OK      "private and half private ranges refused with EACCES"
    ret

# Asking for the state a page is in already succeeds and moves nothing.
check_same_state:
    STEP    "same-state"
    RING    CMD_SHARE, (LARGE_GPA>>12), LARGE_PAGES, 0, "share of shared memory"
    VERIFY  plain, LARGE_GPA, LARGE_PAGES, KEY_HOST, "shared memory shared again"
    RING    CMD_UNSHARE, (CHECKER_GPA>>12), CHECKER_PAGES, 0, "unshare of private memory"
    VERIFY  private, CHECKER_GPA, CHECKER_PAGES, KEY_PRIVATE, "private memory unshared again"
    OK      "share of shared and unshare of private change nothing"
    ret

# Single pages among pages of the other kind, then one request over both kinds.
check_checkerboard:
    STEP    "checkerboard"
    push    rbx
    mov     ebx, CHECKER_GPA
.Lchecker_share:
    WHAT    "answer to share of a single page"
    mov     edi, ebx
    shr     edi, 12
    mov     esi, 1
    mov     edx, CMD_SHARE
    xor     ecx, ecx
    call    ring_expect
    WHAT    "single shared page"
    mov     edi, ebx
    mov     esi, PAGE
    call    verify_zero_plain
    mov     edi, ebx
    mov     esi, PAGE
    movabs  rdx, KEY_SHARED
    call    fill_plain
    add     ebx, 2 * PAGE
    cmp     ebx, CHECKER_GPA + CHECKER_PAGES * PAGE
    jb      .Lchecker_share

    mov     ebx, CHECKER_GPA
.Lchecker_neighbours:
    WHAT    "private page between shared ones"
    lea     edi, [rbx + PAGE]
    mov     esi, PAGE
    movabs  rdx, KEY_PRIVATE
    call    verify_private
    add     ebx, 2 * PAGE
    cmp     ebx, CHECKER_GPA + CHECKER_PAGES * PAGE
    jb      .Lchecker_neighbours

    RING    CMD_SHARE, (CHECKER_GPA>>12), CHECKER_PAGES, 0, "share of a mixed range"
    mov     ebx, CHECKER_GPA
.Lchecker_mixed:
    WHAT    "shared page of a mixed range"
    mov     edi, ebx
    mov     esi, PAGE
    movabs  rdx, KEY_SHARED
    call    verify_plain
    WHAT    "private page of a mixed range, now shared"
    lea     edi, [rbx + PAGE]
    mov     esi, PAGE
    call    verify_zero_plain
    add     ebx, 2 * PAGE
    cmp     ebx, CHECKER_GPA + CHECKER_PAGES * PAGE
    jb      .Lchecker_mixed
    UNSHARE_FRESH CHECKER_GPA, CHECKER_PAGES
    pop     rbx
    OK      "8 single pages shared, then all 16 at once, then none"
    ret

check_unshare:
    STEP    "unshare"
    UNSHARE_FRESH SMALL_GPA, SMALL_PAGES
    UNSHARE_FRESH LARGE_GPA, LARGE_PAGES
    UNSHARE_FRESH ODD_GPA, ODD_PAGES
    OK      "550 pages private again, zeros seen"
    ret

# The host's words of the first time must not come back with a second share.
check_reshare:
    STEP    "reshare"
    SHARE_FRESH SMALL_GPA, SMALL_PAGES
    SHARE_FRESH LARGE_GPA, LARGE_PAGES
    SHARE_FRESH ODD_GPA, ODD_PAGES
    UNSHARE_FRESH SMALL_GPA, SMALL_PAGES
    UNSHARE_FRESH ODD_GPA, ODD_PAGES
    OK      "nothing old came back, on either side"
    ret

# Three pages out of the middle of the 2 MiB that check_reshare left shared.
.equ HOLE_GPA, LARGE_GPA+0x65000
.equ HOLE_PAGES, 3
.equ BEHIND_GPA, HOLE_GPA+HOLE_PAGES*PAGE
.equ BEFORE_PAGES, (HOLE_GPA-LARGE_GPA)/PAGE
.equ BEHIND_PAGES, LARGE_PAGES-BEFORE_PAGES-HOLE_PAGES
check_partial_unshare:
    STEP    "partial-unshare"
    UNSHARE_FRESH HOLE_GPA, HOLE_PAGES
    VERIFY  plain, LARGE_GPA, BEFORE_PAGES, KEY_SHARED, "shared before the hole"
    VERIFY  plain, BEHIND_GPA, BEHIND_PAGES, KEY_SHARED, "shared behind the hole"
    RING    CMD_UNSHARE, (LARGE_GPA>>12), LARGE_PAGES, 0, "unshare of a mixed range"
    VERIFY  private, HOLE_GPA, HOLE_PAGES, KEY_PRIVATE, "private part of a mixed unshare"
    VERIFY_ZERO private, LARGE_GPA, BEFORE_PAGES, "freshly private memory"
    VERIFY_ZERO private, BEHIND_GPA, BEHIND_PAGES, "freshly private memory"
    FILL    private, LARGE_GPA, LARGE_PAGES, KEY_PRIVATE
    OK      "3 pages out of 512, then the rest"
    ret

# Each must be refused with its errno; the sweep that follows shows that nothing changed.
check_bad_requests:
    STEP    "bad-requests"
    RING    CMD_SHARE, (SMALL_GPA>>12), 0, EINVAL, "share of no pages"
    RING    CMD_UNSHARE, (SMALL_GPA>>12), 0, EINVAL, "unshare of no pages"
    RING    CMD_SHARE, (SMALL_GPA>>12), 0xffffffff, EINVAL, "share of 2^32-1 pages"
    RING    CMD_UNSHARE, (SMALL_GPA>>12), 0xffffffff, EINVAL, "unshare of 2^32-1 pages"
    RING    CMD_SHARE, 0xffffffff, 2, EINVAL, "share wrapping 32-bit frames"
    RING    CMD_SHARE, 0xffffffff, 0xffffffff, EINVAL, "share with all bits set"
    RING    CMD_SHARE, (SMALL_GPA>>12), 0x100000, EINVAL, "share of 4 GiB"
    RING    0, (SMALL_GPA>>12), 1, ENOSYS, "command 0"
    RING    4, (SMALL_GPA>>12), 1, ENOSYS, "command 4"
    RING    0xffffffff, (SMALL_GPA>>12), 1, ENOSYS, "command 2^32-1"

    push    rbx
    mov     rbx, [rip + ram_bytes]
    shr     rbx, 12
    RING    CMD_SHARE, ebx, 1, EINVAL, "share beyond RAM"
    RING    CMD_UNSHARE, ebx, 1, EINVAL, "unshare beyond RAM"
    RING    CMD_HOST_CHECK, ebx, 1, EINVAL, "host-check beyond RAM"
    dec     rbx
    RING    CMD_SHARE, ebx, 2, EINVAL, "share straddling the end of RAM"
    RING    CMD_UNSHARE, ebx, 2, EINVAL, "unshare straddling the end of RAM"
    pop     rbx
    OK      "15 refused, each with its errno"
    ret
