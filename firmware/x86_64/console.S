# One line at a time to COM1, the step counter, and the report of a mismatch.
#
# A line is built in shared memory and leaves by one `rep outsb`: the kernel interprets string
# I/O and reads its operand by the host's mapping, which private memory does not have.
.include "defs.inc"

    .equ LINE_MAX, 250                  # longer lines are cut

    .text

# rsi = NUL-terminated text.
    .globl put_text
put_text:
    lea     rdi, [rip + line]
    mov     ecx, [rip + line_length]
.Lnext_char:
    mov     al, [rsi]
    inc     rsi
    test    al, al
    jz      .Ltext_done
    cmp     ecx, LINE_MAX
    jae     .Ltext_done
    mov     [rdi + rcx], al
    inc     ecx
    jmp     .Lnext_char
.Ltext_done:
    mov     [rip + line_length], ecx
    ret

# rax = number, printed without leading zeros.
    .globl put_decimal
put_decimal:
    mov     ecx, 10
    jmp     put_number

# rax = number, printed with 0x and without leading zeros.
    .globl put_hex
put_hex:
    push    rax
    PRINT   "0x"
    pop     rax
    mov     ecx, 16
    # falls through

# rax = number, ecx = base: digits from the last to the first.
put_number:
    lea     r8, [rip + digits_end]
    mov     rsi, r8
    mov     byte ptr [rsi], 0
    lea     r9, [rip + digit_characters]
.Lnext_digit:
    xor     edx, edx
    div     rcx
    mov     dl, [r9 + rdx]
    dec     rsi
    mov     [rsi], dl
    test    rax, rax
    jnz     .Lnext_digit
    jmp     put_text

# rax = number: an errno as the doorbell answers it (negative, 32 bits) in decimal, else hex.
put_value:
    mov     ecx, 0xfffff000
    cmp     rax, rcx
    jb      put_hex
    mov     ecx, 0xffffffff
    cmp     rax, rcx
    ja      put_hex
    neg     eax
    push    rax
    PRINT   "-"
    pop     rax
    jmp     put_decimal

# Sends the line. A terminal in raw mode needs the carriage return.
    .globl end_line
end_line:
    lea     rsi, [rip + line]
    mov     ecx, [rip + line_length]
    mov     word ptr [rsi + rcx], 0x0a0d
    add     ecx, 2
    mov     dword ptr [rip + line_length], 0
    mov     edx, [rip + serial_port]
    rep outsb
    push    rax
    add     edx, SERIAL_LSR             # as drivers do: a monitor may have kept the bytes back
    in      al, dx
    pop     rax
    ret

# rsi = tag of the step that begins.
    .globl step_begin
step_begin:
    mov     [rip + step_tag], rsi
    inc     dword ptr [rip + step_number]
    ret

# Begins the line of a step that held.
    .globl step_ok
step_ok:
    PRINT   "ok "
    jmp     put_step

put_step:
    mov     eax, [rip + step_number]
    call    put_decimal
    PRINT   " "
    mov     rsi, [rip + step_tag]
    call    put_text
    PRINT   ": "
    ret

# rdi = expected, rsi = seen. Returns only when they are equal.
    .globl expect_equal
expect_equal:
    cmp     rdi, rsi
    jne     fail_values
    ret

# rdi = expected, rsi = seen: no place to name.
    .globl fail_values
fail_values:
    mov     rdx, -1
    # falls through

# rdi = expected, rsi = seen, rdx = GPA (-1: none). Says so, tells the VMM, and stops.
    .globl fail_at
fail_at:
    mov     r12, rdi
    mov     r13, rsi
    mov     r14, rdx
    mov     dword ptr [rip + line_length], 0
    PRINT   "not ok "
    call    put_step
    mov     rsi, [rip + what]
    call    put_text
    PRINT   ": expected "
    mov     rax, r12
    call    put_value
    PRINT   ", saw "
    mov     rax, r13
    call    put_value
    cmp     r14, -1
    je      .Lno_place
    PRINT   " at GPA "
    mov     rax, r14
    call    put_hex
.Lno_place:
    call    end_line
    mov     edx, [rip + failure_port]
    mov     eax, [rip + step_number]    # nonzero: the number of the step that failed
    out     dx, eax
    jmp     power_off

    .section .rodata
digit_characters:
    .ascii "0123456789abcdef"

    .bss
    .globl step_number, what
step_tag:       .skip 8
what:           .skip 8
step_number:    .skip 4
line_length:    .skip 4
line:           .skip LINE_MAX + 6
digits:         .skip 24
digits_end:     .skip 8
