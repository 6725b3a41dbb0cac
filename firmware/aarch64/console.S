// One line at a time to the UART, the step counter, and the report of a mismatch.
.include "defs.inc"

    .equ LINE_MAX, 250                  // longer lines are cut

    .text

// x0 = NUL-terminated text.
    .globl put_text
put_text:
    adr     x1, line
    ldr     w2, line_length
.Lnext_char:
    ldrb    w3, [x0], #1
    cbz     w3, .Ltext_done
    cmp     w2, #LINE_MAX
    b.hs    .Ltext_done
    strb    w3, [x1, x2]
    add     w2, w2, #1
    b       .Lnext_char
.Ltext_done:
    STORE   w2, line_length
    ret

// x0 = number, printed without leading zeros.
    .globl put_decimal
put_decimal:
    mov     x1, #10
    b       put_number

// x0 = number, printed with 0x and without leading zeros.
    .globl put_hex
put_hex:
    ENTER
    mov     x19, x0
    PRINT   "0x"
    mov     x0, x19
    mov     x1, #16
    bl      put_number
    LEAVE

// x0 = number, x1 = base: digits from the last to the first.
put_number:
    adr     x2, digits_end
    strb    wzr, [x2]
    adr     x3, digit_characters
.Lnext_digit:
    udiv    x4, x0, x1
    msub    x5, x4, x1, x0
    ldrb    w5, [x3, x5]
    strb    w5, [x2, #-1]!
    mov     x0, x4
    cbnz    x0, .Lnext_digit
    mov     x0, x2
    b       put_text

// x0 = number: an errno as the doorbell answers it (negative, 32 bits) in decimal, else hex.
put_value:
    CONST   x1, 0xfffff000
    cmp     x0, x1
    b.lo    put_hex
    CONST   x1, 0xffffffff
    cmp     x0, x1
    b.hi    put_hex
    ENTER
    neg     w19, w0
    PRINT   "-"
    mov     x0, x19
    bl      put_decimal
    LEAVE

// Sends the line. A terminal in raw mode needs the carriage return.
    .globl end_line
end_line:
    adr     x0, line
    ldr     w1, line_length
    mov     w2, #'\r'
    strb    w2, [x0, x1]
    add     w1, w1, #1
    mov     w2, #'\n'
    strb    w2, [x0, x1]
    add     w1, w1, #1
    STORE   wzr, line_length
    ldr     x2, serial
.Lsend_next:
    ldrb    w3, [x0], #1
    strb    w3, [x2]                    // the transmitter is never busy for long
    subs    w1, w1, #1
    b.ne    .Lsend_next
    ldrb    w3, [x2, #SERIAL_LSR]       // as drivers do: a monitor may have kept the bytes back
    ret

// x0 = tag of the step that begins.
    .globl step_begin
step_begin:
    STORE   x0, step_tag
    ldr     w1, step_number
    add     w1, w1, #1
    STORE   w1, step_number
    ret

// Begins the line of a step that held.
    .globl step_ok
step_ok:
    stp     x29, x30, [sp, #-16]!
    PRINT   "ok "
    ldp     x29, x30, [sp], #16
    // falls through

put_step:
    stp     x29, x30, [sp, #-16]!
    ldr     w0, step_number
    bl      put_decimal
    PRINT   " "
    ldr     x0, step_tag
    bl      put_text
    PRINT   ": "
    ldp     x29, x30, [sp], #16
    ret

// x0 = expected, x1 = seen. Returns only when they are equal.
    .globl expect_equal
expect_equal:
    cmp     x0, x1
    b.ne    fail_values
    ret

// x0 = expected, x1 = seen: no place to name.
    .globl fail_values
fail_values:
    mov     x2, #-1
    // falls through

// x0 = expected, x1 = seen, x2 = GPA (-1: none). Says so, tells the VMM, and stops.
    .globl fail_at
fail_at:
    mov     x19, x0
    mov     x20, x1
    mov     x21, x2
    STORE   wzr, line_length
    PRINT   "not ok "
    bl      put_step
    ldr     x0, what
    bl      put_text
    PRINT   ": expected "
    mov     x0, x19
    bl      put_value
    PRINT   ", saw "
    mov     x0, x20
    bl      put_value
    cmn     x21, #1
    b.eq    .Lno_place
    PRINT   " at GPA "
    mov     x0, x21
    bl      put_hex
.Lno_place:
    bl      end_line
    ldr     w0, step_number             // nonzero: the number of the step that failed
    ldr     x1, doorbell
    str     w0, [x1, #BELL_FAILURE]
    b       power_off

    .section .rodata
digit_characters:
    .ascii "0123456789abcdef"

    .bss
    .balign 8
    .globl step_number, what
step_tag:       .skip 8
what:           .skip 8
step_number:    .skip 4
line_length:    .skip 4
line:           .skip LINE_MAX + 6
digits:         .skip 24
digits_end:     .skip 8
