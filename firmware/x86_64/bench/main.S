# Reads the tests from the command line, runs them, prints a line for each, powers off.
#
# After "-- " come words: PATTERN SIZE x DEPTH n COUNT without blanks, as in rr4096x32n8000:
# r or w (read, write), r or s (random, sequential); or eCOUNT: so many port writes that exit.
# With private memory also cCOUNT: a page is shared and unshared so often, and mCOUNT: mapped for
# the disk and unmapped; each by one exit, and ticks are those of the calls alone.
# With private memory a letter before the pattern says how the disk gets at the bytes, as in
# srr4096x32n8000: b bounced; by a virtual IOMMU p premapped, g grouped, l lazy, s strict (see
# bench.inc). A v at the end: each 8 bytes that are read have to be what data.S says,
# and that is written.
# Answers, one line each:
#   result <word>: <ticks> ticks, <notifications> notifications, <ticks> idle, <maps> maps,
#     <unmaps> unmaps, <kicks> kicks
# (on one line: idle is waiting for the disk; kicks are those of the IOMMU's queue)
#   error <what>
#   done
.include "bench.inc"

.equ EXIT_PORT,         0x80
.equ ACPI_CONTROL_PORT, 0x604               # the same in all machines that this knows
.equ SLEEP_VALUES,      0x20003400          # pyvmm's word for power-off, QEMU's behind it
.equ DEBUG_EXIT_PORT,   0xf4                # QEMU's isa-debug-exit

    .text
    .globl main
main:
    mov     [rip + next_word], rdi
    call    skip_to_tests
    PRINT   " bench guest"
    call    end_line
.Lnext:
    mov     rbx, [rip + next_word]
.Lskip_blanks:
    mov     al, [rbx]
    inc     rbx
    cmp     al, ' '
    je      .Lskip_blanks
    dec     rbx
    mov     [rip + next_word], rbx
    mov     [rip + word_start], rbx
    test    al, al
    jz      .Ldone
    cmp     al, 'e'
    je      .Lexits
    cmp     al, 'c'
    je      .Lconversions
    cmp     al, 'm'
    je      .Lmaps
    call    parse_disk_test
    cmp     dword ptr [rip + device_found], 0
    jne     .Lfound
    call    open_way
    lea     rdi, [rip + disk_needs]
    call    find_device
    call    attach_disk
    lea     rdi, [rip + disk_needs]
    call    start_device
    call    read_capacity
    mov     dword ptr [rip + device_found], 1
.Lfound:
    call    touch_buffers
    call    map_pool
    call    disk_test
    push    rax
    cmp     dword ptr [rip + test_mode], MODE_BOUNCED
    jbe     .Lstays
    call    reset_device                    # nothing is lent to it when the answer is there
    call    detach_disk
    mov     dword ptr [rip + device_found], 0
.Lstays:
    pop     rax
    call    put_result
    jmp     .Lnext
.Ldone:
    PRINT   "done"
    call    end_line
    # falls through

power_off:
    mov     edx, ACPI_CONTROL_PORT
    mov     eax, SLEEP_VALUES
    out     dx, ax
    shr     eax, 16
    out     dx, ax
    mov     edx, DEBUG_EXIT_PORT
    out     dx, al
    pause
    jmp     power_off

    .globl fail
fail:
    call    end_line
    jmp     power_off

.Lexits:
    inc     qword ptr [rip + next_word]
    call    parse_number
    mov     ebx, eax
    call    ticks
    mov     r8, rax
    mov     edx, EXIT_PORT
    xor     eax, eax
.Lexit:
    out     dx, al
    dec     ebx
    jnz     .Lexit
    call    ticks
    sub     rax, r8
    push    rax
    call    clear_counts
    pop     rax
    call    put_result
    jmp     .Lnext

.Lconversions:
    inc     qword ptr [rip + next_word]
    call    parse_number
    push    rax
    call    clear_counts
    pop     rax
    call    convert_often
    call    put_result
    jmp     .Lnext

.Lmaps:
    inc     qword ptr [rip + next_word]
    call    parse_number
    push    rax
    mov     dword ptr [rip + test_mode], MODE_STRICT
    call    open_way
    lea     rdi, [rip + disk_needs]
    call    find_device
    call    attach_disk
    call    clear_counts
    pop     rax
    call    map_often
    push    rax
    call    detach_disk
    mov     dword ptr [rip + device_found], 0
    pop     rax
    call    put_result
    jmp     .Lnext

    .globl clear_counts
clear_counts:
    lea     rdi, [rip + counts]
    mov     ecx, COUNTS
    xor     eax, eax
    cld
    rep stosq
    ret

# The tests begin behind the word "--"; without it there are none.
skip_to_tests:
    mov     rbx, [rip + next_word]
.Lscan:
    mov     eax, [rbx]
    test    al, al
    jz      .Lnothing
    inc     rbx
    and     eax, 0xffffff
    cmp     eax, 0x202d2d                   # "-- "
    jne     .Lscan
    add     rbx, 2
.Lnothing:
    mov     [rip + next_word], rbx
    ret

# [mode] op pattern size x depth n count [v]
parse_disk_test:
    mov     rbx, [rip + next_word]
    lea     rdx, [rip + mode_letters]
    mov     ecx, MODE_STRICT
    movzx   eax, byte ptr [rbx]
.Lmode:
    cmp     al, [rdx + rcx]
    je      .Lmode_known
    dec     ecx
    jnz     .Lmode
    dec     qword ptr [rip + next_word]
