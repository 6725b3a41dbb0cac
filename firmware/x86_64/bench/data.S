# The guest's bytes around a request: copied where the disk reaches only a bounce buffer, lent and
# taken back where a virtual IOMMU stands before it; and, if the test wants it, looked at.
.include "bench.inc"

.equ WRITTEN_KEY,       0x7772697474656e21      # what 8 bytes hold: their place on the disk,
.equ READ_KEY,          0x64697363706c6163      # in bytes, xor one of these

    .text

# Every page of the buffers, so that no test pays for the first touch.
    .globl touch_buffers
touch_buffers:
    mov     eax, [rip + test_size]
    mul     dword ptr [rip + test_depth]
    mov     ecx, eax                        # MAX_BUFFERS at most
    mov     edi, BUFFERS
    call    touch
    cmp     dword ptr [rip + test_mode], MODE_BOUNCED
    jne     .Ltouched
    mov     edi, OWN_BUFFERS
    # falls through

# edi = first page, ecx = bytes, which stay; rdi is changed.
touch:
    mov     edx, ecx
    add     rdx, rdi
.Ltouch:
    mov     al, [rdi]
    mov     [rdi], al
    add     rdi, 0x1000
    cmp     rdi, rdx
    jb      .Ltouch
.Ltouched:
    ret

# ebx = slot: eax = where its bytes are for the disk, and in esi for the guest; ecx = how many.
places_of:
    mov     ecx, [rip + test_size]
    mov     eax, ecx
    imul    eax, ebx
    lea     esi, [rax + OWN_BUFFERS]
    add     eax, BUFFERS
    cmp     dword ptr [rip + test_mode], MODE_BOUNCED
    je      .Lplaces_known
    mov     esi, eax
.Lplaces_known:
    ret

# ebx = slot, whose request is about to go to the disk.
    .globl before_request
before_request:
    mov     eax, [rip + test_mode]
    or      eax, [rip + test_checks]
    jz      .Lnothing_to_do                 # nobody copies, maps or looks
    cmp     dword ptr [rip + test_type], 0
    je      .Lno_bytes_yet
    call    places_of
    cmp     dword ptr [rip + test_checks], 0
    je      .Lfilled
    call    word_of_slot                    # rdx
    movabs  r8, WRITTEN_KEY
    mov     edi, esi
    shr     ecx, 3
.Lfill_word:
    mov     rax, rdx
    xor     rax, r8
    mov     [rdi], rax
    add     rdx, 8
    add     rdi, 8
    dec     ecx
    jnz     .Lfill_word
.Lfilled:
    cmp     dword ptr [rip + test_mode], MODE_BOUNCED
    jne     .Lno_bytes_yet
    call    places_of
    mov     edi, eax
    jmp     copy
.Lno_bytes_yet:
    mov     eax, [rip + test_mode]
    cmp     eax, MODE_GROUPED
    jb      .Lnothing_to_do
    call    places_of
    mov     esi, eax
    mov     edx, ecx
    call    iommu_map
    cmp     dword ptr [rip + test_mode], MODE_GROUPED
    jne     iommu_kick
.Lnothing_to_do:
    ret

# ebx = slot, whose request has come back.
    .globl after_request
after_request:
    mov     eax, [rip + test_mode]
    or      eax, [rip + test_checks]
    jz      .Lnothing_to_do
    mov     eax, [rip + test_mode]
    cmp     eax, MODE_GROUPED
    jb      .Ltaken_back
    call    places_of
    mov     esi, eax
    mov     edx, ecx
    call    iommu_unmap
    cmp     dword ptr [rip + test_mode], MODE_STRICT
    jne     .Ltaken_back
    call    iommu_kick
.Ltaken_back:
    cmp     dword ptr [rip + test_type], 0
    jne     .Lnothing_to_do
    cmp     dword ptr [rip + test_mode], MODE_BOUNCED
    jne     .Lbytes_are_here
    call    places_of
    mov     edi, esi
    mov     esi, eax
    call    copy
.Lbytes_are_here:
    cmp     dword ptr [rip + test_checks], 0
    je      .Lnothing_to_do
    call    places_of
    call    word_of_slot
    movabs  r8, READ_KEY
    shr     ecx, 3
.Lcheck_word:
    mov     rax, rdx
    xor     rax, r8
    cmp     [rsi], rax
    jne     .Lwrong_bytes
    add     rdx, 8
    add     rsi, 8
    dec     ecx
    jnz     .Lcheck_word
    ret
.Lwrong_bytes:
    FAIL    "bytes that are not the disk's"

# ebx = slot: rdx = its request's place on the disk, in bytes. Changes rdx only.
word_of_slot:
    mov     edx, ebx
    shl     edx, 6                          # REQUEST_STRIDE
    mov     rdx, [rdx + REQUESTS + REQUEST_SECTOR]
    shl     rdx, 9
    ret

# ecx bytes, a multiple of 8, from rsi to rdi.
copy:
    shr     ecx, 3
    cld
    rep movsq
    ret
