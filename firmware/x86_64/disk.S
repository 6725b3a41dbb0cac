# The disk steps: reads, checksums, a write that is read back and undone. The device itself is
# driven by virtio.S, found by pci.S.
.include "defs.inc"
.include "disk.inc"

.equ FNV_BASIS,         0xcbf29ce484222325
.equ FNV_PRIME,         0x00000100000001b3

    .text

    .globl disk_steps
disk_steps:
    call    claim_buffers
    call    find_device
    call    negotiate
    call    read_first_sectors
    call    read_first_bytes
    call    last_sector
    jmp     release_buffers

# Rings and buffers have to be where the host can reach them.
claim_buffers:
    cmp     qword ptr [rip + doorbell_port], 0
    je      .Lclear_buffers
    STEP    "disk-buffers"
    RING    CMD_SHARE, (DISK_GPA>>12), DISK_PAGES, 0, "answer to share of the disk buffers"
    VERIFY_ZERO plain, DISK_GPA, DISK_PAGES, "freshly shared memory"
    OK      "20 pages shared for rings and data"
.Lclear_buffers:
    mov     edi, DISK_GPA
    mov     ecx, DISK_PAGES * PAGE / 8
    xor     eax, eax
    rep stosq
    mov     word ptr [AVAILABLE], 1         # no interrupt, please
    ret

# The device lets go of the memory first, then it turns private.
release_buffers:
    call    reset_device
    cmp     qword ptr [rip + doorbell_port], 0
    je      .Lrefill_buffers
    STEP    "disk-released"
    RING    CMD_UNSHARE, (DISK_GPA>>12), DISK_PAGES, 0, "answer to unshare of the disk buffers"
    VERIFY_ZERO private, DISK_GPA, DISK_PAGES, "freshly private memory"
    OK      "device reset, its buffers private again, zeros seen"
.Lrefill_buffers:
    FILL    private, DISK_GPA, DISK_PAGES, KEY_PRIVATE
    ret

read_first_sectors:
    STEP    "disk-read"
    mov     eax, 8 * 512
    call    limit_to_capacity
    push    rcx
    call    read_from_start
    call    step_ok
    PRINT   "sectors 0.."
    mov     rax, [rsp]
    shr     rax, 9
    dec     rax
    call    put_decimal
    pop     rcx
    jmp     print_checksum

# Several data segments in one chain.
read_first_bytes:
    STEP    "disk-read-chain"
    mov     eax, BUFFER_BYTES
    call    limit_to_capacity
    push    rcx
    call    read_from_start
    call    step_ok
    PRINT   "first "
    mov     rax, [rsp]
    call    put_decimal
    PRINT   " bytes"
    pop     rcx
    # falls through

# ecx = bytes of the buffer: ends the line with their FNV-1a checksum.
print_checksum:
    mov     esi, BUFFER
    movabs  rax, FNV_BASIS
    movabs  r8, FNV_PRIME
.Lchecksum_next:
    movzx   edx, byte ptr [rsi]
    xor     rax, rdx
    imul    rax, r8
    inc     rsi
    dec     ecx
    jnz     .Lchecksum_next
    push    rax
    PRINT   ", FNV-1a "
    pop     rax
    call    put_hex
    jmp     end_line

# eax = bytes wanted: ecx = those that the disk has.
limit_to_capacity:
    mov     ecx, eax
    shr     eax, 9
    cmp     [rip + capacity], rax
    jae     .Llimited
    mov     ecx, [rip + capacity]
    shl     ecx, 9
.Llimited:
    ret

# ecx = bytes, from sector 0 into the buffer, which held something else before.
read_from_start:
    push    rcx
    FILL    plain, BUFFER, (BUFFER_BYTES/PAGE), KEY_SHARED
    pop     rcx
    mov     edi, REQUEST_IN
    xor     esi, esi
    mov     edx, BUFFER
    mov     r8d, STATUS_OK
    jmp     request

# A writable disk takes a block and then its old bytes again, a read-only one refuses the block;
# the disk is left as it was found.
last_sector:
    push    rbx
    mov     rbx, [rip + capacity]
    dec     rbx
    test    dword ptr [rip + features_low], FEATURE_RO
    jnz     .Lread_only
    STEP    "disk-write"
    mov     edi, SECTOR_OLD
    call    read_sector
    call    make_block
    mov     edi, SECTOR_OUT
    call    write_sector
    mov     edi, SECTOR_OUT
    call    compare_sector
    call    step_ok
    PRINT   "sector "
    mov     rax, rbx
    call    put_decimal
    PRINT   " overwritten, flushed, read back"
    call    end_line
    STEP    "disk-restore"
    mov     edi, SECTOR_OLD
    call    write_sector
    mov     edi, SECTOR_OLD
    call    compare_sector
    pop     rbx
    OK      "its old content written back, flushed, read back"
    ret

.Lread_only:
    STEP    "disk-read-only"
    mov     edi, SECTOR_OLD
    call    read_sector
    mov     edi, REQUEST_OUT
    mov     rsi, rbx
    mov     edx, BUFFER
    mov     ecx, 512
    mov     r8d, STATUS_IOERR
    call    request
    mov     edi, SECTOR_OLD
    call    compare_sector
    pop     rbx
    OK      "a write is refused, the last sector is as it was"
    ret

# edi = buffer, rbx = sector.
read_sector:
    mov     edx, edi
    mov     edi, REQUEST_IN
    mov     rsi, rbx
    mov     ecx, 512
    mov     r8d, STATUS_OK
    jmp     request

# edi = buffer, rbx = sector; flushed where the device has a cache to flush.
write_sector:
    mov     edx, edi
    mov     edi, REQUEST_OUT
    mov     rsi, rbx
    mov     ecx, 512
    mov     r8d, STATUS_OK
    call    request
    test    dword ptr [rip + features_low], FEATURE_FLUSH
    jz      .Lwritten_through
    mov     edi, REQUEST_FLUSH
    xor     esi, esi
    xor     edx, edx
    xor     ecx, ecx
    mov     r8d, STATUS_OK
    jmp     request
.Lwritten_through:
    ret

# rbx = sector: a text that a person finds in a dump, the sector's number, then a byte count up.
make_block:
    mov     edi, SECTOR_OUT
    mov     ecx, 512
.Lblock_next:
    mov     eax, 512
    sub     eax, ecx
    stosb
    dec     ecx
    jnz     .Lblock_next
    lea     rsi, [rip + block_text]
    mov     edi, SECTOR_OUT
    mov     ecx, 24
    rep movsb
    mov     [rdi], rbx
    ret

# edi = buffer, rbx = sector: the disk must hold what the buffer holds.
compare_sector:
    push    rdi
    mov     edi, SECTOR_IN
    call    read_sector
    pop     rdx
    WHAT    "last sector read back"
    xor     ecx, ecx
.Lcompare_next:
    mov     rdi, [rdx + rcx]
    mov     rsi, [SECTOR_IN + rcx]
    cmp     rdi, rsi
    jne     .Lcompare_mismatch
    add     ecx, 8
    cmp     ecx, 512
    jb      .Lcompare_next
    ret
.Lcompare_mismatch:
    lea     edx, [rcx + SECTOR_IN]
    jmp     fail_at

    .section .rodata
block_text:
    .ascii  "pyvmm payload was here. "      # 24 bytes