.Lmode_known:
    mov     [rip + test_mode], ecx
    inc     qword ptr [rip + next_word]
    mov     rbx, [rip + next_word]
    movzx   eax, byte ptr [rbx]
    xor     ecx, ecx
    cmp     al, 'r'
    je      .Lop_known
    inc     ecx                             # VIRTIO_BLK_T_OUT
    cmp     al, 'w'
    jne     .Lbad_word
.Lop_known:
    mov     [rip + test_type], ecx
    movzx   eax, byte ptr [rbx + 1]
    xor     ecx, ecx
    cmp     al, 's'
    je      .Lpattern_known
    inc     ecx
    cmp     al, 'r'
    jne     .Lbad_word
.Lpattern_known:
    mov     [rip + test_random], ecx
    add     qword ptr [rip + next_word], 2
    call    parse_number
    mov     [rip + test_size], eax
    test    eax, 511
    jnz     .Lbad_word
    mov     al, 'x'
    call    expect_letter
    call    parse_number
    mov     [rip + test_depth], eax
    cmp     eax, MAX_DEPTH
    ja      .Lbad_word
    mul     dword ptr [rip + test_size]
    shl     rdx, 32
    or      rax, rdx
    cmp     rax, MAX_BUFFERS
    ja      .Lbad_word
    mov     al, 'n'
    call    expect_letter
    call    parse_number
    mov     [rip + test_count], eax
    cmp     eax, [rip + test_depth]
    jb      .Lbad_word
    mov     rbx, [rip + next_word]
    xor     eax, eax
    cmp     byte ptr [rbx], 'v'
    sete    al
    mov     [rip + test_checks], eax
    add     [rip + next_word], rax
    ret

    .section .rodata
mode_letters:
    .ascii  " bpgls"                        # in the order of MODE_...
    .text

expect_letter:
    mov     rbx, [rip + next_word]
    cmp     [rbx], al
    jne     .Lbad_word
    inc     qword ptr [rip + next_word]
    ret

# A decimal number that is not 0: eax.
parse_number:
    mov     rbx, [rip + next_word]
    xor     eax, eax
.Ldigit:
    movzx   ecx, byte ptr [rbx]
    sub     ecx, '0'
    cmp     ecx, 9
    ja      .Lnumber_ends
    imul    eax, eax, 10
    add     eax, ecx
    inc     rbx
    jmp     .Ldigit
.Lnumber_ends:
    mov     [rip + next_word], rbx
    test    eax, eax
    jz      .Lbad_word
    ret

.Lbad_word:
    FAIL    "a test that makes no sense"

# rax = time stamp counter.
    .globl ticks
ticks:
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    ret

# rax = ticks that the test took.
put_result:
    push    rax
    PRINT   "result "
    mov     rsi, [rip + word_start]
    mov     rdx, [rip + next_word]
    sub     rdx, rsi
    lea     rdi, [rip + line]
    mov     ecx, [rip + line_length]
.Lcopy_word:
    mov     al, [rsi]
    mov     [rdi + rcx], al
    inc     rsi
    inc     ecx
    dec     edx
    jnz     .Lcopy_word
    mov     [rip + line_length], ecx
    PRINT   ": "
    pop     rax
    call    put_decimal
    PRINT   " ticks, "
    mov     rax, [rip + notifications]
    call    put_decimal
    PRINT   " notifications, "
    mov     rax, [rip + idle_ticks]
    call    put_decimal
    PRINT   " idle, "
    mov     rax, [rip + maps]
    call    put_decimal
    PRINT   " maps, "
    mov     rax, [rip + unmaps]
    call    put_decimal
    PRINT   " unmaps, "
    mov     rax, [rip + kicks]
    call    put_decimal
    PRINT   " kicks"
    # falls through

# Sends the line.
    .globl end_line
end_line:
    lea     rsi, [rip + line]
    mov     ecx, [rip + line_length]
    mov     byte ptr [rsi + rcx], 10
    inc     ecx
    mov     dword ptr [rip + line_length], 0
    mov     edx, SERIAL_PORT
    cld
    rep outsb
    push    rax
    add     edx, SERIAL_LSR                 # as drivers do: a monitor may have kept the bytes back
    in      al, dx
    pop     rax
    ret

# rsi = NUL-terminated text, added to the line.
    .globl put_text
put_text:
    lea     rdi, [rip + line]
    mov     ecx, [rip + line_length]
.Lcharacter:
    mov     al, [rsi]
    test    al, al
    jz      .Ltext_ends
    mov     [rdi + rcx], al
    inc     rsi
    inc     ecx
    jmp     .Lcharacter
.Ltext_ends:
    mov     [rip + line_length], ecx
    ret

# rax = number, added to the line.
    .globl put_decimal
put_decimal:
    lea     rsi, [rip + digits_end]
    mov     byte ptr [rsi], 0
    mov     ecx, 10
.Lnext_digit:
    xor     edx, edx
    div     rcx
    add     dl, '0'
    dec     rsi
    mov     [rsi], dl
    test    rax, rax
    jnz     .Lnext_digit
    jmp     put_text

    .bss
    .globl test_type, test_random, test_size, test_depth, test_count, test_mode, test_checks
    .globl counts, notifications, idle_ticks, maps, unmaps, kicks
    .balign 8
counts:                                     # COUNTS of them
notifications:  .skip 8
idle_ticks:     .skip 8
maps:           .skip 8
unmaps:         .skip 8
kicks:          .skip 8
next_word:      .skip 8
word_start:     .skip 8
test_type:      .skip 4
test_random:    .skip 4
test_size:      .skip 4
test_depth:     .skip 4
test_count:     .skip 4
test_mode:      .skip 4
test_checks:    .skip 4
device_found:   .skip 4
line_length:    .skip 4
line:           .skip 4200                  # a command line has at most 4096 characters
digits:         .skip 24
digits_end:     .skip 8
